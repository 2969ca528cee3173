#!/bin/bash
# Open MPI 4 or 5, hosts of several GPUs: one process per GPU, one worker per host.
#
#   SHARED=/a/shared/folder HOSTFILE=hosts GPUS=8 experiments/launch/openmpi.sh     in the repository's folder
#
# HOSTFILE: one host a line. Coordinator and ranks are passed by hand: what JAX finds by itself are Open MPI 4's
# variables only, and in JAX 0.12 those of Open MPI 5 if mpi4py is installed (jax-ml/jax #14576, #40512); and it takes
# the host of mpirun for that of process 0. MPI itself carries nothing: NCCL does.
#
# What follows the command goes to train.py. The algorithm and its keys belong to the config: by fashion_mnist.py
# --config.crossover.during=True hides the messages behind the gradient.
#
# Exit code 75: a process got SIGTERM, so all wrote a checkpoint and ended. The same WORKDIR goes on from there:
#   until WORKDIR=... experiments/launch/openmpi.sh; do [ $? -eq 75 ] || break; done
# SIGTERM must come to a process: mpirun, when it gets one itself, kills them all a second later.
set -euo pipefail

: "${SHARED:?must name a folder that all hosts mount}"
: "${HOSTFILE:?must name a file with one host a line}"
GPUS="${GPUS:-8}"                                           # of each host
PORT="${PORT:-8476}"                                        # any free one of the first host
REPO="${REPO:-$PWD}"
PYTHON="${PYTHON:-$REPO/.venv/bin/python}"
CONFIG="${CONFIG:-$REPO/experiments/configs/fashion_mnist.py}"
WORKDIR="${WORKDIR:-$SHARED/runs/crossover-$(date +%Y%m%d-%H%M%S)}"

mapfile -t hosts < <(awk '!/^#/ && NF {print $1}' "$HOSTFILE")
WORKERS="${WORKERS:-${#hosts[@]}}"                          # gossip between hosts, gradients over NVLink
BATCH_SIZE="${BATCH_SIZE:-$((32 * ${#hosts[@]} * GPUS))}"   # of all workers; a multiple of all GPUs

# Compute between the start and the end of a message: off by default in jaxlib 0.10; 0.12 decides by the kind of GPU.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
# Process 0 writes, all read; the default keeps only what took a second to compile.
export JAX_COMPILATION_CACHE_DIR="$SHARED/jax-cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# Rank i of a host drives its i-th GPU; without JAX_LOCAL_DEVICE_IDS each process would take them all.
# shellcheck disable=SC2016  # expanded by each process
mpirun --hostfile "$HOSTFILE" -np "$((${#hosts[@]} * GPUS))" --map-by "ppr:$GPUS:node" --bind-to none \
  -x XLA_FLAGS -x JAX_COMPILATION_CACHE_DIR -x JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS \
  bash -c '
    set -euo pipefail
    export JAX_LOCAL_DEVICE_IDS="$OMPI_COMM_WORLD_LOCAL_RANK"
    exec "$@" --num_processes="$OMPI_COMM_WORLD_SIZE" --process_id="$OMPI_COMM_WORLD_RANK"
  ' bash "$PYTHON" "$REPO/experiments/train.py" \
  --coordinator="${hosts[0]}:$PORT" \
  --config="$CONFIG" \
  --config.num_workers="$WORKERS" \
  --config.batch_size="$BATCH_SIZE" \
  --config.dataset.data_dir="$SHARED/data" \
  --workdir="$WORKDIR" \
  --initialization_timeout=600 "$@"
