"""Run a training job of several processes on this machine, with CPU devices, over Gloo.

    python experiments/launch/local.py --processes 4 --devices-per-process 2 -- --workdir=runs/local --config.steps=20

What follows `--` goes to `train.py`. The exit code is that of the first process that fails, else 0.
"""

import argparse
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

TRAIN = pathlib.Path(__file__).resolve().parents[1] / "train.py"


def main(argv: Sequence[str]) -> int:
    """Start the processes, wait for all; when one fails the others have `--grace` seconds to end by themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices-per-process", type=int, default=4)
    parser.add_argument("--grace", type=float, default=120, help="seconds that the others have once one has failed")
    parser.add_argument("train_flags", nargs="*", metavar="-- train.py's flags")
    args = parser.parse_args(argv)
    port = free_port()
    commands = [command(args.train_flags, port, args.processes, i) for i in range(args.processes)]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(args.devices_per_process),
    }
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    try:
        return wait_for(processes, args.grace)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        for process in processes:
            process.kill()
            process.wait()


def command(train_flags: Sequence[str], port: int, num_processes: int, process_id: int) -> list[str]:
    """The command line of one process."""
    by_hand = [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}", f"--process_id={process_id}"]
    return [sys.executable, str(TRAIN), *train_flags, *by_hand]


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def wait_for(processes: Sequence[subprocess.Popen], grace: float) -> int:
    """The exit code of the first process that fails, else 0; the others are killed `grace` seconds after it."""
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in processes):
        codes = [process.returncode for process in processes if process.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    codes = [process.returncode for process in processes if process.returncode]
    code = failed or next(iter(codes), 0)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
