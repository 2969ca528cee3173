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
from crossover_jax.leaves import PyTree, flatten, fold_in, is_key
from crossover_jax.mesh import Workers, axis_names, axis_sizes, is_spec, shardings_of


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
    sizes, names, parameters = axis_sizes(workers, axis), axis_names(axis), _parameters(step)
    shared_places, static_places = _by_both(replicated, parameters), _by_both(static, parameters)
    donated = donate if not isinstance(donate, bool) else (0,) if donate else ()
    options = _for_jit("donate", _by_both(donated, parameters) - shared_places) | _for_jit("static", static_places)
    # Without the state's own sharding on what is returned, nothing is aliased and the next call compiles again.
    shardings = shardings_of(workers, out_specs, axis) if isinstance(workers, Mesh) else None
    is_sharded = any(spec is not None and any(spec) for spec in jax.tree.leaves(out_specs, is_leaf=is_spec))

    def all_workers(*args, **kwargs):
        given = {**{str(i): arg for i, arg in enumerate(args)}, **kwargs}
        fixed, shared, own = {}, {}, {}
        for key, arg in given.items():
            place = int(key) if key.isdigit() else key
            (fixed if place in static_places else shared if place in shared_places else own)[key] = arg
        for key, arg in own.items():
            _check_leading_axis(arg, math.prod(sizes), f"argument {key}" if key.isdigit() else f"argument {key!r}")

        def call(own, shared):
            values = {**fixed, **own, **shared}
            return step(*(values[str(i)] for i in range(len(args))), **{key: values[key] for key in kwargs})

        one = partial(_one_worker, call, around=Around(names, is_sharded))
        run = _simulated if not isinstance(workers, Mesh) else partial(_on_mesh, workers)
        return run(one, own, shared, names, sizes)

    return jax.jit(all_workers, out_shardings=shardings, **options)


def in_place(step: Callable[..., Any]) -> Callable[..., tuple[PyTree, Any]]:
    """`(state, *args) -> (state, what step returned)`, for a step that updates its first arguments in place.

    `state` is the tuple of those arguments: flax.nnx modules, optimizers, metrics. Without this their new values would
    be lost, since every worker updates copies.

    >>> def count(counter, more): counter["n"] += more
    >>> (counter,), _ = per_worker(in_place(count), 4)(({"n": jnp.zeros(4)},), jnp.arange(4.0))
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


def _parameters(step: Callable[..., Any]) -> list[str]:
    """Names of the step's positional parameters; what has no signature is called by positions only."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _by_both(chosen: Iterable[int | str], parameters: list[str]) -> set[int | str]:
    """Arguments chosen by position or by name, by both: however they will be passed."""
    other: dict[int | str, int | str] = dict(enumerate(parameters)) | {name: i for i, name in enumerate(parameters)}
    return {either for x in chosen for either in (x, other.get(x, x))}


def _for_jit(what: str, chosen: set[int | str]) -> dict[str, Any]:
    numbers, names = (tuple(x for x in chosen if isinstance(x, kind)) for kind in (int, str))
    return {f"{what}_argnums": numbers, f"{what}_argnames": names}


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
