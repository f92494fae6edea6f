#!/usr/bin/env bash
# Train r3rag_jax on a SLURM GPU cluster: allocate, set up once, train on every node, resume, tear down.
#
#   launch/slurm.sh run --name r3 --nodes 2 --gpus-per-node 8 --partition h100 --time 24:00:00 \
#       --config configs/r3rag_qwen2.5_7b.yaml --run-dir /scratch/runs/r3 \
#       --stage hf://Qwen/Qwen2.5-7B-Instruct=models/Qwen2.5-7B-Instruct rl.lr=1e-6
#
# Usage: launch/slurm.sh COMMAND [FLAG VALUE | FLAG=VALUE]... [KEY=VALUE]...
#
# Commands and the flags that each must have
#   run       submit the job: set up if need be, train     --name --nodes --gpus-per-node --time --config
#   resume    the same: training goes on from its run directory; waits for a job of the same name to end
#   setup     set up here and now, for clusters whose compute nodes have no network
#   status    the queue's view of the job                  --name
#   logs      the end of the job's log                     --name
#   cancel    tear down: cancel the jobs of that name      --name
#
# Allocation
#   --name NAME           name of the job and of its log file
#   --nodes N --gpus-per-node N --time TIME                as for sbatch
#   --partition P --account A --cpus-per-task N            as for sbatch (optional)
#   --mem SIZE            memory of a node, as for sbatch (default 0: all of it)
#   --task-per gpu|node   processes: one for each GPU (default) or one for each node
#   --sbatch-arg ARG      one more argument of sbatch, e.g. --qos=high (repeatable)
#   --grace-s SECONDS     time to save before the limit; then the job requeues itself (default 120)
# Setup
#   --source DIR          checkout on a file system that all nodes share (default: this one)
#   --venv DIR            virtual environment to make, or to install into (default: SOURCE/.venv); launch/constraints.txt
#                         pins what it holds
#   --python PROGRAM      Python that makes it, 3.11 or newer (default python3)
#   --container IMAGE     run setup and training in this image (needs the pyxis plugin)
#   --mounts LIST         more container mounts, e.g. /scratch:/scratch
# Training
#   --config FILE         recipe, relative to the checkout
#   --run-dir PATH        run directory on a file system that all nodes share
#   --stage SOURCE=TARGET copy a folder to the shared file system before training; SOURCE gs://…, s3://…, hf://ORG/NAME
#                         or a path; TARGET relative to the checkout (repeatable; launch/stage.py)
#   --env KEY=VALUE       environment variable of the training processes (repeatable)
#   KEY=VALUE             configuration override, as in `python -m r3rag_jax.train`
# Other
#   --log-dir DIR         where the logs go (default: SOURCE/runs/slurm);  --follow keeps reading
#   --dry-run             print the commands and the job script, and run none
#   --help                print this

set -euo pipefail

readonly PROGRAM=slurm.sh
readonly VALUE_FLAGS=' --name --nodes --gpus-per-node --time --partition --account --mem --cpus-per-task --task-per
  --grace-s --source --venv --python --container --mounts --config --run-dir --log-dir '
readonly LIST_FLAGS=' --sbatch-arg --env --stage '
readonly SWITCHES=' --follow --dry-run '
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

# ---- the job -----------------------------------------------------------------------------------

