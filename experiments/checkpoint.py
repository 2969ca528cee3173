"""Checkpoints of a run: its state and its place in one, whole or not at all.

    workdir/checkpoints/<step>/state    every worker's parameters, model state and optimizer, by orbax
    workdir/checkpoints/<step>/record   JSON: step, examples, config, versions, log, and the checksums of every leaf

A folder gets its name when all of it is written, so an interrupted save leaves none. What was written is not believed
either: a checkpoint is restored only if every leaf of every worker has the checksum that it had on the devices.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax.leaves import flatten
from experiments import processes
from experiments.checksums import inspect
from experiments.step import Diverged

PyTree = Any
T = TypeVar("T")
FOLDER = "checkpoints"
DAMAGED = "damaged"
FORMAT = 2  # 1: before the config had a group of keys for each algorithm
SMALL = 2**22  # bytes of a leaf, all workers together


@functools.cache
def _quieten() -> None:
    """Of one failed write or read orbax and its threads tell ten pages; `NotSaved` and `Damaged` are their sum."""
    absl.logging.get_absl_handler().addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    for name in ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    before = sys.unraisablehook

    def hook(unraisable):
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine: another read or write, given up
        is_orbax = code is not None and f"{os.sep}orbax{os.sep}" in code.co_filename
        if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


class Damaged(Exception):
    """A checkpoint is not what was saved."""


class NotSaved(Exception):
    """A run that went on would leave nothing behind."""


class _LastAndBest(NamedTuple):
    """Which checkpoints orbax keeps: the last `keep`, and the one with the best averaged model."""

    keep: int
    best: list[int]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        last = len(checkpoints) - self.keep
        return [i >= last or checkpoint.step in self.best for i, checkpoint in enumerate(checkpoints)]


class Checkpoints:
    """Saves in the background; all processes call every method. `keep` counts the last ones, the best is kept too."""

    def __init__(self, workdir: pathlib.Path, keep: int, best: int | None = None):
        _quieten()
        self._folder, self._best = workdir / FOLDER, [] if best is None else [best]
        self.last = max(steps(workdir), default=None)  # the last that is known to be whole
        self._saving: tuple[int, bool] | None = None  # step, and whether it is the best
        self._begun: Future = Future()
        self._thread = ThreadPoolExecutor(1)
        self._whole = True
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LastAndBest(keep, self._best),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # damage to an old one must not end the run
        )
        try:
            self._folder.mkdir(
                parents=True, exist_ok=True
            )  # orbax would do so in a thread, and tell pages of a failure
        except OSError as error:
            raise NotSaved(f"{self._folder} must be a folder that can be written: {error.strerror}.") from None
        self._manager = ocp.CheckpointManager(self._folder.absolute(), options=options)

    def save(self, step: int, state: PyTree, record: dict[str, Any], *, is_best: bool = False) -> None:
        """Begin to save the state after `step`; it waits for the save before it, and returns once it has a copy.

        What cannot be written is said, and the run goes on; where there is no other checkpoint, this, the next call or
        `wait` raises `NotSaved`. A state that is not finite is not saved: they raise `Diverged`.
        """
        self._wait()

        def begin(state: PyTree, inspected: tuple[jax.Array, ...]) -> None:
            with jax.transfer_guard("allow"):  # to the host, which is asked for
                whole = {**record, "format": FORMAT, "step": step, **_described_leaves(step, state, inspected)}
                whole["digest"] = _digest(whole)
                item = ocp.args.Composite(state=ocp.args.PyTreeSave(_gathered(state)), record=ocp.args.JsonSave(whole))
                self._manager.save(step, args=item, force=True)

        self._saving, inspected = (step, is_best), inspect(state)
        # The loop donates the state to the next step: it goes on at once if who writes has a copy on the devices, else
        # when orbax has its own, on the host.
        is_copied = jax.process_count() == 1 and all(leaf.nbytes < SMALL for leaf in jax.tree.leaves(state))
        self._begun = self._thread.submit(begin, _copied(state) if is_copied else state, inspected)
        if not is_copied and self._begun.exception():
            self._wait()

    def wait(self) -> bool:
        """Wait until all is written; whether the last save was."""
        self._wait()
        return self._whole

    def close(self) -> None:
        with contextlib.suppress(Diverged, NotSaved):  # of a run that ends by another error; else `wait` has raised it
            self._wait()
        self._thread.shutdown()
        # Of a save that failed all is said; orbax' threads may still stumble over what was cleared away behind it.
        with contextlib.nullcontext() if self._whole else contextlib.suppress(OSError):
            self._manager.close()

    def _wait(self) -> None:
        if self._saving is None:
            return
        (step, is_best), self._saving = self._saving, None
        try:
            self._begun.result()
            self._manager.wait_until_finished()
        except Diverged:
            raise
        except Exception as error:  # of a full disk, tensorstore and orbax raise what they like
            self._failed(step, error)
            return
        self.last, self._whole = step, True
        if is_best:  # not before: the one that was the best stays until this one is there
            self._best[:] = [step]

    def _failed(self, step: int, error: Exception) -> None:
        self._whole = False
        if processes.is_first():
            for unfinished in self._folder.glob(f"{step}.*"):
                shutil.rmtree(unfinished, ignore_errors=True)  # it holds the disk
        reason = (str(error).splitlines() or [type(error).__name__])[0].rsplit(": ", 1)[-1]
        if self.last is None:
            raise NotSaved(
                f"the first checkpoint, of step {step}, could not be saved, so the run does not go on: {reason}; make "
                "room, or name another `workdir`."
            )
        kept = f"the last whole one is of step {self.last}"
        processes.say(f"WARNING: the checkpoint of step {step} could not be saved, the run goes on; {kept}: {reason}")


def steps(workdir: pathlib.Path) -> list[int]:
    """The steps of which there are checkpoints, damaged or not; an unfinished one has another name."""
    folder = workdir / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def newest_whole(
    workdir: pathlib.Path, attempt: Callable[[int], T], tell: Callable[[int, Damaged], None]
) -> tuple[T | None, list[int]]:
    """What `attempt` makes of the newest step for which it does not raise `Damaged`, and the steps for which it does.

    None if there is no such step; `tell` hears of each damage.
    """
    damaged: list[int] = []
    for step in reversed(steps(workdir)):
        try:
            return attempt(step), damaged
        except Damaged as error:
            tell(step, error)
            damaged.append(step)
    return None, damaged


def read_record(workdir: pathlib.Path, step: int) -> dict[str, Any]:
    """What was saved beside the state. Raises `Damaged`."""
    path = workdir / FOLDER / str(step) / "record" / "metadata"
    try:
        record = json.loads(path.read_text())
        found, told = _digest({k: v for k, v in record.items() if k != "digest"}), record["digest"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"its record cannot be read: {type(error).__name__}: {error}") from None
    if found != told or record["step"] != step:
        raise Damaged("its record is not as it was written")
    if record["format"] != FORMAT:
        raise ValueError(
            f"the checkpoint of step {step} must have format {FORMAT}, got {record['format']}, of another version of "
            "this code: go on with that one, or name another `workdir`."
        )
    return record


def restore(workdir: pathlib.Path, record: dict[str, Any], like: PyTree) -> PyTree:
    """The state of that record, each array where its ShapeDtypeStruct in `like` says.

    Nothing here waits for another process. Raises `Damaged`, naming a leaf and worker that are not what was saved, and
    `ValueError` if `like` has other leaves than the checkpoint.
    """
    names, leaves, _ = flatten(like)
    wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in zip(names, leaves, strict=True)}
    saved = {name: leaf["array"] for name, leaf in record["leaves"].items()}
    if wrong := [name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]:
        name = wrong[0]
        raise ValueError(
            f"the checkpoint of step {record['step']} must have the leaves of this config's state, but {len(wrong)} "
            f"differ: {name} is {_described(saved.get(name))} there and {_described(wanted.get(name))} here."
        )
    path = workdir / FOLDER / str(record["step"]) / "state"
    _quieten()
    args = ocp.args.PyTreeRestore(like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
    handler = ocp.PyTreeCheckpointHandler()
    try:
        with jax.transfer_guard("allow"):
            return handler.restore(epath.Path(path.absolute()), args=args)
    except Exception as error:  # tensorstore's, orbax's, the file system's: whatever is in the way, it is not whole
        lines = str(error).splitlines() or [""]
        raise Damaged(
            f"it cannot be read: {type(error).__name__}: {lines[0].split(' See full TensorStore')[0][:300]}"
        ) from None
    finally:
        handler.close()


def verify(record: dict[str, Any], state: PyTree) -> None:
    """Compare the checksums of all leaves on all processes' devices. Raises `Damaged`, naming leaf and worker."""
    of_leaves, of_workers, _ = processes.fetch(inspect(state))
    told = np.array([leaf["sums"] for leaf in record["leaves"].values()], np.uint32)
    if leaves := np.flatnonzero((of_leaves != told).any(-1)).tolist():
        workers = np.flatnonzero((of_workers != np.array(record["workers"], np.uint32)).any(-1)).tolist()
        raise Damaged(
            f"{list(record['leaves'])[leaves[0]]} is not as it was saved ({len(leaves)} of {len(told)} leaves, of "
            f"{len(workers)} of {len(of_workers)} workers)"
        )


