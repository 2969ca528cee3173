"""From the step of one worker to all workers: on a mesh, or simulated on one device."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax.axes import Around, Axis, tracing
from crossover_jax.deprecated import renames
from crossover_jax.guard import SHARED, check_collectives
from crossover_jax.leaves import PyTree, flatten, fold_in, is_key, travels, widened

Workers = Mesh | int | tuple[int, ...]  # a mesh of them, or how many one device simulates


@renames(where="workers")
def per_worker(
    step: Callable[..., PyTree],
    workers: Workers,
    replicated: Sequence[int | str] = (),
    *,
    static: Sequence[int | str] = (),
    donate: bool | Sequence[int | str] = True,
    out_specs: PyTree = None,
    axis: Axis = "worker",
) -> jax.stages.Wrapped:
    """All workers' step, compiled, from the step of one worker, which sees values without a leading axis.

    Args:
      step: the step of one worker; it returns its new state. One that updates objects in place needs `in_place`.
      workers: a mesh (each worker is a slice of it; axes other than `axis` stay automatic) or the number of workers to
        simulate on one device.
      replicated: positions or names of arguments that are the same for all workers. All others, and all results, have a
        leading axis of workers. Random keys in replicated arguments are the exception: every worker gets its own.
      static: positions or names of arguments that are compiled in, such as flags.
      donate: whether the first argument, the state, is donated (use what is returned), or which arguments are.
      out_specs: where the state is sharded inside its worker, the same for what is returned: PartitionSpecs over the
        inner axes (None: not sharded), or a prefix of the result, `(state_specs, None)`.
      axis: the name of the workers' axis, or both where there are two levels, `("worker", "fast")`: on a mesh that has
        them, or with `workers=(4, 8)` simulated. The leading axis of everything stays one, over all 32.

    Collectives in `step` are those of `jax.vmap` with a named axis, on a mesh too: what one differentiates through a
    `psum` or `pmean` is the gradient of one's own value, summed over all workers that it reaches.

    Raises `ValueError` while tracing: for a leaf without the leading axis of workers, a mesh without `axis`, a step
    that returns nothing or loses what it changed in place, and for a collective that a worker may skip or choose by a
    value of its own, which would hang on real links.

    >>> total = per_worker(lambda x: jax.lax.psum(x, "worker"), 4)
    >>> total(jnp.arange(4.0)).tolist()
    [6.0, 6.0, 6.0, 6.0]
    """
    sizes, names, parameters = _sizes(workers, axis), _names(axis), _parameters(step)
    # Without the state's own sharding on what is returned, nothing is aliased and the next call compiles again.
    shardings = _shardings(workers, out_specs, axis) if isinstance(workers, Mesh) else None
    is_sharded = any(spec is not None and any(spec) for spec in jax.tree.leaves(out_specs, is_leaf=_is_spec))
    donated = (
        donate if not isinstance(donate, bool) else (0,) if donate and not _among(0, replicated, parameters) else ()
    )

    def all_workers(*args, **kwargs):
        given = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        fixed, shared, own = {}, {}, {}
        for key, arg in given.items():
            is_static, is_shared = (_among(key, chosen, parameters) for chosen in (static, replicated))
            (fixed if is_static else shared if is_shared else own)[key] = arg
        for key, arg in own.items():
            _check_leading_axis(arg, math.prod(sizes), f"argument {key}" if key.isdigit() else f"argument {key!r}")

        def call(own, shared):
            values = {**fixed, **own, **shared}
            return step(*(values[str(i)] for i in range(len(args))), **{key: values[key] for key in kwargs})

        one = partial(_one_worker, call, around=Around(names, is_sharded))
        run = _simulated if not isinstance(workers, Mesh) else partial(_on_mesh, workers)
        return run(one, own, shared, names, sizes)

    return jax.jit(
        all_workers, out_shardings=shardings, **_jit_names("donate", donated), **_jit_names("static", static)
    )


def in_place(step: Callable[..., Any]) -> Callable[..., tuple[PyTree, Any]]:
    """`(state, *args) -> (state, what step returned)`, for a step that updates its first arguments in place.

    `state` is the tuple of those arguments: flax.nnx modules, optimizers, metrics. Without this their new values would
    be lost, since every worker updates copies.

    >>> class Counter(dict):  # stands for an nnx module
    ...     pass
    >>> jax.tree_util.register_pytree_node(Counter, lambda c: ((c["n"],), None), lambda _, n: Counter(n=n[0]))
    >>> def count(counter, more): counter["n"] += more
    >>> step = per_worker(in_place(count), 4)
    >>> (counter,), _ = step(copies((Counter(n=jnp.zeros(())),), 4), jnp.arange(4.0))
    >>> counter["n"].tolist()
    [0.0, 1.0, 2.0, 3.0]
    """

    def step_and_state(state: PyTree, *args: Any, **kwargs: Any) -> tuple[PyTree, Any]:
        result = step(*state, *args, **kwargs)
        return state, result

    return step_and_state


def _one_worker(call: Callable[..., PyTree], own: PyTree, shared: PyTree, *, around: Around) -> PyTree:
    """One worker's step: traced once, looked through for what would hang, and run."""
    me = lax.axis_index(around.axes)
    shared = jax.tree.map(lambda x: fold_in(x, me) if is_key(x) else x, shared)
    leaves, treedef = jax.tree.flatten((own, shared))

    def flat(*leaves):
        own, shared = jax.tree.unflatten(treedef, leaves)
        objects = _objects((own, shared))
        before = {id(x) for x in jax.tree.leaves(objects)}
        result = call(own, shared)
        _check_kept([x for x in jax.tree.leaves(objects) if id(x) not in before], result)
        return result

    with tracing(around):
        program, shape = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    own_leaves = len(jax.tree.leaves(own))
    differs = [frozenset(around.axes) if i < own_leaves or is_key(x) else SHARED for i, x in enumerate(leaves)]
    check_collectives(program.jaxpr, differs, around.axes)
    return jax.tree.unflatten(jax.tree.structure(shape), jaxpr_as_fun(program)(*leaves))


