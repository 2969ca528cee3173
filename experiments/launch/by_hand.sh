#!/bin/bash
# Hosts that nothing but ssh connects: one process per host, which drives all its GPUs; one worker per host.
#
#   SHARED=/a/shared/folder HOSTS="first second" experiments/launch/by_hand.sh     in the repository's folder
#
# Repository, Python environment and SHARED lie at the same paths on all hosts. The first host must be reached by the
# others at PORT, and all by all at the ports that NCCL chooses.
#
# What follows the command goes to train.py. The algorithm and its keys belong to the config: by fashion_mnist.py
# --config.crossover.during=True hides the messages behind the gradient.
#
# Exit code 75: a process got SIGTERM (ssh second pkill -f experiments/train.py), so all wrote a checkpoint and ended.
# The same WORKDIR goes on from there:
#   until WORKDIR=... experiments/launch/by_hand.sh; do [ $? -eq 75 ] || break; done
set -euo pipefail

: "${SHARED:?must name a folder that all hosts mount}"
: "${HOSTS:?must name the hosts, separated by spaces}"
PORT="${PORT:-8476}"                                        # any free one of the first host
GPUS="${GPUS:-8}"                                           # of each host
REPO="${REPO:-$PWD}"
PYTHON="${PYTHON:-$REPO/.venv/bin/python}"
CONFIG="${CONFIG:-$REPO/experiments/configs/fashion_mnist.py}"
WORKDIR="${WORKDIR:-$SHARED/runs/crossover-$(date +%Y%m%d-%H%M%S)}"

read -ra hosts <<< "$HOSTS"
WORKERS="${WORKERS:-${#hosts[@]}}"                          # gossip between hosts, gradients over NVLink
BATCH_SIZE="${BATCH_SIZE:-$((32 * ${#hosts[@]} * GPUS))}"   # of all workers; a multiple of all GPUs

command=(
  # Compute between the start and the end of a message: off by default in jaxlib 0.10; 0.12 decides by the kind of GPU.
  env XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
  # Process 0 writes, all read; the default keeps only what took a second to compile.
  JAX_COMPILATION_CACHE_DIR="$SHARED/jax-cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
  "$PYTHON" "$REPO/experiments/train.py"
  --coordinator="${hosts[0]}:$PORT"
  --num_processes="${#hosts[@]}"
  --config="$CONFIG"
  --config.num_workers="$WORKERS"
  --config.batch_size="$BATCH_SIZE"
  --config.dataset.data_dir="$SHARED/data"
  --workdir="$WORKDIR"
  --initialization_timeout=600
  "$@"
)

trap 'kill $(jobs -p) 2> /dev/null || true' EXIT  # -tt: who loses its terminal ends, so Ctrl-C ends all
for i in "${!hosts[@]}"; do
  # shellcheck disable=SC2029  # expanded here
  ssh -tt "${hosts[$i]}" "$(printf '%q ' "${command[@]}" "--process_id=$i")" < /dev/null &
done
code=0
for _ in "${hosts[@]}"; do
  wait -n || code=$((code ? code : $?))
  # The first to fail ends this script, and with it all; but who ends with 75 is followed by all, if they are let.
  [ "$code" -eq 0 ] || [ "$code" -eq 75 ] || break
done
exit "$code"
