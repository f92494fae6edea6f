#!/usr/bin/env bash
# Train r3rag_jax on a TPU pod slice: create it, set it up, train on every host, resume, tear down.
#
#   launch/tpu_pod.sh up --name r3 --zone us-east5-b --accelerator v6e-64 --spot --queued \
#       --config configs/r3rag_qwen2.5_7b.yaml --run-dir gs://my-bucket/runs/r3 \
#       --stage gs://my-bucket/models=models --stage gs://my-bucket/data=data rl.lr=1e-6
#
# Usage: launch/tpu_pod.sh COMMAND [FLAG VALUE | FLAG=VALUE]... [KEY=VALUE]...
#
# Commands and the flags that each must have
#   create    make the slice                                --name --zone --accelerator
#   setup     code, virtual environment, install, all hosts --name --zone
#   run       stage, then train, on all hosts               --name --zone --config
#   up        create, setup, run                            --name --zone --accelerator --config
#   resume    run again; a preempted slice is made anew     --name --zone --accelerator --config
#   status    state of the slice, then of each host         --name --zone
#   logs      the end of one host's training log            --name --zone
#   stop      end the training on all hosts, keep the slice --name --zone
#   delete    tear the slice down                           --name --zone
#
# Slice
#   --name NAME           name of the slice (and of its queued resource)
#   --zone ZONE           e.g. us-east5-b
#   --accelerator TYPE    e.g. v5e-64 (v5litepod-64), v6e-32, v5p-128, v4-32
#   --slices N            slices that train together over the data-centre network (default 1; more need --queued)
#   --project PROJECT     default: the project of your gcloud configuration
#   --runtime VERSION     TPU software version; default: the one that suits --accelerator
#   --spot | --reserved   spot capacity, or your reservation
#   --queued              ask through a queued resource and wait for it; give it to every command
#   --poll-s SECONDS      pause between two looks at the queue (default 30)
#   --create-arg ARG      one more argument of `gcloud … create`, e.g. --network=my-net (repeatable)
#   --ssh-arg ARG         one more argument of `gcloud … ssh` and `scp`, e.g. --internal-ip (repeatable)
# Setup
#   --source DIR          git checkout to copy, ignored files left out (default: this one)
#   --repo-url URL        fetch from a git server instead of copying; --ref REF (default HEAD)
#   --python VERSION      Python of the virtual environment (default 3.12); launch/constraints.txt pins what it holds
# Training
#   --config FILE         recipe, relative to the checkout
#   --run-dir PATH        run directory that all hosts share: gs://bucket/path, or a mounted disk
#   --stage SOURCE=TARGET copy a folder to every host before training, e.g. gs://my-bucket/models=models; SOURCE also
#                         hf://ORG/NAME, s3://…; TARGET relative to the checkout (repeatable; launch/stage.py)
#   --env KEY=VALUE       environment variable of the training processes (repeatable)
#   --detach              start and return; follow with `logs --follow`
#   --delete-on-exit      delete the slice when the command ends, whether it worked or failed
#   KEY=VALUE             configuration override, as in `python -m r3rag_jax.train`
# Other
#   --worker N            host that `logs` reads (default 0);  --follow keeps reading
#   --dry-run             print the commands, one a line, and run none
#   --help                print this

set -euo pipefail

readonly PROGRAM=tpu_pod.sh
readonly VALUE_FLAGS=' --name --zone --accelerator --slices --project --runtime --poll-s --source --repo-url --ref
  --python --config --run-dir --worker '
readonly LIST_FLAGS=' --create-arg --ssh-arg --env --stage '
readonly SWITCHES=' --spot --reserved --queued --detach --delete-on-exit --follow --dry-run '
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

# ---- gcloud ------------------------------------------------------------------------------------

# Names of the slices, a line each: that of the only one, or those that a request for several gives them.
node_names() {
  local number
  if ((slices == 1)); then
    printf '%s\n' "$name"
  else
    for ((number = 0; number < slices; number++)); do printf '%s-%d\n' "$name" "$number"; done
  fi
}

tpu_vm() { run_command gcloud compute tpus tpu-vm "$1" "$2" "${where[@]}" "${@:3}"; } # VERB NODE ARGUMENT…

queued_resource() {
  run_command gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"
}

# On several slices at the same time: a training process waits for all others.
on_hosts() { # WORKER REMOTE_COMMAND
  local node pid pids=() status=0
  local args=(--worker="$1" ${ssh_args[@]+"${ssh_args[@]}"} --command="$2")
  for node in $(node_names); do
    if [[ $slices == 1 || -n $dry_run ]]; then
      tpu_vm ssh "$node" "${args[@]}" || return
    else
      tpu_vm ssh "$node" "${args[@]}" &
      pids+=("$!")
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || status=$?; done
  return "$status"
}