def _simulated(one, own: PyTree, shared: PyTree, names: tuple[str, ...], sizes: tuple[int, ...]) -> PyTree:
    for name, size in reversed(list(zip(names, sizes, strict=True))):
        one = jax.vmap(one, axis_name=name, axis_size=size, in_axes=(0, None))
    return _reshape(one(_reshape(own, 1, sizes), shared), len(sizes), (math.prod(sizes),))


def _reshape(tree: PyTree, leading: int, sizes: tuple[int, ...]) -> PyTree:
    """The first `leading` dimensions of every leaf as `sizes`."""
    return jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[leading:]), tree)


def _on_mesh(mesh: Mesh, one, own: PyTree, shared: PyTree, names: tuple[str, ...], sizes: tuple[int, ...]) -> PyTree:
    del sizes
    axis = names if len(names) > 1 else names[0]

    def alone(own, shared):
        result = one(jax.tree.map(lambda x: x[0], own), shared)
        return jax.tree.map(lambda x: jnp.expand_dims(x, 0), result)

    # Types that tell which values vary over the workers (`check_vma`) would make a mesh another language than `vmap`:
    # loops and conditionals that begin with constants are errors there, and gradients of replicated values are summed.
    on_mesh = jax.shard_map(
        alone, mesh=mesh, in_specs=(P(axis), P()), out_specs=P(axis), axis_names=set(names), check_vma=False
    )
    return on_mesh(_reshard(own, mesh, axis), shared)


def _reshard(tree: PyTree, mesh: Mesh, axis: Axis) -> PyTree:
    """On Explicit axes the type of an argument must say where its workers lie, which that of a numpy array does not."""
    if AxisType.Explicit not in mesh.axis_types:
        return tree

    def place(x):
        spec = jax.typeof(x).sharding.spec
        return x if spec[0] in (axis, (axis,)) else jax.sharding.reshard(x, NamedSharding(mesh, P(axis, *spec[1:])))

    return jax.tree.map(place, tree)


