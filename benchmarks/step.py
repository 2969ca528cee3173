"""What a training step takes by each algorithm, beside the same step with communication off, and what it holds.

    python -m benchmarks.step --workers 64 --model resnet20
    python -m benchmarks.step --workers 64 --model mlp --options "{'hidden': (256,)}"
    python -m benchmarks.step --workers 8 --devices 8

Workers are simulated on one device or, with `--devices`, on virtual devices of this CPU. The steps are those of
`train.py`, on random images. Steps of all algorithms alternate; a ratio is to the step without communication of the
same turn, and the figures are medians. "Beside the state" is what the compiled program holds at once besides the
workers' parameters, optimizer and batch.
"""

import argparse
import ast
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import crossover_jax as cj
from crossover_jax.text import as_table
from experiments import data, program
from experiments.configs import fashion_mnist
from experiments.settings import check_settings

OFF = "communication off"
ARMS: dict[str, dict[str, Any]] = {
    OFF: {"algorithm": "alone"},
    "allreduce": {"algorithm": "allreduce"},
    "d_psgd": {"algorithm": "d_psgd"},
    "sgp": {"algorithm": "sgp"},
    "crossover": {},
    "crossover, during": {"crossover.during": True},
    "crossover by rows": {"crossover.cut": "rows", "crossover.in_flight": 1},
    "crossover in bfloat16": {"crossover.wire": "bfloat16"},
    "crossover in int8": {"crossover.wire": "int8"},
    "three rounds in int8": {"crossover.wire": "int8", "crossover.rounds": 3},
    "crossover_phases": {"algorithm": "crossover_phases"},
    "crossover_paper": {"algorithm": "crossover_paper"},
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--devices", type=int, default=1, help="1: all workers are simulated on one")
    parser.add_argument("--examples", type=int, default=32, help="per worker")
    parser.add_argument("--dataset", default="fashion_mnist", help="whose shapes the images have")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--options", type=ast.literal_eval, default={}, help="of the model, as a Python dict")
    parser.add_argument("--arms", help=f"separated by ;, default all: {'; '.join(ARMS)}")
    parser.add_argument("--steps", type=int, default=10, help="of each")
    args = parser.parse_args(argv)
    names = args.arms.split(";") if args.arms else list(ARMS)
    if unknown := [name for name in names if name not in ARMS]:
        parser.error(f"--arms must be among {'; '.join(ARMS)}, got {'; '.join(unknown)}")
    if args.devices > 1:
        jax.config.update("jax_num_cpu_devices", args.devices)
    try:
        print(as_table(("", "ms", "ratio", "from", "to", "beside the state"), measure(names, args)))
    except ValueError as error:
        sys.exit(f"error: {error}")


def measure(names: Sequence[str], args: argparse.Namespace) -> list[tuple[str, ...]]:
    """A line for each arm."""
    names = list(dict.fromkeys([OFF, *names]))
    runs = [prepare(name, args) for name in names]
    seconds: list[list[float]] = [[] for _ in names]
    for t in range(args.steps + 1):  # the first is to warm up
        for own, run in zip(seconds, runs, strict=True):
            own.append(run.step(t))
    seconds = [own[1:] for own in seconds]
    lines = []
    for name, own, run in zip(names, seconds, runs, strict=True):
        ratios = [a / b for a, b in zip(own, seconds[0], strict=True)]
        times = (f"{1e3 * statistics.median(own):.1f}", f"{statistics.median(ratios):.3f}")
        lines.append((name, *times, f"{min(ratios):.2f}", f"{max(ratios):.2f}", f"{run.temporary / 1e6:.0f} MB"))
    return lines


class Run:
    """A compiled step with its state and its batch in place."""

    def __init__(self, setup: program.Program, where: Any, batch: Any):
        self._batch, self._place = setup.place_batch([batch]), setup.place_step
        self._state = cj.copies(setup.init, where, specs=setup.specs)
        self._step = setup.step.lower(self._state, self._batch, self._place(0)).compile()
        memory = self._step.memory_analysis()
        assert memory is not None
        self.temporary = memory.temp_size_in_bytes

    def step(self, t: int) -> float:
        """Seconds of step `t`."""
        step = self._place(t)
        began = time.perf_counter()
        self._state, _ = jax.block_until_ready(self._step(self._state, self._batch, step))
        return time.perf_counter() - began


def prepare(name: str, args: argparse.Namespace) -> Run:
    config = fashion_mnist.get_config()
    config.num_workers, config.batch_size = args.workers, args.workers * args.examples
    config.eval_batch_size = config.batch_size
    config.dataset.name = args.dataset
    config.model.name = args.model
    config.model.options = type(config.model.options)(args.options)
    config.update_from_flattened_dict(ARMS[name])
    check_settings(config)
    dataset = data.describe(args.dataset)
    where = program.place_workers(config, jax.devices()[: args.devices])
    setup = program.make_program(config, dataset, where, num_steps=1000)
    return Run(setup, where, make_images(dataset, args.workers, args.examples))


@functools.cache
def make_images(dataset: data.Dataset, workers: int, examples: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(workers, examples, *dataset.image_shape), dtype=np.uint8)
    return {"image": image, "label": rng.integers(dataset.num_classes, size=(workers, examples), dtype=np.int32)}


if __name__ == "__main__":
    main(sys.argv[1:])