runtime_of() { # cloud.google.com/tpu/docs/runtimes
  case $1 in
    v6e-*) printf 'v2-alpha-tpuv6e\n' ;;
    v5p-*) printf 'v2-alpha-tpuv5\n' ;;
    v5litepod-*) printf 'v2-alpha-tpuv5-lite\n' ;;
    v2-* | v3-* | v4-*) printf 'tpu-ubuntu2204-base\n' ;;
    *) usage_error "--runtime must be given for an accelerator unknown here; got --accelerator $1" ;;
  esac
}

# Prints the state that `describe` (through "$@") reports, or MISSING; any other failure ends the script.
state_or_missing() {
  local output status=0
  output=$("$@" 2>&1) || status=$?
  if ((status == 0)); then
    grep -E '^[A-Z_]+$' <<<"$output" | tail -n 1 # warnings may surround it
  elif [[ $output == *NOT_FOUND* || $output == *"not found"* ]]; then
    printf 'MISSING\n'
  else
    printf '%s\n' "$output" >&2
    return "$status"
  fi
}

slice_state() {
  local state node
  if [[ -n $queued ]]; then
    state=$(state_or_missing queued_resource describe --format='value(state.state)') || return
    if [[ $state != ACTIVE ]]; then
      printf '%s\n' "$state"
      return
    fi
  fi
  for node in $(node_names); do
    state=$(state_or_missing tpu_vm describe "$node" --format='value(state)') || return
    if [[ $state != READY ]]; then break; fi
  done
  # An ACTIVE request whose node is gone still holds the name: it must be deleted first.
  if [[ -n $queued && $state == MISSING ]]; then state=PREEMPTED; fi
  printf '%s\n' "$state"
}

await_queue() {
  local state
  while :; do
    state=$(state_or_missing queued_resource describe --format='value(state.state)')
    case $state in
      ACTIVE) return ;;
      ACCEPTED | WAITING_FOR_RESOURCES | CREATING | PROVISIONING) ;;
      *) fail "a queued resource must become ACTIVE; $name is $state" ;;
    esac
    printf 'tpu_pod.sh: %s is %s\n' "$name" "$state" >&2
    sleep "$poll_s"
  done
}

# ---- stages ------------------------------------------------------------------------------------

create_slice() {
  local names=(--node-id="$name") args=(--accelerator-type="$accelerator")
  if ((slices > 1)); then names=(--node-count="$slices" --node-prefix="$name"); fi
  if [[ -n $spot ]]; then args+=(--spot); fi
  if [[ -n $reserved ]]; then args+=(--reserved); fi
  args+=(${create_args[@]+"${create_args[@]}"})
  if [[ -z $queued ]]; then
    tpu_vm create "$name" --version="$runtime" "${args[@]}"
    return
  fi
  queued_resource create "${names[@]}" --runtime-version="$runtime" "${args[@]}"
  if [[ -z $dry_run ]]; then
    await_queue
  else
    queued_resource describe --format='value(state.state)'
  fi
}

# The hosts' own Python is older than the package allows, so uv brings one of its own.
setup_hosts() {
  local fetch install
  # shellcheck disable=SC2016  # $HOME is the host's
  printf -v install '[ -x .venv/bin/python ] || "$HOME/.local/bin/uv" venv --seed --python %q .venv' "$python"
  install="cd r3rag_jax && python3 -m pip install --quiet --user uv && { $install; }"
  install+=" && .venv/bin/python -m pip install --quiet -c launch/constraints.txt -e '.[tpu,gcs]'"
  if [[ -n $repo_url ]]; then
    printf -v fetch 'git init -q r3rag_jax && git -C r3rag_jax fetch -q --depth 1 %q %q' "$repo_url" "$ref"
    fetch+=" && git -C r3rag_jax checkout -q --force --detach FETCH_HEAD"
  else
    fetch="mkdir -p r3rag_jax && tar -xzf r3rag_jax.tar.gz -C r3rag_jax"
    copy_source
  fi
  on_hosts all "$fetch && $install"
}

copy_source() {
  local pack node
  # shellcheck disable=SC2016  # the inner shell expands its own arguments
  pack='set -o pipefail; git -C "$1" ls-files -z --cached --others --exclude-standard | tar -C "$1" --null -T - -czf "$2"'
  archive=/tmp/r3rag_jax.tar.gz
  if [[ -z $dry_run ]]; then archive=$(mktemp); fi
  run_command bash -c "$pack" pack "$source" "$archive"
  for node in $(node_names); do
    run_command gcloud compute tpus tpu-vm scp "$archive" "$node:r3rag_jax.tar.gz" "${where[@]}" \
      --worker=all ${ssh_args[@]+"${ssh_args[@]}"}
  done
}

