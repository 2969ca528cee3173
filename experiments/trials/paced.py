"""Processes of one job on this machine whose steps have a timed wait: stand-ins for accelerators of different speed.

    python -m experiments.trials.paced --pace_ms 60 --slow_ms 300 -- --processes=5 --devices-per-process=1 -- \\
        --workdir=runs/paced --config.num_workers=5

Behind the first `--` stand the flags of `launch/local.py`, behind the second those of `train.py`. A step of every
process takes at least `--pace_ms`, of the last one `--slow_ms`. The exchange is a part of the step, so a process that
has waited for its peers waits so much less.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

if not __package__:  # as a script, which the launcher starts
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import jax
from absl import app

from experiments import flags, train
from experiments.launch import local

PACES = "PACED_TRAINING_MS"  # set for the processes: of all, and of the last one


def main(argv: Sequence[str]) -> int:
    """Launch the processes; the exit code of the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pace_ms", type=float, required=True)
    parser.add_argument("--slow_ms", type=float, required=True)
    parser.add_argument("launcher", nargs=argparse.REMAINDER, metavar="-- local.py's flags -- train.py's flags")
    args = parser.parse_args(argv)
    os.environ[PACES] = f"{args.pace_ms} {args.slow_ms}"
    local.TRAIN = pathlib.Path(__file__).resolve()
    return local.main(args.launcher[1:])


def slow_down(pace_ms: float, slow_ms: float) -> None:
    """Have `train.run` wait in each step."""
    run: Callable[..., Any] = train.run

    def hooked(job: train.Job, *args: Any, **keys: Any) -> Any:
        is_last = jax.process_index() == jax.process_count() - 1
        return run(job._replace(step=paced(job.step, (slow_ms if is_last else pace_ms) / 1e3)), *args, **keys)

    train.run = hooked


def paced(step: Callable, seconds: float) -> Callable:
    """A step that takes at least so long."""

    def waiting(*args: Any) -> Any:
        began = time.perf_counter()
        found = jax.block_until_ready(step(*args))
        time.sleep(max(0.0, seconds - (time.perf_counter() - began)))
        return found

    return waiting


if __name__ == "__main__":
    if PACES in os.environ:
        slow_down(*map(float, os.environ[PACES].split()))
        app.run(train.main, flags_parser=flags.parse_flags)
    sys.exit(main(sys.argv[1:]))
