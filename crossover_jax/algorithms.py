"""How an exchange meets the optimizer: `Algorithm`, in the spirit of `optax.GradientTransformation`."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crossover_jax.axes import highest
from crossover_jax.deprecated import renames
from crossover_jax.guard import depends_on_arguments
from crossover_jax.leaves import PyTree, flatten, is_own_gradient, travels, widened
from crossover_jax.mixing import AnyMix, Mix, as_mix, average, every


def params_as_they_are(params: PyTree, state: PyTree) -> PyTree:
    del state
    return params


class Algorithm(NamedTuple):
    """A training algorithm as pure functions on the values of one worker.

    `init(params) -> state` makes the state, the optimizer's inside. `update(grads, state, params, step, **extra) ->
    (params, state)` does optimizer and communication, in their order; `extra` goes to the optimizer (a loss, say).
    `model(params, state) -> params` is what loss and evaluation see: the identity, but push-sum takes its weights out.

    A worker whose own step is not finite keeps its parameters and takes part in the exchange with them, so that no
    message is bad and the sum over workers holds.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    model: Callable[[PyTree, PyTree], PyTree] = params_as_they_are


def apply_if_finite(
    params: PyTree, updates: PyTree, new: PyTree, old: PyTree, *, onto: PyTree = None, sent: PyTree = ()
) -> tuple[PyTree, PyTree]:
    """`(onto + updates, new state)`, or `onto` and the `old` state where the step would spoil what is sent.

    `onto` is what became of the parameters, by default themselves; `sent` is what of the new state travels too.
    Counters of the new state are kept all the same: a schedule goes on, and they stay equal on all workers.
    """
    onto = params if onto is None else onto
    # Not of `onto`: an exchange that this had to wait for could not hide behind the gradient.
    looked_at = [_step_of(x, u) for x, u in zip(jax.tree.leaves(params), jax.tree.leaves(updates), strict=True)]
    looked_at = [x for x in (*looked_at, *jax.tree.leaves(sent)) if travels(x)]
    # One answer for the whole worker: a step of some layers only is one that no optimizer meant. By the largest
    # magnitude, NaN if there is one: XLA:CPU takes twice as long to reduce booleans.
    finite = [jnp.isfinite(jnp.max(jnp.abs(x), initial=0)) for x in looked_at]
    ok = jnp.stack(finite).all() if finite else jnp.bool_(True)
    return _choose(ok, optax.apply_updates(onto, updates), onto), _choose(ok, new, old)


def _step_of(x: Any, update: Any) -> Any:
    """The update, or, of narrow parameters, which may overflow by a step, what becomes of those that are finite."""
    if not travels(x) or jnp.finfo(x.dtype).bits >= 32:
        return update
    return jnp.where(jnp.isfinite(x), x + update.astype(x.dtype), 0)


def _choose(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: jnp.where(ok, x, y) if travels(x) else x, new, old)


def init_of(optimizer: optax.GradientTransformation) -> Callable[[PyTree], PyTree]:
    """The optimizer's `init`, which refuses one that moves parameters of its own: the workers' would drift apart."""

    def init(params: PyTree) -> PyTree:
        state = optimizer.init(params)
        if kept := _kept_parameters(optimizer, params):
            raise ValueError(
                f"`optimizer` must not move parameters of its own, which would not travel, but {kept[0]!r} of its "
                "state begins as the parameters: use `mix_with_momentum`, by which it travels too."
            )
        return state

    return init


def _kept_parameters(optimizer: optax.GradientTransformation, params: PyTree) -> list[str]:
    """Names of the state's leaves that begin as the parameters and then go their own way."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    made, state = jax.make_jaxpr(optimizer.init, return_shape=True)(like)
    copied = [i for i, depends in enumerate(depends_on_arguments(made.jaxpr)) if depends]
    if not copied:
        return []
    try:
        step = jax.make_jaxpr(lambda state, g, x: optimizer.update(g, state, x)[1])(state, like, like).jaxpr
    except Exception:  # it wants more than gradients, or an axis: take it to move what it keeps
        moved = copied
    else:
        moved = [i for i in copied if step.outvars[i] is not step.invars[i]]  # else it only remembers the first ones
    names, leaves, _ = flatten(state)
    return [names[i] for i in moved if travels(leaves[i])]


def mix_after(optimizer: optax.GradientTransformation, mix: AnyMix) -> Algorithm:
    """Step, then mix: x <- W(x + u). "Adapt then combine", the order of Crossover-SGD and SGP.

    `init` raises `ValueError` for an optimizer that moves parameters of its own (`optax.contrib.schedule_free`), since
    only x travels: the workers' would drift apart for ever. See `mix_with_momentum`.

    >>> from crossover_jax import average
    >>> algorithm = mix_after(optax.sgd(1.0), average())
    >>> x, grads = jnp.arange(4.0), jnp.ones(4)
    >>> update = jax.vmap(algorithm.update, in_axes=(0, None, 0, None), axis_name="worker")
    >>> update(grads, algorithm.init(x), x, 0)[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads, state, params, step, **extra):
        updates, new = optimizer.update(grads, state, params, **extra)
        params, state = apply_if_finite(params, updates, new, state)
        return mix(params, step), state

    return Algorithm(init_of(optimizer), update)


def mix_during(optimizer: optax.GradientTransformation, mix: AnyMix) -> Algorithm:
    """Mix while the gradient is taken: x <- W x + u. The exchange needs nothing of this step, so it can hide behind it.

    The price is disagreement: driven by noise, with one peer at a share of ½, its mean square is about twice that of
    `mix_after`. Warns where the mix compiles to a conditional, behind which nothing can hide.

    >>> from crossover_jax import average
    >>> algorithm = mix_during(optax.sgd(1.0), average())
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> update = jax.vmap(algorithm.update, in_axes=(0, None, 0, None), axis_name="worker")
    >>> update(grads, algorithm.init(x), x, 0)[0].tolist()
    [0.0, -1.0, -2.0, -3.0]
    """
    optimizer = optax.with_extra_args_support(optimizer)
    if not as_mix(mix).can_overlap:
        warnings.warn(
            "`mix` compiles to a conditional, so `mix_during` hides nothing of it: use `mix_after`, or a mix without "
            "one (`by_size`, and a pool whose size divides the number of segments; not `every`).",
            stacklevel=2,
        )

    def update(grads, state, params, step, **extra):
        updates, new = optimizer.update(grads, state, params, **extra)
        return apply_if_finite(params, updates, new, state, onto=mix(params, step))

    return Algorithm(init_of(optimizer), update)


@renames(of_momentum="momentum_mix")
def mix_with_momentum(
    optimizer: optax.GradientTransformation, mix: AnyMix, momentum_mix: AnyMix | None = None
) -> Algorithm:
    """Step, then mix parameters and momentum: x <- W(x + u), m <- V m, at twice the bytes of `mix_after`.

    Whatever the optimizer keeps in the shape of the parameters travels along, by `momentum_mix` or by the same `mix`:
    workers that share their momentum disagree less, for what drives them apart is what their own momentum remembers.
    Of an optimizer behind `optax.masked` or `optax.multi_transform` that is the momentum of the parameters it trains.
    The gradient before, which `gossip_adamw` keeps too, is a worker's own and stays with it.
    With `gossip(..., wire="bfloat16")` both together are the bytes of one float32 model. `init` raises `ValueError`
    where the optimizer keeps nothing of that shape.

    >>> from crossover_jax import average
    >>> algorithm = mix_with_momentum(optax.sgd(1.0, momentum=0.5), average())
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> state = jax.vmap(algorithm.init)(x)
    >>> x, state = jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")(grads, state, x, 0)
    >>> x.tolist(), state[0].trace.tolist()
    ([-1.5, -1.5, -1.5, -1.5], [1.5, 1.5, 1.5, 1.5])
    """
    optimizer, momentum_mix = optax.with_extra_args_support(optimizer), momentum_mix or mix

    def init(params):
        state = optimizer.init(params)
        if not _momenta(state, params):
            raise ValueError(
                "`optimizer` must keep momentum in the shape of the parameters that it trains, this one keeps none: "
                "use `mix_after`."
            )
        return state

    def update(grads, state, params, step, **extra):
        updates, new = optimizer.update(grads, state, params, **extra)
        params, state = apply_if_finite(params, updates, new, state, sent=_momenta(new, params))
        state = _map_momenta(lambda x: momentum_mix(x, step), state, params)
        return mix(params, step), state

    return Algorithm(init, update)


def _momenta(state: PyTree, params: PyTree) -> list[PyTree]:
    found = []
    _map_momenta(found.append, state, params)
    return found


def _map_momenta(function: Callable[[PyTree], PyTree], state: PyTree, params: PyTree) -> PyTree:
    is_momentum = is_like(params)
    return jax.tree.map(
        lambda x: function(x) if is_momentum(x) else x, state, is_leaf=lambda x: is_own_gradient(x) or is_momentum(x)
    )


def is_like(params: PyTree) -> Callable[[PyTree], bool]:
    """Whether a part of a state has the shapes of the parameters, or of those that a mask leaves."""

    def is_masked(x: Any) -> bool:
        return isinstance(x, optax.MaskedNode)

    def fits(x: Any, below: Any) -> bool | None:  # a masked part of the state stands for all parameters below it
        return None if is_masked(x) else jax.tree_util.all_leaves([below]) and jnp.shape(x) == jnp.shape(below)

    def is_like(x: PyTree) -> bool:
        try:
            parts = jax.tree.leaves(jax.tree.map(fits, x, params, is_leaf=is_masked))
        except (TypeError, ValueError):
            return False
        return bool(parts) and all(parts)

    return is_like


class RelativeState(NamedTuple):
    optimizer: PyTree
    reference: PyTree  # like the parameters, the same on all workers


@renames(renew="renew_every", axis=None, specs=None)
def mix_relative(optimizer: optax.GradientTransformation, mix: AnyMix, renew_every: int) -> Algorithm:
    """Step x <- x + u, then mix how it differs from a reference that all share: x <- x + (W d − d), d = x − r.

    In exact arithmetic this is `mix_after`. A narrow wire, `gossip(..., wire="int8")`, rounds to a part of the largest
    of 256 values that it is given, and so of how far the workers are from r, not of how large parameters are: they can
    agree more closely. After each `renew_every` steps r becomes the average of the workers, by an all-reduce of the
    leaves that `mix` lets travel; it begins as the parameters, which must be the same on all workers.

    Raises `ValueError` for `renew_every` below 1. Differences of parameters narrower than float32 travel as float32, or
    as the wire says. Where a loop restores one worker's state, its reference is an old one until the next renewal: the
    sum over workers still holds, its agreement does not.

    >>> from crossover_jax import average
    >>> algorithm = mix_relative(optax.sgd(1.0), average(), renew_every=1)
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> state = jax.vmap(algorithm.init)(x)
    >>> x, state = jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")(grads, state, x, 0)
    >>> x.tolist(), state.reference.tolist()
    ([-1.5, -1.5, -1.5, -1.5], [-1.5, -1.5, -1.5, -1.5])
    """
    if renew_every < 1:
        raise ValueError(f"`renew_every` must be at least 1, got {renew_every}.")
    optimizer, mix = optax.with_extra_args_support(optimizer), as_mix(mix)
    first = init_of(optimizer)
    mean = average(mix.axis, leaves=mix.leaves, specs=mix.specs)
    renewal = every(renew_every, Mix(lambda pair, step: (pair[0], mean(pair[0], step)), mix.axis))

    def init(params):
        # A buffer of its own: a loop that donates parameters and state would donate theirs twice.
        reference = jax.tree.map(lambda x: jnp.copy(x) if travels(x) else x, params)
        return RelativeState(first(params), reference)

    def update(grads, state, params, step, **extra):
        updates, new = optimizer.update(grads, state.optimizer, params, **extra)
        params, new = apply_if_finite(params, updates, new, state.optimizer)
        differences = jax.tree.map(lambda x, r: _difference(x, r) if travels(x) else x, params, state.reference)
        mixed = mix(differences, step)
        # Not r + W d: what stays at home does so bit for bit.
        params = jax.tree.map(
            lambda x, d, m: (x.astype(d.dtype) + (m - d)).astype(x.dtype) if travels(x) else x,
            params,
            differences,
            mixed,
        )
        _, reference = renewal((params, state.reference), step)
        return params, RelativeState(new, reference)

    return Algorithm(init, update)


class CountedState(NamedTuple):
    algorithm: PyTree
    count: jax.Array  # shape=(), dtype=int32


def as_optax(algorithm: Algorithm) -> optax.GradientTransformationExtraArgs:
    """The algorithm as the outermost, last transformation of an unchanged loop: updates are `new − old parameters`.

    They contain the exchange: what is chained after it, or scales, clips or averages its updates, undoes it. Clipping,
    schedules and weight decay belong into the optimizer that the algorithm is made of.

    The loop must run once per worker: wrap its step in `per_worker` (or an own `shard_map` or `vmap` with a named
    axis). Updates have the parameters' dtypes, and lead to `algorithm.update`'s parameters up to the rounding of the
    larger of old and new.

    Steps are counted in the optimizer's state, and all workers take the highest count there is, one integer by an
    all-reduce before the gradient: a loop may restore or reset one worker's state. `update(..., step=step)`, with one
    step that all workers share, needs none. If the loop gives worker i its old parameters back after an exchange, the
    average over workers moves by (x_i − Σ_j W[i, j] x_j) / n, a share of the workers' disagreement.

    What skips updates by a condition (`optax.apply_if_finite`) goes around the optimizer inside the algorithm: a worker
    that skips `as_optax` sends nothing, and all would wait for it for ever. `per_worker` refuses it.

    Raises `ValueError` for push-sum, whose loop needs `algorithm.model`, and in a step that passes no parameters.

    >>> from crossover_jax import crossover_sgd
    >>> tx = as_optax(crossover_sgd(optax.adam(1e-3), num_workers=8))
    >>> tx.init({"w": jnp.zeros(100)}).count.item()
    0
    """
    if algorithm.model is not params_as_they_are:
        raise ValueError("`algorithm` must train its parameters as they are: push-sum needs its `model` in the loss.")

    def init(params):
        return CountedState(algorithm.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, step=None, **extra):
        if params is None:
            raise ValueError("`params` must be passed to `update`, as `tx.update(grads, state, params)`, got None.")
        step = highest(state.count) if step is None else step
        new, inner = algorithm.update(updates, state.algorithm, params, step, **extra)
        count = jnp.maximum(state.count, jnp.asarray(step, jnp.int32)) + 1
        return jax.tree.map(_update_to, new, params), CountedState(inner, count)

    return optax.GradientTransformationExtraArgs(init, update)


def _update_to(new: jax.Array, old: jax.Array) -> jax.Array:
    if travels(new):
        return _difference(new, old).astype(new.dtype)
    return new - old if jnp.issubdtype(new.dtype, jnp.integer) else jnp.zeros_like(new)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    wide = widened(new.dtype)
    return new.astype(wide) - old.astype(wide)
