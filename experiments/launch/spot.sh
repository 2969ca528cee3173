#!/bin/bash
# A spot machine as one island: started again when it was killed, and at the next boot; it ends when the run does.
#
#   ROSTER=/a/shared/roster KEYS=/etc/island NAME=spot-1 ADDRESS=10.0.3.7:7000 experiments/launch/spot.sh
#
# in the repository's folder, on each machine, with names and addresses of their own. ROSTER is a folder that all
# machines mount, or the list that all have alike, spot-1=10.0.3.7:7000,spot-2=...; with a list one island needs
# --found=True on the first day. KEYS needs ca.crt, NAME.crt and NAME.key, which `python -m crossover_jax islands keys`
# makes for any names beforehand. WORKDIR is the machine's own disk: who comes back without one takes a peer's state.
#
# What follows the command goes to island.py: --advertise=HOST:PORT where others reach this machine at another address.
#
# SIGTERM is the notice: the island writes a checkpoint, this script ends with 75, and nothing is started again. Clouds
# give 30 to 120 s, and systemd then ends services by SIGTERM. At every boot, by a unit:
#
#   [Unit]
#   After=network-online.target remote-fs.target
#   [Service]
#   WorkingDirectory=/opt/crossover
#   EnvironmentFile=/etc/island/environment
#   ExecStart=/opt/crossover/experiments/launch/spot.sh
#   KillMode=mixed
#   TimeoutStopSec=25
#   [Install]
#   WantedBy=multi-user.target
set -euo pipefail

: "${ROSTER:?must name the folder or the list by which islands find each other}"
: "${KEYS:?must name the folder of this island\'s keys}"
: "${NAME:?must name this island}"
: "${ADDRESS:?must be the host:port of this machine at which the others reach it}"
REPO="${REPO:-$PWD}"
PYTHON="${PYTHON:-$REPO/.venv/bin/python}"
CONFIG="${CONFIG:-$REPO/experiments/configs/fashion_mnist.py}"
WORKDIR="${WORKDIR:-$REPO/runs/$NAME}"
ISLANDS="${ISLANDS:-8}"                           # that are expected
BATCH_SIZE="${BATCH_SIZE:-$((256 * ISLANDS))}"    # of all islands together
PAUSE="${PAUSE:-5}"                               # seconds before it is started again

# The default keeps only what took a second to compile; an island that comes back compiles nothing.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$REPO/runs/jax-cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

told="" island=""
trap 'told=yes; [ -z "$island" ] || kill -TERM "$island" 2> /dev/null || true' TERM INT
while [ -z "$told" ]; do
  "$PYTHON" "$REPO/experiments/island.py" \
    --roster="$ROSTER" \
    --name="$NAME" \
    --workdir="$WORKDIR" \
    --bind="$ADDRESS" \
    --keys="$KEYS" \
    --config="$CONFIG" \
    --config.num_workers="$ISLANDS" \
    --config.batch_size="$BATCH_SIZE" "$@" &
  island=$!
  [ -z "$told" ] || kill -TERM "$island"
  code=0
  wait "$island" || code=$?
  # A signal that this shell takes ends its `wait`, not the island.
  while kill -0 "$island" 2> /dev/null; do code=0; wait "$island" || code=$?; done
  island=""
  # 75 and, of who was killed, 128 and more; any other error would come again.
  if [ -n "$told" ] || { [ "$code" -ne 75 ] && [ "$code" -lt 128 ]; }; then exit "$code"; fi
  echo "spot.sh: island $NAME ended with $code, and is started again" >&2
  sleep "$PAUSE"
done
exit 75