# Two jobs may start at once: the lock lets one set up while the other waits.
setup_command() {
  local done_file=$venv/.r3rag_jax_ready
  printf 'cd %q && mkdir -p %q && exec 9>%q && flock 9 && { [ -e %q ] || { %q -m venv %q && %q -m pip install --quiet -c launch/constraints.txt -e %q && touch %q; }; }' \
    "$source" "$venv" "$venv/.lock" "$done_file" "$python" "$venv" "$venv/bin/python" '.[cuda,gcs]' "$done_file"
  # Under the same lock: two jobs must not copy to one folder at the same time.
  if ((${#stages[@]})); then printf ' && %s' "$(quote "$venv/bin/python" launch/stage.py "${stages[@]}")"; fi
  printf '\n'
}

container_args() { # fills the array `inside`
  inside=()
  if [[ -n $container ]]; then
    inside=(--container-image="$container" --container-mounts="$source:$source${mounts:+,$mounts}"
      --container-workdir="$source")
  fi
}

# Under SLURM, JAX gives each process the GPU of its local rank and so expects to see all GPUs of the
# node: --gpus-per-node, never --gpus-per-task. With one process a node it must be told to take all.
training_command() {
  local ids
  local argv=(srun --kill-on-bad-exit=1 ${cpus_per_task:+--cpus-per-task="$cpus_per_task"} ${inside[@]+"${inside[@]}"} env)
  if [[ $task_per == node ]]; then
    ids=$(seq -s, 0 $((gpus_per_node - 1)))
    argv+=("JAX_LOCAL_DEVICE_IDS=$ids")
  fi
  argv+=("${envs[@]}" "$venv/bin/python" -m r3rag_jax.train --config "$config" "${overrides[@]}")
  quote "${argv[@]}"
}

# After preemption or the loss of a node SLURM requeues the job by itself (--requeue); before the time
# limit it sends USR1 and the job requeues itself. scancel sends TERM, which must not bring it back.
job_script() {
  cat <<JOB
#!/usr/bin/env bash
set -euo pipefail
cd $(quote "$source")
srun --nodes=1 --ntasks=1 --ntasks-per-node=1 $([[ -z $container ]] || quote "${inside[@]}") bash -c $(quote "$(setup_command)")

signal='' status=0
trap 'signal=USR1' USR1
trap 'signal=TERM' TERM
$(training_command) &
training=\$!
wait "\$training" || status=\$?

if [[ -n \$signal ]]; then
  kill -TERM "\$training" 2>/dev/null || true # srun passes it on to every process
  deadline=\$((SECONDS + $grace_s))
  while kill -0 "\$training" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
  if ! kill -0 "\$training" 2>/dev/null; then
    status=0
    wait "\$training" || status=\$?
  fi
  # Exit status 0 means that every phase has finished: then there is nothing to come back for.
  if [[ \$signal == USR1 && \$status != 0 ]]; then scontrol requeue "\$SLURM_JOB_ID"; fi
fi
exit "\$status"
JOB
}

submit() {
  local tasks=$gpus_per_node args
  if [[ $task_per == node ]]; then tasks=1; fi
  # singleton: two jobs must never write one run directory at the same time.
  args=(--job-name="$name" --dependency=singleton --nodes="$nodes" --ntasks-per-node="$tasks"
    --gpus-per-node="$gpus_per_node" --mem="$mem" --time="$time" --requeue --open-mode=append
    --signal="B:USR1@$((grace_s + 60))" --chdir="$source" --output="$log_dir/$name.out")
  if [[ -n $partition ]]; then args+=(--partition="$partition"); fi
  if [[ -n $account ]]; then args+=(--account="$account"); fi
  if [[ -n $cpus_per_task ]]; then args+=(--cpus-per-task="$cpus_per_task"); fi
  args+=(${sbatch_args[@]+"${sbatch_args[@]}"})
  run_command mkdir -p "$log_dir"
  if [[ -n $dry_run ]]; then
    printf "%s <<'R3RAG_JAX_JOB'\n%s\nR3RAG_JAX_JOB\n" "$(quote sbatch "${args[@]}")" "$(job_script)"
  else
    job_script | sbatch "${args[@]}"
  fi
}

setup() {
  if [[ -n $container ]]; then
    run_command srun --nodes=1 --ntasks=1 ${partition:+--partition="$partition"} \
      ${account:+--account="$account"} ${inside[@]+"${inside[@]}"} bash -c "$(setup_command)"
  else
    run_command bash -c "$(setup_command)"
  fi
}

# ---- command line ------------------------------------------------------------------------------

name='' nodes='' gpus_per_node='' time='' partition='' account='' cpus_per_task='' task_per=gpu grace_s=120
source=$(dirname "$here") mem=0 venv='' python=python3 container='' mounts='' config='' run_dir='' log_dir=''
follow='' dry_run=''
sbatch_args=() envs=(PYTHONUNBUFFERED=1) stages=() overrides=(mesh.distributed=true)

from() { # DIR PATH: PATH as seen from DIR
  if [[ $2 == /* ]]; then printf '%s\n' "$2"; else printf '%s/%s\n' "$1" "$2"; fi
}

check() {
  case $command in
    run | resume)
      require name nodes gpus_per_node time config
      if [[ ! -f $(from "$source" "$config") ]]; then
        usage_error "--config must name a file in $source; got '$config'"
      fi
      ;;
    setup) ;;
    status | logs | cancel) require name ;;
    *) usage_error "unknown command '$command'" ;;
  esac
  require_numbers nodes gpus_per_node grace_s cpus_per_task
  check_stages ${stages[@]+"${stages[@]}"}
  if [[ ! $task_per =~ ^(gpu|node)$ ]]; then usage_error "--task-per must be gpu or node; got '$task_per'"; fi
}

main() {
  command=${1:-}
  case $command in
    --help | -h) print_help && exit 0 ;;
    '' | -*) usage_error "the first argument must be a command; got '$command'" ;;
  esac
  shift
  parse "$@"
  if [[ ! -d $source ]]; then usage_error "--source must be a directory; got '$source'"; fi
  source=$(cd "$source" && pwd)
  venv=$(from "$source" "${venv:-.venv}")
  log_dir=$(from "$source" "${log_dir:-runs/slurm}")
  check
  if [[ -n $run_dir ]]; then overrides+=("run_dir=$run_dir"); fi
  stop_in_time
  container_args
  case $command in
    run | resume) submit ;;
    setup) setup ;;
    status) run_command squeue --name="$name" --user="$(id -un)" ;;
    logs) run_command tail -n 200 ${follow:+-F} "$log_dir/$name.out" ;;
    cancel) run_command scancel --name="$name" --user="$(id -un)" ;;
  esac
}

main "$@"
