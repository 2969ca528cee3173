#!/bin/bash
# Cloud TPU: one v5e pod slice of 256 chips on 64 hosts, or several slices joined by the data centre's network (DCN).
#
#   PROJECT=p ZONE=z NAME=n SLICES=2 experiments/launch/tpu_pod.sh create     ask for the slices, once
#   PROJECT=p ZONE=z NAME=n SLICES=2 SHARED=/a/shared/folder REPO=... experiments/launch/tpu_pod.sh run
#   ... tpu_pod.sh log     the newest lines of process 0
#   ... tpu_pod.sh stop    all write a checkpoint and end, with 75
#
# What follows `run` goes to train.py. The algorithm and its keys belong to the config: by fashion_mnist.py
# --config.crossover.during=True hides the messages behind the gradient.
#
# `run` with the same WORKDIR goes on from the last checkpoint, after `stop` or on new slices. Nothing does so by
# itself: who ended with 75 was stopped by hand, or has lost a slice.
#
# JAX finds coordinator and ids from the metadata of the TPU VMs, where a queued resource of several slices also has the
# MEGASCALE_ variables: nothing to set. For slices that were created one by one, export on every host, before `run`,
# MEGASCALE_COORDINATOR_ADDRESS (a host of slice 0), MEGASCALE_NUM_SLICES and MEGASCALE_SLICE_ID.
# REPO with its Python environment (pip install 'jax[tpu]') and SHARED lie on a file system that all hosts mount.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}"
SLICES="${SLICES:-1}"
HOSTS="${HOSTS:-64}"                                        # of each slice: a v5e host has 4 chips
ACCELERATOR="${ACCELERATOR:-v5litepod-256}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}"
WORKERS="${WORKERS:-$SLICES}"                               # or more: hosts, parts of hosts; here a worker is a slice
BATCH_SIZE="${BATCH_SIZE:-$((32 * SLICES * HOSTS * 4))}"    # of all workers; a multiple of all chips

on_all_hosts() {  # at once, or those who came first would wait for the next batch: gcloud's default are 64
  gcloud compute tpus queued-resources ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
    --node=all --worker=all --batch-size="$((SLICES * HOSTS))" --command="$1"
}

case "${1:-}" in
  create)
    nodes=(--node-id="$NAME")
    if [ "$SLICES" -gt 1 ]; then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
    gcloud compute tpus queued-resources create "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" "${nodes[@]}"
    ;;
  run)
    : "${SHARED:?must name a folder that all hosts mount}" "${REPO:?must name the repository on all hosts}"
    PYTHON="${PYTHON:-$REPO/.venv/bin/python}"
    CONFIG="${CONFIG:-$REPO/experiments/configs/fashion_mnist.py}"
    WORKDIR="${WORKDIR:-$SHARED/runs/$NAME-$(date +%Y%m%d-%H%M%S)}"
    command=(
      # No flags: libtpu 0.0.52 overlaps sends with compute as it is (docs/scaling.md). If DCN alone is slow, compare
      # LIBTPU_INIT_ARGS=--megascale_grpc_num_channels=64 (AI-Hypercomputer/torchprime #300).
      env LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-}"
      # Process 0 writes, all read; the default keeps only what took a second to compile.
      JAX_COMPILATION_CACHE_DIR="$SHARED/jax-cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
      "$PYTHON" "$REPO/experiments/train.py"
      --distributed=yes
      --config="$CONFIG"
      --config.num_workers="$WORKERS"
      --config.batch_size="$BATCH_SIZE"
      --config.dataset.data_dir="$SHARED/data"
      --workdir="$WORKDIR"
      --initialization_timeout=600
      "${@:2}"
    )
    on_all_hosts "nohup$(printf ' %q' "${command[@]}") > ~/crossover.out 2>&1 < /dev/null &"
    echo "started; logs of all processes in $WORKDIR/logs"
    ;;
  log)
    gcloud compute tpus queued-resources ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --command='tail -n 50 ~/crossover.out'
    ;;
  stop)
    on_all_hosts "pkill -f experiments/train.py"
    ;;
  *)
    echo "usage: $0 create|run|log|stop" >&2
    exit 2
    ;;
esac
