"""What JAX knows of the axis of the workers; every difference between JAX versions is in this room."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

Axis = str | tuple[str, ...]


class Around(NamedTuple):
    """What `per_worker` says to the exchanges in the step that it traces."""

    axes: tuple[str, ...]  # that name the workers
    is_sharded: bool  # the state lies in parts inside its worker


_AROUND: contextvars.ContextVar[Around | None] = contextvars.ContextVar("around", default=None)


@contextlib.contextmanager
def holding(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    """The variable has this value while the context lasts."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def tracing(around: Around) -> contextlib.AbstractContextManager[None]:
    return holding(_AROUND, around)


def around() -> Around:
    """What the `per_worker` around us says; the axis "worker" where there is none."""
    return _AROUND.get() or Around(("worker",), False)


def axis_or_default(axis: Any) -> str:
    """The axis along which to exchange: `axis`, or the one that names the workers; of two the one called "worker"."""
    if axis is None and ("worker" in around().axes or len(around().axes) == 1):
        return "worker" if "worker" in around().axes else around().axes[0]
    if not isinstance(axis, str):
        raise ValueError(
            f"`axis` must be one name, got {axis!r}: exchange along one of {around().axes}, then along the other "
            "(`chain`)."
        )
    return axis


def check_axis(axis: str, num_workers: int | None = None) -> None:
    """Raise `ValueError` if nothing binds the axis, or if it has another number of workers."""
    try:
        size = lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"axis {axis!r} is not bound: call the step through `per_worker`, or inside `jax.shard_map` or "
            f"`jax.vmap(..., axis_name={axis!r})`."
        ) from None
    if num_workers is not None and size != num_workers:
        raise ValueError(f"`pool` is for {num_workers} workers, but axis {axis!r} has {size}.")


def is_simulated(axis: str) -> bool:
    """Whether one device holds all workers along `axis`, by `vmap`, inside any transformation; else it is a mesh's."""
    return axis not in jax.sharding.get_abstract_mesh().manual_axes


def vary(x: jax.Array, axis: str) -> jax.Array:
    """Give a value the type of one that varies over `axis`, where `shard_map` checks such types (`check_vma=True`)."""
    if checks_types(axis) and axis not in _varying(x):
        return lax.pcast(x, axis, to="varying")
    return x


def checks_types(axis: str) -> bool:
    """Whether the `shard_map` around us knows which values differ between workers; that of `per_worker` does not."""
    return axis in _varying(lax.axis_index(axis))


def _varying(x: Any) -> frozenset[str]:
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # `vma` until JAX 0.10.1


def highest(count: jax.Array) -> jax.Array:
    """The highest count of any worker, the same on all of them; `count` itself where no axis of workers is bound."""
    for name in filter(_is_bound, around().axes):
        count = lax.pmax(count, name)
    return count


def _is_bound(axis: str) -> bool:
    try:
        return lax.axis_size(axis) > 0
    except NameError:
        return False


def scan_arguments(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's arguments it only reads, and how many behind them it carries on."""
    if "num_carry" in params:  # until JAX 0.10
        return params["num_consts"], params["num_carry"]
    read, carried, _ = params["ft_in"].unpack()
    return len(read), len(carried)


@jax.jit
def _same_on_all_workers(step: jax.Array) -> jax.Array:
    return step


SAME = "_same_on_all_workers"  # its name in a traced program, where `guard` looks for it


def same_on_all_workers(step: Any, axis: str) -> Any:
    """The step, with a mark in the traced program: `guard` refuses what differs between workers here.

    Workers that disagree about the round would write segments over one another, or wait for each other for ever.
    Raises `ValueError` where the types say already that it differs.
    """
    if isinstance(step, int | np.integer):
        return step
    if differs := _varying(step):
        raise ValueError(message_of_step(differs))
    return _same_on_all_workers(step)


def message_of_step(axes: frozenset[str]) -> str:
    return (
        f"`step` must be the same on all workers, but it varies over axis {', '.join(sorted(axes))!r}: pass one "
        "replicated step (`per_worker(..., replicated=...)`), not a counter of the worker's own state."
    )
