"""From a config of many workers to one island of that many: its step, data, schedule and exchange."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

import crossover_jax as cj
from experiments import data
from experiments.algorithms import CUTS, ROWS
from experiments.evaluate import make_evaluate
from experiments.optimizers import make_schedule
from experiments.program import Program, make_program, steps_of, train_batches
from experiments.settings import as_json, check_settings
from experiments.step import TrainState

PyTree = Any


class IslandProgram(NamedTuple):
    """What all islands of a run have in common. Their clock counts examples, and the schedule follows it."""

    config: ml_collections.ConfigDict  # as given, `num_workers` of it the number of islands that is expected
    program: Program  # of one worker
    init: Callable[[], TrainState]  # a state `[1, ...]`
    step: Callable[[TrainState, PyTree, int, float], tuple[TrainState, PyTree]]  # (state, batch, own step, rate)
    rate: Callable[[float], float]  # the learning rate at a clock
    batches: Callable[[str, float], Iterator[PyTree]]  # of a life of an island that begins at a clock
    evaluate: Callable[[int, TrainState], dict[str, float]]
    examples: int  # of a step of one island
    total: int  # examples of all islands together, at which the run ends
    exchange: dict[str, Any]  # `cut`, `wire`, `every` and `rounds`
    record: dict[str, Any]  # for checkpoints: the config of one island alone, and the digest of the data


def make_island_program(config: ml_collections.ConfigDict, workers: Mesh | int = 1) -> IslandProgram:
    """The program of one island, one of `config.num_workers` that share `config.batch_size`.

    Inside, `workers` is a mesh of one worker, or 1. Its exchange has segments, wire and `local_steps` of
    `config.crossover`. Raises `ValueError` for settings that do not fit together, and `data.DataMissing`.
    """
    check_settings(config)
    if config.algorithm != "crossover":
        raise ValueError(f"`config.algorithm` must be 'crossover' for islands, got {config.algorithm!r}.")
    own = config.crossover
    train_set, eval_set = (
        data.load(config.dataset.name, split, data_dir=config.dataset.data_dir, sequence=config.dataset.sequence)
        for split in (config.dataset.train_split, config.dataset.eval_split)
    )
    num_steps = steps_of(config, train_set)
    schedule = make_schedule(config.schedule, num_steps, config.schedule.learning_rate)

    alone = config.copy_and_resolve_references()
    with alone.unlocked():
        alone.algorithm = "alone"
        alone.batch_size = config.batch_size // config.num_workers
        # The rate comes from outside, for it follows the run's clock and not this island's own steps.
        alone.schedule.warmup, alone.schedule.decay, alone.schedule.polynomial.end = 0.0, "polynomial", 1.0

    def programmed(rate: jax.Array | None = None) -> Program:
        return make_program(alone, train_set, workers, num_steps, learning_rate=rate)

    program = programmed()
    compiled = jax.jit(lambda state, batch, step, rate: programmed(rate).step(state, batch, step), donate_argnums=0)

    def step(state: TrainState, batch: PyTree, own_step: int, rate: float) -> tuple[TrainState, PyTree]:
        return compiled(state, program.place_batch([batch]), program.place_step(own_step), np.float32(rate))

    def batches(life: str, clock: float) -> Iterator[PyTree]:
        own = part_of(life.rpartition("@")[0], config.num_workers)
        if own is not None:  # as this worker of a mesh, so that islands do not train on each other's examples
            part = slice(own, own + 1), program.batch_part((1, alone.batch_size))[1]
            return train_batches(config, train_set, lambda _: part, int(clock / config.batch_size))
        one = alone.copy_and_resolve_references()
        with one.unlocked():
            one.num_workers = 1
            one.seed = int(np.random.SeedSequence([config.seed, *life.encode()]).generate_state(1)[0] >> 1)
        return train_batches(one, train_set, program.batch_part)

    evaluated = make_evaluate(program.predict, program.algorithm, workers, program.specs, each=False)

    def evaluate(own_step: int, state: TrainState) -> dict[str, float]:
        row = evaluated(own_step, state, data.eval_batches(eval_set, batch_size=config.eval_batch_size))
        if config.dataset.name == "text":
            row["bits_per_byte"] = row["eval/mean/loss"] / np.log(2)
        return row

    return IslandProgram(
        config,
        program,
        lambda: cj.copies(program.init, workers, specs=program.specs),
        step,
        lambda clock: np.asarray(schedule(jnp.int32(min(clock / config.batch_size, num_steps)))).item(),
        batches,
        evaluate,
        alone.batch_size,
        num_steps * config.batch_size,
        {"cut": CUTS[own.cut](own.segments or ROWS), "wire": own.wire, "every": own.local_steps, "rounds": own.rounds},
        as_json(alone) | {"data": ", ".join(dataset.digest for dataset in (train_set, eval_set))},
    )


def part_of(name: str, count: int) -> int | None:
    """Which of so many parts of each batch an island of this name trains on; None if the name does not say.

    >>> [part_of(name, 8) for name in ("island-3", "c", "spot-12", "mars")]
    [3, 2, None, None]
    """
    digits = re.search(r"[0-9]+$", name)
    own = int(digits[0]) if digits else ord(name) - ord("a") if re.fullmatch("[a-z]", name) else count
    return own if own < count else None
