"""The state of all workers from that of one, their batches, and back: one worker's values, or the mean of all."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax.axes import Axis
from crossover_jax.deprecated import renames
from crossover_jax.leaves import PyTree, flatten, fold_in, is_key, is_variable, travels, widened
from crossover_jax.mesh import Workers, axis_sizes, shardings_of


@renames(where="workers")
def copies(
    tree: PyTree | Callable[[], PyTree], workers: Workers, *, specs: PyTree = None, axis: Axis = "worker"
) -> PyTree:
    """One copy of the tree per worker: each leaf gets a leading axis of workers, placed where `per_worker` wants it.

    `tree` may be a function that makes it: it is compiled with its result in place, so that no device ever holds more
    than its part, and processes send nothing. `specs` shards the copies inside their workers: PartitionSpecs over the
    inner axes (None: not sharded), or a prefix of such a tree.

    Random keys are the exception: every worker but the first gets another one, so that workers draw different noise.
    That holds for typed keys and for arrays that look like `jax.random.PRNGKey(0)`.

    Raises `ValueError` for a leaf that is no array, and for tied weights, whose copies would come apart.

    >>> copies({"w": jnp.ones(3)}, 4)["w"].shape
    (4, 3)
    """
    stack = partial(_stack, num_workers=math.prod(axis_sizes(workers, axis)))
    shardings = None if not isinstance(workers, Mesh) else shardings_of(workers, specs, axis)
    if make := _function(tree):
        return jax.jit(lambda: stack(_checked(make())), out_shardings=shardings)()
    tree = _checked(tree)
    if isinstance(workers, Mesh):
        tree = jax.device_put(tree, NamedSharding(workers, P()))  # it may be committed to one device
    return jax.jit(stack, out_shardings=shardings)(tree)


@renames(where="workers")
def abstract_copies(
    tree: PyTree | Callable[[], PyTree], workers: Workers, *, specs: PyTree = None, axis: Axis = "worker"
) -> PyTree:
    """Shapes `[workers, ...]`, dtypes and shardings of what `copies` would return, for restoring it in place.

    Nothing is computed. The tree may hold arrays or their shapes, or be a function that makes it; simulated workers
    lie on the default device.

    >>> abstract_copies({"w": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}, 4)["w"].shape
    (4, 3)
    """
    stack, make = partial(_stack, num_workers=math.prod(axis_sizes(workers, axis))), _function(tree)
    shapes = jax.eval_shape(lambda: stack(make())) if make else jax.eval_shape(stack, tree)
    shardings = shardings_of(workers, specs, axis) if isinstance(workers, Mesh) else jnp.zeros(()).sharding

    def place(sharding, below):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), below)

    return jax.tree.map(place, shardings, shapes)


def _function(tree: Any) -> Callable[[], PyTree] | None:
    """A function that makes a tree; a module is a tree, though it can be called."""
    return tree if callable(tree) and jax.tree_util.all_leaves([tree]) else None


def _stack(tree: PyTree, num_workers: int) -> PyTree:
    def stack(x):
        # Python numbers and what was made of them have weak types, which the first step would strip and compile again.
        x = jnp.asarray(x)
        x = x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else x.astype(x.dtype)
        if is_key(x):
            return jax.vmap(lambda i: fold_in(x, i))(jnp.arange(num_workers))
        return jnp.broadcast_to(x, (num_workers, *x.shape))

    return jax.tree.map(stack, tree)


def _checked(tree: PyTree) -> PyTree:
    names, leaves, _ = flatten(tree)
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise ValueError(
                f"leaf {name!r} must be an array, got {type(leaf).__name__}: keep what is no array out of the tree, "
                "as by `equinox.partition(model, equinox.is_array)`."
            )
    _check_untied(tree)
    return tree


def _check_untied(tree: PyTree) -> None:
    variables = [x for x in jax.tree.leaves(tree, is_leaf=is_variable) if is_variable(x)]
    if len({id(x) for x in variables}) < len(variables):
        raise ValueError(
            "a Variable stands twice in the tree: the copies of a tied weight would come apart. Keep it once, as by "
            "`flax.nnx.split(model)`, whose graphdef knows the second place."
        )


@renames(where="workers")
def split(batch: PyTree, workers: Workers, spec: P | None = None, *, axis: Axis = "worker") -> PyTree:
    """A flat batch `[batch, ...]` dealt out to the workers, `[workers, per worker, ...]`, and placed.

    Worker i gets the i-th part of consecutive examples. `spec` is over the inner axes, for the dimensions after the
    first. Every process passes the whole batch (`from_local` takes parts). Raises `ValueError` for a remainder.

    >>> split({"image": np.zeros((32, 28, 28))}, 8)["image"].shape
    (8, 4, 28, 28)
    """
    num_workers = math.prod(axis_sizes(workers, axis))
    names, leaves, treedef = flatten(batch)
    for name, leaf in zip(names, leaves, strict=True):
        if not np.ndim(leaf) or len(leaf) % num_workers:
            raise ValueError(
                f"leaf {name!r} must have a first dimension of examples that {num_workers} workers divide, got shape "
                f"{np.shape(leaf)}: drop the remainder, or choose another batch size."
            )
    leaves = [x.reshape(num_workers, -1, *x.shape[1:]) for x in leaves]
    if not isinstance(workers, Mesh):
        return treedef.unflatten(jax.device_put(leaves))
    if all(isinstance(x, jax.Array) for x in leaves):
        return treedef.unflatten(jax.device_put(leaves, NamedSharding(workers, P(axis, *(spec or ())))))
    here = [np.asarray(x)[local_part(x.shape, workers, spec, axis=axis)] for x in leaves]
    return treedef.unflatten(from_local(here, workers, spec, axis=axis))


@renames(where="workers")
def local_part(
    shape: Sequence[int], workers: Mesh, spec: P | None = None, *, axis: Axis = "worker"
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
    held = NamedSharding(workers, P(axis, *(spec or ()))).addressable_devices_indices_map(shape).values()
    blocks = {tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for index in held if index}
    box = [(min(start), max(stop)) for start, stop in (zip(*ends, strict=True) for ends in zip(*blocks, strict=True))]
    if sum(_volume(block) for block in blocks) != _volume(box):
        raise ValueError(
            f"`workers` must give this process one block of an array {list(shape)}, got {len(blocks)} blocks that are "
            "not one: order the mesh's devices by process, as `make_mesh` does."
        )
    return tuple(slice(start, stop) for start, stop in box)


def _volume(box: Iterable[tuple[int, int]]) -> int:
    return math.prod(stop - start for start, stop in box)


@renames(where="workers")
def from_local(batch: PyTree, workers: Mesh, spec: P | None = None, *, axis: Axis = "worker") -> PyTree:
    """Global arrays `[workers, per worker, ...]` of which each process gives the part that its own devices hold.

    `batch` has this process's `local_part` of every leaf, as numpy arrays; with one process that is the whole. `spec`
    is over the inner axes, for the dimensions after the first. Nothing is sent between processes.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("worker", "data"))
    >>> from_local(np.zeros((4, 16, 3)), mesh, P("data")).sharding.spec == P("worker", "data")
    True
    """
    sharding = NamedSharding(workers, P(axis, *(spec or ())))
    with jax.transfer_guard_host_to_device("allow"):  # these are asked for
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


@jax.jit
def mean_over_workers(tree: PyTree) -> PyTree:
    """The averaged model: floating-point leaves averaged in float32 at least, of the others the first worker's.

    >>> mean_over_workers({"w": jnp.arange(4.0)})["w"].item()
    1.5
    """

    def average(x):
        return x.astype(widened(x.dtype)).mean(0).astype(x.dtype) if travels(x) else x[0]

    return jax.tree.map(average, tree)


def one_worker(tree: PyTree, i: int) -> PyTree:
    """The values of worker `i`, without the leading axis. Raises `ValueError` if there is no such worker.

    >>> one_worker({"w": jnp.arange(4.0)}, 2)["w"].item()
    2.0
    """
    num_workers = min((len(x) for x in jax.tree.leaves(tree)), default=i + 1)
    if not 0 <= i < num_workers:
        raise ValueError(f"`i` must be from 0 to {num_workers - 1}, got {i}.")
    return _worker(tree, i)


@jax.jit
def _worker(tree: PyTree, i: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x[i], tree)