# One process a host: on a TPU slice jax.distributed finds the coordinator and the ranks by itself.
train() {
  local line
  line=$(quote env "${envs[@]}" .venv/bin/python -m r3rag_jax.train --config "$config" "${overrides[@]}")
  if ((${#stages[@]})); then line="$(quote .venv/bin/python launch/stage.py "${stages[@]}") && $line"; fi
  if [[ -n $detach ]]; then
    on_hosts all "cd r3rag_jax && { nohup bash -c $(quote "$line") >>../r3rag_jax.log 2>&1 </dev/null & }"
  else
    on_hosts all "set -o pipefail; cd r3rag_jax && { $line; } 2>&1 | tee -a ../r3rag_jax.log"
  fi
}

describe_slice() {
  local node
  if [[ -n $queued ]]; then queued_resource describe --format='value(state.state)'; fi
  for node in $(node_names); do tpu_vm describe "$node" --format='value(state)'; done
}

delete_slice() {
  if [[ -n $queued ]]; then
    queued_resource delete --force --quiet
  else
    tpu_vm delete "$name" --quiet
  fi
}

recreate() {
  local state
  if [[ -n $dry_run ]]; then
    printf '# describe tells whether the slice is there; delete, create and setup follow only where it is not\n'
    describe_slice
    delete_slice
    create_slice
    setup_hosts
    return
  fi
  state=$(slice_state)
  case $state in
    READY) return ;;
    MISSING) create_slice ;;
    PREEMPTED | TERMINATED | SUSPENDED | FAILED)
      delete_slice
      create_slice
      ;;
    ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING) await_queue ;;
    *) fail "resume needs a slice that is READY, preempted or gone; $name is $state: try again later" ;;
  esac
  setup_hosts
}

show_status() {
  describe_slice
  # The brackets keep the pattern from matching the shell that carries it.
  on_hosts all "if pgrep -f '[r]3rag_jax.train' >/dev/null; then echo \"\$(hostname) training\"; else echo \"\$(hostname) idle\"; fi"
}

stop_training() {
  local alive="pgrep -f '[r]3rag_jax.train' >/dev/null"
  on_hosts all "pkill -TERM -f '[r]3rag_jax.train'; for _ in \$(seq 60); do $alive || exit 0; sleep 1; done; pkill -KILL -f '[r]3rag_jax.train'"
}

on_exit() {
  local status=$? delete_status=0
  if [[ -n $archive && -z $dry_run ]]; then rm -f "$archive"; fi
  if [[ -n $delete_on_exit ]]; then delete_slice || delete_status=$?; fi
  exit "$((status ? status : delete_status))"
}

# ---- command line ------------------------------------------------------------------------------

name='' zone='' accelerator='' slices=1 project='' runtime='' spot='' reserved='' queued='' poll_s=30
source=$(dirname "$here") repo_url='' ref=HEAD python=3.12 config='' run_dir='' detach='' delete_on_exit='' worker=0
follow='' dry_run='' archive=''
create_args=() ssh_args=() envs=(PYTHONUNBUFFERED=1) stages=() overrides=(mesh.distributed=true)

check() {
  case $command in
    create) require name zone accelerator ;;
    run) require name zone config ;;
    up | resume) require name zone accelerator config ;;
    setup | status | logs | stop | delete) require name zone ;;
    *) usage_error "unknown command '$command'" ;;
  esac
  if [[ -n $delete_on_exit && (-n $detach || ! $command =~ ^(run|up|resume)$) ]]; then
    usage_error "--delete-on-exit goes with run, up and resume, without --detach"
  fi
  require_numbers slices
  check_stages ${stages[@]+"${stages[@]}"}
  if [[ -n $spot && -n $reserved ]]; then usage_error "--spot and --reserved exclude each other"; fi
  if ((slices > 1)) && [[ -z $queued ]]; then usage_error "--slices above 1 needs --queued; got $slices"; fi
  accelerator=$(cloud_name "$accelerator")
  if [[ -n $accelerator && -z $runtime ]]; then runtime=$(runtime_of "$accelerator"); fi
  if [[ $command == up && -z $repo_url && ! -f $source/$config ]]; then
    usage_error "--config must name a file in $source; got '$config'"
  fi
  if [[ -z $dry_run ]] && ! command -v gcloud >/dev/null; then fail "gcloud must be on PATH; it is not"; fi
  if [[ -n $run_dir ]]; then
    overrides+=("run_dir=$run_dir")
  elif [[ -n $config ]]; then
    warn "no --run-dir: what is not on a shared path is lost with the slice"
  fi
}

main() {
  command=${1:-}
  case $command in
    --help | -h) print_help && exit 0 ;;
    '' | -*) usage_error "the first argument must be a command; got '$command'" ;;
  esac
  shift
  parse "$@"
  check
  where=(--zone="$zone")
  if [[ -n $project ]]; then where+=(--project="$project"); fi
  trap on_exit EXIT
  case $command in
    create) create_slice ;;
    setup) setup_hosts ;;
    run) train ;;
    up)
      # Three lines, not `&&`: that would switch `set -e` off inside the stages.
      create_slice
      setup_hosts
      train
      ;;
    resume)
      recreate
      train
      ;;
    status) show_status ;;
    logs) on_hosts "$worker" "tail -n 200 ${follow:+-F }r3rag_jax.log" ;;
    stop) stop_training ;;
    delete) delete_slice ;;
  esac
}

main "$@"