def _objects(tree: PyTree) -> list[Any]:
    """The nodes of a tree that are no containers of Python: modules, which a step may change in place."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: not isinstance(x, dict | list | tuple))
    return [x for x in nodes if not jax.tree_util.all_leaves([x])]


def _check_kept(changed: list[Any], result: PyTree) -> None:
    returned = {id(x) for x in jax.tree.leaves(result)}
    if not returned:
        raise ValueError(
            "`step` must return what it computes, its new state, got a result without arrays: nothing would be kept. A "
            "step that updates its arguments in place works as `per_worker(in_place(step), workers)`."
        )
    if lost := [x for x in changed if id(x) not in returned]:
        raise ValueError(
            f"`step` must return what it changes, but it changes {len(lost)} leaves of its arguments in place, and "
            "they would be lost: return the changed objects too, or use `per_worker(in_place(step), workers)`."
        )


@renames(where="workers")
def copies(
    tree: PyTree | Callable[[], PyTree],
    workers: Workers,
    *,
    specs: PyTree = None,
    axis: Axis = "worker",
) -> PyTree:
    """One copy of the tree per worker: each leaf gets a leading axis of workers, placed where `per_worker` wants it.

    `tree` may be a function that makes it: it is compiled with its result in place, so that no device ever holds more
    than its part, and nothing is sent where there are many processes. `specs` shards the copies inside their workers
    as in `per_worker`: PartitionSpecs over the inner axes (None: not sharded), or a prefix of such a tree.

    Random keys are the exception: every worker but the first gets another one, so that workers draw different noise.
    That holds for typed keys and for arrays that look like `jax.random.PRNGKey(0)`.

    Raises `ValueError` for a leaf that is no array, and for a module in which one Variable stands twice (tied weights),
    since its copies would come apart.

    >>> copies({"w": jnp.ones(3)}, 4)["w"].shape
    (4, 3)
    >>> copies(lambda: {"w": jnp.ones(3)}, 4)["w"].shape
    (4, 3)
    """
    stack = partial(_stack, num_workers=math.prod(_sizes(workers, axis)))
    shardings = None if not isinstance(workers, Mesh) else _shardings(workers, specs, axis)
    if make := _function(tree):
        return jax.jit(lambda: stack(_checked(make())), out_shardings=shardings)()
    tree = _checked(tree)
    if isinstance(workers, Mesh):
        tree = jax.device_put(tree, NamedSharding(workers, P()))  # it may be committed to one device
    return jax.jit(stack, out_shardings=shardings)(tree)


@renames(where="workers")
def abstract_copies(
    tree: PyTree | Callable[[], PyTree],
    workers: Workers,
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
    stack, make = partial(_stack, num_workers=math.prod(_sizes(workers, axis))), _function(tree)
    shapes = jax.eval_shape(lambda: stack(make())) if make else jax.eval_shape(stack, tree)
    shardings = _shardings(workers, specs, axis) if isinstance(workers, Mesh) else jnp.zeros(()).sharding

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
    seen: dict[int, Any] = {}

    def visit(node: Any) -> bool:
        # Of what cannot change, two references mean nothing; of what can, that both are one.
        is_mutable = not isinstance(node, tuple | list | dict | jax.Array | np.ndarray) and hasattr(node, "__dict__")
        is_frozen = getattr(getattr(type(node), "__dataclass_params__", None), "frozen", False)
        if is_mutable and not is_frozen and id(node) in seen and jax.tree.leaves(node):
            raise ValueError(
                f"a {type(node).__name__} stands twice in the tree: the copies of a tied weight would come apart. Keep "
                "it once, as by `flax.nnx.split(model)`, whose graphdef knows the second place."
            )
        seen[id(node)] = node
        return False

    jax.tree.leaves(tree, is_leaf=visit)


@renames(where="workers")
def split(batch: PyTree, workers: Workers, spec: P | None = None, *, axis: Axis = "worker") -> PyTree:
    """A flat batch `[batch, ...]` dealt out to the workers, `[workers, per worker, ...]`, and placed.

    Worker i gets the i-th part of consecutive examples. `spec` is over the inner axes, for the dimensions after the
    first, `P("data")` where the devices of a worker share its examples. With many processes every one passes the whole
    batch (see `from_local` for their parts). Raises `ValueError` if the workers do not divide the batch.

    >>> split({"image": np.zeros((32, 28, 28))}, 8)["image"].shape
    (8, 4, 28, 28)
    """
    num_workers = math.prod(_sizes(workers, axis))
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
    shape: Sequence[int],
    workers: Mesh,
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


def _names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def _sizes(workers: Workers, axis: Axis) -> tuple[int, ...]:
    """How many workers there are along each axis."""
    names = _names(axis)
    if isinstance(workers, Mesh):
        if missing := [name for name in names if name not in workers.shape]:
            raise ValueError(
                f"`workers` must have an axis {missing[0]!r}, got a mesh with axes {tuple(workers.shape)}: name its "
                "axis of workers, `axis=...`."
            )
        return tuple(workers.shape[name] for name in names)
    sizes = (workers,) if isinstance(workers, int) else workers
    if min(sizes) < 1 or len(sizes) != len(names):
        raise ValueError(
            f"`workers` must be a mesh or a number of workers of at least 1 for each axis of {names}, got {workers}."
        )
    return sizes


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, P)


def _shardings(mesh: Mesh, specs: PyTree, axis: Axis) -> PyTree:
    return jax.tree.map(lambda spec: NamedSharding(mesh, P(axis, *(spec or ()))), specs, is_leaf=_is_spec)


def _parameters(step: Callable[..., Any]) -> list[str]:
    """Names of the step's positional parameters; what has no signature is called by positions only."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _among(key: int | str, chosen: Sequence[int | str], parameters: list[str]) -> bool:
    """Whether an argument, "0" for the first or its name, is among those chosen by position or by name."""
    position = int(key) if str(key).isdigit() else parameters.index(str(key)) if key in parameters else None
    name = parameters[position] if position is not None and position < len(parameters) else key
    return position in chosen or name in chosen


def _jit_names(what: str, chosen: Sequence[int | str]) -> dict[str, Any]:
    numbers, names = ([x for x in chosen if isinstance(x, kind)] for kind in (int, str))
    return {f"{what}_argnums": tuple(numbers), f"{what}_argnames": tuple(names)}


def _check_leading_axis(tree: PyTree, num_workers: int, what: str) -> None:
    names, leaves, _ = flatten(tree)
    for name, leaf in zip(names, leaves, strict=True):
        shape = np.shape(leaf)
        if shape[:1] == (num_workers,):
            continue
        advice = "stack it with `copies`, or name the argument in `replicated`."
        if is_key(leaf):
            advice = "name the argument in `replicated`, and every worker gets a key of its own."
        elif shape and shape[0] and shape[0] % num_workers == 0:
            dealt = [num_workers, shape[0] // num_workers, *shape[1:]]
            advice = f"deal a batch out with `split(batch, workers)`, which makes {dealt}."
        raise ValueError(
            f"leaf {name!r} of {what} must have a leading axis of {num_workers} workers, got shape {shape}: {advice}"
        )
