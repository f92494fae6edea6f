#!/usr/bin/env bash
# Train r3rag_jax on Google Kubernetes Engine: image, node pool, a JobSet that restarts itself, tear down.
#
#   launch/gke.sh image --image us-docker.pkg.dev/my-project/r3/r3rag_jax:1 --accelerator v6e-32
#   launch/gke.sh run --name r3 --image us-docker.pkg.dev/my-project/r3/r3rag_jax:1 --accelerator v6e-32 --spot \
#       --config configs/r3rag_qwen2.5_7b.yaml --run-dir gs://my-bucket/runs/r3 --stage gs://my-bucket/models=models
#
# Usage: launch/gke.sh COMMAND [FLAG VALUE | FLAG=VALUE]... [KEY=VALUE]...
#
# Commands and the flags that each must have; kubectl must point at the cluster, which must have JobSet installed
#   image     build the image of launch/Dockerfile, push it --image --accelerator
#   nodes     add a node pool for each slice to the cluster --name --cluster --location --accelerator
#   run       apply the JobSet: stage, then train           --name --image --accelerator --config --run-dir
#   resume    delete an ended JobSet of the name, run again --name --image --accelerator --config --run-dir
#   status    the JobSet and its pods                       --name
#   logs      the end of the log of host 0                  --name
#   stop      delete the JobSet: training saves and ends    --name
#   delete    stop, and remove the node pools               --name --cluster --location
#
# Slice
#   --accelerator TYPE    v5e-N, v6e-N (chips), v5p-N (cores), h100-8 or h100-16
#   --slices N            slices that train together over the data-centre network, TPU only (default 1)
#   --spot                nodes of spot capacity
#   --cluster NAME --location LOCATION --project PROJECT    as for gcloud container
#   --pool-arg ARG        one more argument of `gcloud container node-pools create` (repeatable)
# Training
#   --image IMAGE         image with the package, from a registry that the cluster reads
#   --namespace NAME      namespace of the JobSet (default: default)
#   --service-account NAME  Kubernetes service account that may read and write the buckets (default: default)
#   --max-restarts N      how often a failed or preempted JobSet starts again by itself (default 100)
#   --grace-s SECONDS     time to save after SIGTERM (default 120)
#   --scratch SIZE        disk of each pod for what --stage copies (default 90Gi)
#   --config FILE         recipe, relative to the checkout
#   --run-dir PATH        run directory that all hosts share: gs://bucket/path
#   --stage SOURCE=TARGET copy a folder to every pod before training, e.g. gs://my-bucket/models=models; SOURCE also
#                         hf://ORG/NAME, s3://…; TARGET relative to the checkout (repeatable; launch/stage.py)
#   --env KEY=VALUE       environment variable of the training processes (repeatable)
#   KEY=VALUE             configuration override, as in `python -m r3rag_jax.train`
# Other
#   --follow              logs: keep reading
#   --dry-run             print the commands and the JobSet, and run none
#   --help                print this

set -euo pipefail

readonly PROGRAM=gke.sh
readonly VALUE_FLAGS=' --name --accelerator --slices --cluster --location --project --image --namespace --service-account
  --max-restarts --grace-s --scratch --config --run-dir '
readonly LIST_FLAGS=' --pool-arg --env --stage '
readonly SWITCHES=' --spot --follow --dry-run '
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$here/common.sh"

# ---- machines ----------------------------------------------------------------------------------

# Sets what GKE calls the accelerator: cloud.google.com/kubernetes-engine/docs/concepts/tpus and …/gpus.
describe_accelerator() {
  local size=${accelerator##*-} chips
  resource=google.com/tpu chips_per_host=4 topology='' label=''
  case $accelerator in
    v5e-16 | v6e-16) topology=4x4 ;;
    v5e-32 | v6e-32) topology=4x8 ;;
    v5e-64 | v6e-64) topology=8x8 ;;
    v5e-128 | v6e-128) topology=8x16 ;;
    v5e-256 | v6e-256) topology=16x16 ;;
    v5p-16) topology=2x2x2 ;;
    v5p-32) topology=2x2x4 ;;
    v5p-64) topology=2x4x4 ;;
    v5p-128) topology=4x4x4 ;;
    v5p-256) topology=4x4x8 ;;
    h100-8 | h100-16) resource=nvidia.com/gpu chips_per_host=8 ;;
    *) usage_error "--accelerator must be v5e-N or v6e-N (N 16 to 256), v5p-N (16 to 256), h100-8 or h100-16; got '$accelerator'" ;;
  esac
  chips=$size
  case $accelerator in
    v5e-*) label=tpu-v5-lite-podslice machine=ct5lp-hightpu-4t ;;
    v6e-*) label=tpu-v6e-slice machine=ct6e-standard-4t ;;
    v5p-*) label=tpu-v5p-slice machine=ct5p-hightpu-4t chips=$((size / 2)) ;;
    h100-*) label=nvidia-h100-80gb machine=a3-highgpu-8g ;;
  esac
  hosts=$((chips / chips_per_host))
  if [[ $resource == nvidia.com/gpu && $slices != 1 ]]; then usage_error "--slices is for TPUs; got $slices"; fi
}

create_pools() {
  local number args=(--cluster="$cluster" --location="$location" --machine-type="$machine" --num-nodes="$hosts")
  if [[ -n $project ]]; then args+=(--project="$project"); fi
  if [[ -n $spot ]]; then args+=(--spot); fi
  if [[ -n $topology ]]; then
    args+=(--tpu-topology="$topology")
  else
    args+=(--accelerator="type=$label,count=8,gpu-driver-version=default")
  fi
  args+=(${pool_args[@]+"${pool_args[@]}"})
  for ((number = 0; number < slices; number++)); do
    run_command gcloud container node-pools create "$name-$number" "${args[@]}"
  done
}

