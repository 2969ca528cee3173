"""From the step of one worker to all workers: on a mesh, or simulated on one device."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax.cuts import flatten, travels, widened

PyTree = Any
Axis = str | tuple[str, ...]


def per_worker(
    step: Callable[..., PyTree],
    where: Mesh | int | tuple[int, ...],
    replicated: Sequence[int] = (),
    *,
    out_specs: PyTree = None,
    donate: bool = True,
    axis: Axis = "worker",
) -> jax.stages.Wrapped:
    """All workers' step, compiled, from the step of one worker, which sees values without a leading axis.

    `where` is a mesh (each worker is a slice of it; axes other than `axis` stay automatic) or the number of workers to
    simulate on one device. Arguments and results have a leading axis of workers, except the arguments whose positions
    are in `replicated`. The first argument, the state, is donated: use what is returned, or pass `donate=False`.
    Where the state is sharded inside its worker, `out_specs` repeats that for what is returned: PartitionSpecs over the
    inner axes (None: not sharded), a prefix of the result, `(state_specs, None)`.

    Workers may be named by two axes, for gossip on two levels: `axis=("worker", "fast")` on a mesh that has both, or
    with `where=(4, 8)` simulated; the leading axis of everything stays one, over all 32 of them.

    Raises `ValueError` while tracing if a leaf lacks the leading axis of workers, or if the mesh lacks `axis`.

    >>> total = per_worker(lambda x: jax.lax.psum(x, "worker"), 4)
    >>> total(jnp.arange(4.0)).tolist()
    [6.0, 6.0, 6.0, 6.0]
    """
    sizes = _sizes(where, axis)
    num_workers = math.prod(sizes)
    donated = (0,) if donate and 0 not in replicated else ()

    def check(args):
        for i, arg in enumerate(args):
            if i not in replicated:
                _check_leading_axis(arg, num_workers, f"argument {i}")

    if not isinstance(where, Mesh):

        def simulated(*args):
            check(args)
            in_axes = [None if i in replicated else 0 for i in range(len(args))]
            all_workers = step
            for name, size in reversed(list(zip(_names(axis), sizes, strict=True))):
                all_workers = jax.vmap(all_workers, axis_name=name, axis_size=size, in_axes=in_axes)
            args = [arg if i in replicated else _reshaped(arg, 1, sizes) for i, arg in enumerate(args)]
            return _reshaped(all_workers(*args), len(sizes), (num_workers,))

        return jax.jit(simulated, donate_argnums=donated)

    def one(*args):
        own = [arg if i in replicated else jax.tree.map(lambda x: x[0], arg) for i, arg in enumerate(args)]
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), step(*own))

    def distributed(*args):
        check(args)
        in_specs = tuple(P() if i in replicated else P(axis) for i in range(len(args)))
        return jax.shard_map(one, mesh=where, in_specs=in_specs, out_specs=P(axis), axis_names=set(_names(axis)))(*args)

    # Without the state's own sharding on what is returned, nothing is aliased and the next call compiles again.
    return jax.jit(distributed, donate_argnums=donated, out_shardings=_shardings(where, out_specs, axis))


def _reshaped(tree: PyTree, leading: int, sizes: tuple[int, ...]) -> PyTree:
    """The first `leading` dimensions of every leaf as `sizes`."""
    return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[leading:]), tree)


def _shardings(where: Mesh, specs: PyTree, axis: Axis) -> PyTree:
    return jax.tree.map(
        lambda spec: NamedSharding(where, P(axis, *(spec or ()))),
        specs,
        is_leaf=lambda spec: spec is None or isinstance(spec, P),
    )


def copies(
    tree: PyTree | Callable[[], PyTree],
    where: Mesh | int | tuple[int, ...],
    *,
    specs: PyTree = None,
    axis: Axis = "worker",
) -> PyTree:
    """One copy of the tree per worker: each leaf gets a leading axis of workers, placed where `per_worker` wants it.

    `tree` may be a function that makes it: it is compiled with its result in place, so that no device ever holds more
    than its part, and nothing is sent where there are many processes. `specs` shards the copies inside their workers
    as in `per_worker`: PartitionSpecs over the inner axes (None: not sharded), or a prefix of such a tree.

    >>> copies({"w": jnp.ones(3)}, 4)["w"].shape
    (4, 3)
    >>> copies(lambda: {"w": jnp.ones(3)}, 4)["w"].shape
    (4, 3)
    """
    stack = partial(_stacked, num_workers=math.prod(_sizes(where, axis)))
    shardings = None if not isinstance(where, Mesh) else _shardings(where, specs, axis)
    if callable(tree):
        return jax.jit(lambda: stack(tree()), out_shardings=shardings)()
    if isinstance(where, Mesh):
        tree = jax.device_put(tree, NamedSharding(where, P()))  # it may be committed to one device
    return jax.jit(stack, out_shardings=shardings)(tree)


def abstract_copies(
    tree_or_function: PyTree | Callable[[], PyTree],
    where: Mesh | int | tuple[int, ...],
    *,
    specs: PyTree = None,
    axis: Axis = "worker",
) -> PyTree:
    """Shapes `[workers, ...]`, dtypes and shardings of what `copies` would return, for restoring it in place.

    Nothing is computed. The tree may hold arrays or their shapes, or be a function that makes it; simulated workers
    lie on the default device.

    >>> abstract_copies({"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}, 4)["w"].shape
    (4, 3)
    """
    stack = partial(_stacked, num_workers=math.prod(_sizes(where, axis)))
    make = tree_or_function
    shapes = jax.eval_shape(lambda: stack(make())) if callable(make) else jax.eval_shape(stack, make)
    shardings = _shardings(where, specs, axis) if isinstance(where, Mesh) else jnp.zeros(()).sharding

    def placed(sharding, below):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), below)

    return jax.tree.map(placed, shardings, shapes)


def _stacked(tree: PyTree, num_workers: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.broadcast_to(_strong(x), (num_workers, *jnp.shape(x))), tree)


def local_part(
    shape: Sequence[int],
    where: Mesh,
    spec: P | None = None,
    *,
    axis: Axis = "worker",
) -> tuple[slice, ...]:
    """The part of a global array `[workers, ...]` of that shape that the devices of this process hold.

    `spec` is over the inner axes, for the dimensions after the first: of a batch `[workers, per worker, ...]` that the
    devices of a worker share it is `P("data")`. A process reads just this part, and `from_local` puts it in place.
    Raises `ValueError` if what the process holds is not one block.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("worker", "data"))
    >>> local_part((4, 16), mesh, P("data"))
    (slice(0, 4, None), slice(0, 16, None))
    """
    shape = tuple(shape)
    held = NamedSharding(where, P(axis, *(spec or ()))).addressable_devices_indices_map(shape).values()
    blocks = {tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for index in held if index}
    box = [(min(start), max(stop)) for start, stop in (zip(*ends, strict=True) for ends in zip(*blocks, strict=True))]
    if sum(_volume(block) for block in blocks) != _volume(box):
        raise ValueError(
            f"`where` must give this process one block of an array {list(shape)}, got {len(blocks)} blocks that are "
            "not one: order the mesh's devices by process, as `make_mesh` does."
        )
    return tuple(slice(start, stop) for start, stop in box)


def _volume(box: Iterable[tuple[int, int]]) -> int:
    return math.prod(stop - start for start, stop in box)


def from_local(batch: PyTree, where: Mesh, spec: P | None = None, *, axis: Axis = "worker") -> PyTree:
    """Global arrays `[workers, per worker, ...]` of which each process gives the part that its own devices hold.

    `batch` has this process's `local_part` of every leaf, as numpy arrays; with one process that is the whole. `spec`
    is over the inner axes, for the dimensions after the first. Nothing is sent between processes.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("worker", "data"))
    >>> from_local(np.zeros((4, 16, 3)), mesh, P("data")).sharding.spec == P("worker", "data")
    True
    """
    sharding = NamedSharding(where, P(axis, *(spec or ())))
    with jax.transfer_guard_host_to_device("allow"):  # these are asked for
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def _strong(x: Any) -> jax.Array:
    """Python floats and what was made of them have weak types, which the first step would strip and compile again."""
    x = jnp.asarray(x)
    return x.astype(x.dtype) if travels(x) else x


@jax.jit
def mean(tree: PyTree) -> PyTree:
    """The averaged model: floating-point leaves averaged in float32 at least, of the others the first worker's.

    >>> mean({"w": jnp.arange(4.0)})["w"].item()
    1.5
    """

    def average(x):
        return x.astype(widened(x.dtype)).mean(0).astype(x.dtype) if travels(x) else x[0]

    return jax.tree.map(average, tree)


def worker(tree: PyTree, i: int) -> PyTree:
    """The values of worker `i`, without the leading axis. Raises `ValueError` if there is no such worker.

    >>> worker({"w": jnp.arange(4.0)}, 2)["w"].item()
    2.0
    """
    num_workers = min((len(x) for x in jax.tree.leaves(tree)), default=i + 1)
    if not 0 <= i < num_workers:
        raise ValueError(f"`i` must be from 0 to {num_workers - 1}, got {i}.")
    return _worker(tree, i)


@jax.jit
def _worker(tree: PyTree, i: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x[i], tree)


def _names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def _sizes(where: Mesh | int | tuple[int, ...], axis: Axis) -> tuple[int, ...]:
    """How many workers there are along each axis."""
    names = _names(axis)
    if isinstance(where, Mesh):
        if missing := [name for name in names if name not in where.shape]:
            raise ValueError(f"`where` must have an axis {missing[0]!r}, got a mesh with axes {tuple(where.shape)}.")
        return tuple(where.shape[name] for name in names)
    sizes = (where,) if isinstance(where, int) else where
    if min(sizes) < 1 or len(sizes) != len(names):
        raise ValueError(
            f"`where` must be a mesh or a number of workers of at least 1 for each axis of {names}, got {where}."
        )
    return sizes


def _check_leading_axis(tree: PyTree, num_workers: int, what: str) -> None:
    names, leaves, _ = flatten(tree)
    for name, leaf in zip(names, leaves, strict=True):
        if np.shape(leaf)[:1] != (num_workers,):
            raise ValueError(
                f"leaf {name!r} of {what} must have a leading axis of {num_workers} workers, got shape "
                f"{np.shape(leaf)}: stack it with `copies`, or name the argument in `replicated`."
            )