def set_aside(workdir: pathlib.Path, damaged: Sequence[int]) -> None:
    """Move checkpoints out of the way of those to come; nothing is deleted."""
    for step in damaged:
        for i in range(1000):
            target = workdir / DAMAGED / (f"{step}.{i}" if i else str(step))
            if not target.exists():
                target.parent.mkdir(exist_ok=True)
                (workdir / FOLDER / str(step)).rename(target)
                break


def spread(states: PyTree, workers: Mesh | int) -> PyTree:
    """The shapes `[workers, ...]` of another number of workers, each device with some elements of all of them.

    So they are resized where they lie, in the memory that one state takes; only leaves whose dimensions the number of
    devices does not divide lie whole on every device.
    """
    if isinstance(workers, int):
        return states

    def place(x):
        axes = [None] * x.ndim
        if fits := [d for d in range(1, x.ndim) if x.shape[d] and x.shape[d] % workers.size == 0]:
            axes[fits[0]] = workers.axis_names
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(workers, P(*axes)))

    return jax.tree.map(place, states)


def _gathered(state: PyTree) -> PyTree:
    """Small leaves as numpy arrays: in pieces, one for each device, each piece would cost a write of its own.

    They are copies: on a CPU a view would show what the next step writes into the donated state.
    """
    if jax.process_count() > 1:
        return state
    small = [leaf for leaf in jax.tree.leaves(state) if leaf.nbytes < SMALL]
    copies = map(np.array, jax.device_get(small))
    return jax.tree.map(lambda x: next(copies) if x.nbytes < SMALL else x, state)


@jax.jit
def _copied(state: PyTree) -> PyTree:
    return jax.tree.map(jnp.copy, state)


def _described_leaves(step: int, state: PyTree, inspected: tuple[jax.Array, ...]) -> dict[str, Any]:
    """Shape, dtype and checksum of every leaf by name, and the checksums of every worker. Raises `Diverged`."""
    names, leaves, _ = flatten(state)
    of_leaves, of_workers, finite = processes.fetch(inspected)
    for name, workers in zip(names, finite, strict=True):
        if not workers.all():
            bad = np.flatnonzero(~workers)
            raise Diverged(
                f"{name} of worker {bad[0]} is not finite after step {step} ({bad.size} of {workers.size} workers): "
                "lower `config.schedule.learning_rate`, or look at the data."
            )
    found = {
        name: {"array": [list(leaf.shape), str(leaf.dtype)], "sums": sums.tolist()}
        for name, leaf, sums in zip(names, leaves, of_leaves, strict=True)
    }
    return {"leaves": found, "workers": of_workers.tolist()}


def _digest(record: dict[str, Any]) -> str:
    return processes.digest(json.dumps(record, sort_keys=True).encode())


def _described(array: list | None) -> str:
    return "absent" if array is None else f"{array[1]}{array[0]}"