delete_pools() {
  local number args=(--cluster="$cluster" --location="$location" --quiet)
  if [[ -n $project ]]; then args+=(--project="$project"); fi
  for ((number = 0; number < slices; number++)); do
    run_command gcloud container node-pools delete "$name-$number" "${args[@]}"
  done
}

# Dependencies differ by accelerator, so an image is for TPUs or for GPUs.
build_image() {
  local extra=tpu
  if [[ $resource == nvidia.com/gpu ]]; then extra=cuda; fi
  run_command docker build --file "$here/Dockerfile" --build-arg "EXTRAS=$extra,gcs" --tag "$image" "$(dirname "$here")"
  run_command docker push "$image"
}

# ---- JobSet ------------------------------------------------------------------------------------

# Prints its argument as a string of JSON, which is one of YAML.
json() {
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

# On TPUs jax.distributed finds coordinator and ranks in the environment that GKE sets; on GPUs, one process a host,
# it is told: the first pod of a JobSet has this name.
training_command() {
  local line=''
  if ((${#stages[@]})); then line="$(quote python launch/stage.py "${stages[@]}") && "; fi
  line+="exec $(quote env "${envs[@]}" python -m r3rag_jax.train --config "$config" "${overrides[@]}")"
  if [[ $resource == nvidia.com/gpu ]]; then
    line+=" mesh.coordinator=$name-slice-0-0.$name:8476 mesh.num_processes=$hosts"
    line+=" mesh.process_id=\$JOB_COMPLETION_INDEX"
  fi
  printf '%s' "$line"
}

node_selector() {
  local pad='                '
  if [[ -n $topology ]]; then
    printf '%scloud.google.com/gke-tpu-accelerator: %s\n' "$pad" "$label"
    printf '%scloud.google.com/gke-tpu-topology: %s\n' "$pad" "$topology"
  else
    printf '%scloud.google.com/gke-accelerator: %s\n' "$pad" "$label"
  fi
  if [[ -n $spot ]]; then printf '%scloud.google.com/gke-spot: "true"\n' "$pad"; fi
}

# A pod that fails restarts all of them, and each run resumes from the run directory.
jobset() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool # a slice is a node pool
spec:
  failurePolicy:
    maxRestarts: $max_restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0 # any failed pod fails its job, and so restarts the set
          template:
            spec:
              restartPolicy: Never
              serviceAccountName: $service_account
              terminationGracePeriodSeconds: $grace_s
              nodeSelector:
$(node_selector)
              tolerations:
                - key: $resource
                  operator: Exists
                - key: cloud.google.com/gke-spot
                  operator: Exists
              containers:
                - name: train
                  image: $(json "$image")
                  command: ["bash", "-c", $(json "$(training_command)")]
                  resources:
                    limits:
                      $resource: $chips_per_host
                    requests:
                      ephemeral-storage: $scratch # of the node, where the checkout lies
                  volumeMounts:
                    - {name: shared-memory, mountPath: /dev/shm}
              volumes:
                - {name: shared-memory, emptyDir: {medium: Memory}}
YAML
}

kube() { run_command kubectl --namespace="$namespace" "$@"; }

apply() {
  if [[ -n $dry_run ]]; then
    printf "kubectl --namespace=%s apply --filename=- <<'JOBSET'\n%s\nJOBSET\n" "$namespace" "$(jobset)"
  else
    jobset | kubectl --namespace="$namespace" apply --filename=-
  fi
}

# ---- command line ------------------------------------------------------------------------------

name='' accelerator='' slices=1 spot='' cluster='' location='' project='' image='' namespace=default
service_account=default max_restarts=100 grace_s=120 scratch=90Gi config='' run_dir='' follow='' dry_run=''
pool_args=() envs=(PYTHONUNBUFFERED=1) stages=() overrides=(mesh.distributed=true)

check() {
  case $command in
    image) require image accelerator ;;
    nodes) require name cluster location accelerator ;;
    run | resume)
      require name image accelerator config run_dir
      if [[ ! -f $(dirname "$here")/$config ]]; then usage_error "--config must name a file of the checkout; got '$config'"; fi
      if [[ $run_dir != gs://* ]]; then usage_error "--run-dir must be gs://bucket/path; got '$run_dir'"; fi
      ;;
    status | logs | stop) require name ;;
    delete) require name cluster location ;;
    *) usage_error "unknown command '$command'" ;;
  esac
  require_numbers slices max_restarts grace_s
  check_stages ${stages[@]+"${stages[@]}"}
  if [[ -n $accelerator ]]; then describe_accelerator; fi
  if [[ ! $name =~ ^[a-z0-9-]{0,40}$ ]]; then
    usage_error "--name must be small letters, digits and hyphens, at most 40; got '$name'"
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
  overrides+=("run_dir=$run_dir")
  stop_in_time
  case $command in
    image) build_image ;;
    nodes) create_pools ;;
    run) apply ;;
    resume)
      kube delete jobset "$name" --ignore-not-found --wait
      apply
      ;;
    status) kube get jobsets,pods --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide ;;
    logs) kube logs "job/$name-slice-0" --tail=200 ${follow:+--follow} ;;
    stop) kube delete jobset "$name" --wait ;;
    delete)
      kube delete jobset "$name" --ignore-not-found --wait
      delete_pools
      ;;
  esac
}

main "$@"
