"""Where a run begins: at its first step, or behind its newest whole checkpoint, on the same workers or on others."""

import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

import crossover_jax as cj
from experiments import checkpoint, data, processes
from experiments.checkpoint import Damaged
from experiments.program import Program, make_program
from experiments.settings import as_json, completed
from experiments.step import TrainState

MATRICES = {"overlap": cj.overlap_matrix, "average": cj.average_matrix}
FREE = ("dataset.data_dir", "checkpoint.every", "checkpoint.keep", "on_nan", "max_rollbacks")  # change no bit
OF_WORKERS = ("num_workers", "simulate", "inner.fsdp", "inner.tensor")  # what --resume_workers lets change


class Resume(NamedTuple):
    """What may differ from the run that left the checkpoint."""

    matrix: str | None = None  # "overlap" or "average": how another number of workers takes over
    allow: Sequence[str] = ()  # keys of the config


SAME = Resume()


class Start(NamedTuple):
    """A state and where it stands; `best` is the step of the best averaged model so far, and how good it is."""

    state: TrainState
    step: int = 0
    rollbacks: int = 0
    best: tuple[int, float] | None = None
    log: dict[str, Any] | None = None  # `report.Log.state`


def first_or_restored(
    workdir: pathlib.Path,
    config: ml_collections.ConfigDict,
    program: Program,
    train_set: data.Dataset,
    workers: Mesh | int,
    provenance: dict[str, Any],
    resume: Resume,
) -> Start:
    """The newest whole checkpoint of `workdir`, or the first state where there is none; damaged ones are set aside.

    `provenance` is versions and digests, compared with what the checkpoint recorded. All processes must call this.
    Raises `ValueError` for a config that the checkpoint was not made with, and if all are damaged.
    """
    now = as_json(config) | {"data": provenance["data"]}

    def attempt(step: int) -> tuple[dict[str, Any], TrainState]:
        def like(record: dict[str, Any]) -> TrainState:
            check_config(record["config"], now, resume)
            return _like(record, config, program, train_set, workers)

        return read(workdir, step, like)

    def tell(step: int, error: Damaged) -> None:
        processes.say(f"WARNING: the checkpoint of step {step} is damaged: {error}")

    found, damaged = checkpoint.newest_whole(workdir, attempt, tell)
    if found is None:
        if damaged:
            raise ValueError(
                f"`workdir` must hold a whole checkpoint, got {workdir} where all {len(damaged)} are damaged; nothing "
                "was deleted: name another one to begin anew."
            )
        state = cj.copies(program.init, workers, specs=program.specs)
        cj.check_copies(state)
        return Start(state)
    record, state = found
    if damaged:
        _set_aside(workdir, damaged, record["step"])
    if record["num_workers"] == config.num_workers:
        _warn_of_differences(provenance, record["provenance"])
    else:
        assert resume.matrix is not None  # or the config had been refused
        state = _resized(state, record["num_workers"], config, resume.matrix, program, workers)
    return Start(state, record["step"], record["rollbacks"], record["best"] and tuple(record["best"]), record["log"])


def read(
    workdir: pathlib.Path, step: int, like: Callable[[dict[str, Any]], TrainState]
) -> tuple[dict[str, Any], TrainState]:
    """Record and state of one checkpoint, the state where `like` of the record says.

    All processes raise `Damaged` if it is so for one of them.
    """
    record, state, error = {}, None, None
    try:
        record = checkpoint.read_record(workdir, step)
        state = checkpoint.restore(workdir, record, like(record))
    except (Damaged, ValueError) as caught:
        error = caught
    message = processes.failures(error)
    if isinstance(error, ValueError):
        raise error
    if message:
        raise Damaged(message)
    checkpoint.verify(record, state)
    assert state is not None
    return record, state


def _set_aside(workdir: pathlib.Path, damaged: Sequence[int], step: int) -> None:
    if processes.is_first():
        checkpoint.set_aside(workdir, damaged)
    processes.failures(None)  # wait for it
    processes.say(f"going back to step {step}; the damaged are in {workdir / checkpoint.DAMAGED}")


def _warn_of_differences(provenance: dict[str, Any], recorded: dict[str, Any]) -> None:
    for name, value in provenance.items():
        if (was := recorded.get(name)) != value:
            processes.say(f"WARNING: {name} is {value}, the checkpoint was made with {was}: not the same bits")


def check_config(was: dict[str, Any], now: dict[str, Any], resume: Resume) -> None:
    """Raise `ValueError` with the keys that differ and may not.

    >>> check_config({"seed": 0, "on_nan": "stop"}, {"seed": 1, "on_nan": "rollback"}, Resume(allow=["seed"]))
    >>> check_config({"seed": 0}, {"seed": 1}, Resume())
    Traceback (most recent call last):
    ValueError: `workdir` must hold a run of this config, but in its checkpoint seed is 0, not 1: name another one, ...
    """
    was = {key: value for key, value in completed(was).items() if key in now or key in was}
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key) and key not in FREE]
    if "batch_size" in changed:  # steps, schedules and the place in the data count batches
        raise ValueError(
            f"`config.batch_size` must stay {was['batch_size']} in this workdir, got {now['batch_size']}: name another."
        )
    allowed = {*resume.allow, *(OF_WORKERS if resume.matrix else ())}
    if wrong := [key for key in changed if key not in allowed]:
        found = "; ".join(f"{key} is {was.get(key)}, not {now.get(key)}" for key in wrong)
        flags = []
        if "num_workers" in wrong:
            flags.append("--resume_workers=overlap")
        if keys := [key for key in wrong if not (flags and key in OF_WORKERS)]:
            flags.append(f"--allow_config_change={','.join(keys)}")
        raise ValueError(
            f"`workdir` must hold a run of this config, but in its checkpoint {found}: name another one, or pass "
            f"{' and '.join(flags)}."
        )


def _like(
    record: dict[str, Any],
    config: ml_collections.ConfigDict,
    program: Program,
    train_set: data.Dataset,
    workers: Mesh | int,
) -> TrainState:
    """Shapes and places of the checkpoint's state: for other workers theirs, spread over these devices."""
    num_workers = record["num_workers"]
    if num_workers == config.num_workers:
        return cj.abstract_copies(program.shapes, workers, specs=program.specs)
    theirs = config.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.num_workers = num_workers
    shapes = make_program(theirs, train_set, num_workers, 1).shapes
    return checkpoint.spread(cj.abstract_copies(shapes, num_workers), workers)


def _resized(
    state: TrainState,
    num_workers: int,
    config: ml_collections.ConfigDict,
    how: str,
    program: Program,
    workers: Mesh | int,
) -> TrainState:
    processes.say(f"resuming {num_workers} workers on {config.num_workers}: {how}")
    matrix = MATRICES[how](num_workers, config.num_workers)
    target = cj.abstract_copies(program.shapes, workers, specs=program.specs)
    shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(partial(cj.resize, matrix=matrix), out_shardings=shardings)(state)
