"""How an exchange meets the optimizer: `Algorithm`, in the spirit of `optax.GradientTransformation`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crossover_jax.cuts import travels, widened
from crossover_jax.mixing import Mix, average, every

PyTree = Any


def _params_as_they_are(params: PyTree, state: PyTree) -> PyTree:
    del state
    return params


class Algorithm(NamedTuple):
    """A training algorithm as pure functions on the values of one worker.

    `init(params) -> state` makes the state, the optimizer's inside. `update(grads, state, params, step, **extra) ->
    (params, state)` does optimizer and communication, in their order; `extra` goes to the optimizer (a loss, say).
    `model(params, state) -> params` is what loss and evaluation see; it is the identity but for push-sum, whose
    parameters are biased by its weights.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    model: Callable[[PyTree, PyTree], PyTree] = _params_as_they_are


def mix_after(optimizer: optax.GradientTransformation, mix: Mix) -> Algorithm:
    """Step, then mix: x <- W(x + u). "Adapt then combine", the order of Crossover-SGD and SGP.

    >>> from crossover_jax import average
    >>> algorithm = mix_after(optax.sgd(1.0), average())
    >>> x, grads = jnp.arange(4.0), jnp.ones(4)
    >>> update = jax.vmap(algorithm.update, in_axes=(0, None, 0, None), axis_name="worker")
    >>> update(grads, algorithm.init(x), x, 0)[0].tolist()
    [0.5, 0.5, 0.5, 0.5]
    """

    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads, state, params, step, **extra):
        updates, state = optimizer.update(grads, state, params, **extra)
        return mix(optax.apply_updates(params, updates), step), state

    return Algorithm(optimizer.init, update)


def mix_during(optimizer: optax.GradientTransformation, mix: Mix) -> Algorithm:
    """Mix while the gradient is taken: x <- W x + u. The exchange needs nothing of this step, so it can hide behind it.

    The price is disagreement: in the noise-driven linear model, with one peer at a share of ½, its mean square is about
    twice that of `mix_after`.

    >>> from crossover_jax import average
    >>> algorithm = mix_during(optax.sgd(1.0), average())
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> update = jax.vmap(algorithm.update, in_axes=(0, None, 0, None), axis_name="worker")
    >>> update(grads, algorithm.init(x), x, 0)[0].tolist()
    [0.0, -1.0, -2.0, -3.0]
    """

    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads, state, params, step, **extra):
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(mix(params, step), updates), state

    return Algorithm(optimizer.init, update)


def mix_all(optimizer: optax.GradientTransformation, mix: Mix, of_momentum: Mix | None = None) -> Algorithm:
    """Step, then mix parameters and momentum: x <- W(x + u), m <- V m, at twice the bytes of `mix_after`.

    Whatever the optimizer keeps in the shape of the parameters travels along, by `of_momentum` or by the same `mix`:
    workers that share their momentum disagree less, for what drives them apart is what their own momentum remembers.
    With `gossip(..., wire="bfloat16")` both together are the bytes of one float32 model.

    `init` raises `ValueError` where the optimizer keeps nothing of that shape.

    >>> from crossover_jax import average
    >>> algorithm = mix_all(optax.sgd(1.0, momentum=0.5), average())
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> state = jax.vmap(algorithm.init)(x)
    >>> x, state = jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")(grads, state, x, 0)
    >>> x.tolist(), state[0].trace.tolist()
    ([-1.5, -1.5, -1.5, -1.5], [1.5, 1.5, 1.5, 1.5])
    """
    optimizer, of_momentum = optax.with_extra_args_support(optimizer), of_momentum or mix

    def is_like(params: PyTree) -> Callable[[PyTree], bool]:
        shapes, structure = [x.shape for x in jax.tree.leaves(params)], jax.tree.structure(params)
        return lambda x: jax.tree.structure(x) == structure and [y.shape for y in jax.tree.leaves(x)] == shapes

    def init(params):
        state, is_momentum = optimizer.init(params), is_like(params)
        if not any(map(is_momentum, jax.tree.leaves(state, is_leaf=is_momentum))):
            raise ValueError("`optimizer` must keep momentum in the shape of the parameters, this one keeps none.")
        return state

    def update(grads, state, params, step, **extra):
        is_momentum = is_like(params)
        updates, state = optimizer.update(grads, state, params, **extra)
        state = jax.tree.map(lambda x: of_momentum(x, step) if is_momentum(x) else x, state, is_leaf=is_momentum)
        return mix(optax.apply_updates(params, updates), step), state

    return Algorithm(init, update)


class RelativeState(NamedTuple):
    optimizer: PyTree
    reference: PyTree  # like the parameters, the same on all workers


def mix_relative(
    optimizer: optax.GradientTransformation, mix: Mix, renew: int, axis: str = "worker", *, specs: PyTree = None
) -> Algorithm:
    """Step x <- x + u, then mix how it differs from a reference that all share: x <- x + (W d − d), d = x − r.

    In exact arithmetic this is `mix_after`. A narrow wire, `gossip(..., wire="int8")`, rounds to a part of the largest
    of 256 values that it is given, and so of how far the workers are from r, not of how large parameters are: they can
    agree more closely. After each `renew` steps r becomes the average of the workers, by an all-reduce; it begins as
    the parameters, which must be the same on all workers. `specs` tells how leaves lie inside a worker, as in `gossip`.

    Raises `ValueError` for `renew` below 1. Holds one more copy of the parameters; differences of narrower parameters
    than float32 travel as float32, or as the wire says.

    >>> from crossover_jax import average
    >>> algorithm = mix_relative(optax.sgd(1.0), average(), renew=1)
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> state = jax.vmap(algorithm.init)(x)
    >>> x, state = jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")(grads, state, x, 0)
    >>> x.tolist(), state.reference.tolist()
    ([-1.5, -1.5, -1.5, -1.5], [-1.5, -1.5, -1.5, -1.5])
    """
    optimizer, mean = optax.with_extra_args_support(optimizer), average(axis, specs=specs)
    renewed = every(renew, lambda pair, step: (pair[0], mean(pair[0], step)), axis)

    def init(params):
        # A buffer of its own: a loop that donates parameters and state would donate theirs twice.
        reference = jax.tree.map(lambda x: jnp.copy(x) if travels(x) else x, params)
        return RelativeState(optimizer.init(params), reference)

    def update(grads, state, params, step, **extra):
        updates, inner = optimizer.update(grads, state.optimizer, params, **extra)
        params = optax.apply_updates(params, updates)
        differences = jax.tree.map(lambda x, r: _difference(x, r) if travels(x) else x, params, state.reference)
        mixed = mix(differences, step)
        # Not r + W d: what stays at home does so bit for bit.
        params = jax.tree.map(
            lambda x, d, m: (x + (m - d)).astype(x.dtype) if travels(x) else x, params, differences, mixed
        )
        _, reference = renewed((params, state.reference), step)
        return params, RelativeState(inner, reference)

    return Algorithm(init, update)


def average_grads(optimizer: optax.GradientTransformation, axis: str = "worker", *, specs: PyTree = None) -> Algorithm:
    """Synchronous data parallelism, AllReduce-SGD: every worker steps with the gradient averaged over all workers.

    `specs` tells how gradients lie inside a worker of several devices, as in `gossip`.

    >>> algorithm, x, grads = average_grads(optax.sgd(1.0)), jnp.zeros(4), jnp.arange(4.0)
    >>> jax.vmap(lambda g, x: algorithm.update(g, algorithm.init(x), x, 0)[0], axis_name="worker")(grads, x).tolist()
    [-1.5, -1.5, -1.5, -1.5]
    """

    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads, state, params, step, **extra):
        updates, state = optimizer.update(average(axis, specs=specs)(grads, step), state, params, **extra)
        return optax.apply_updates(params, updates), state

    return Algorithm(optimizer.init, update)


class CountedState(NamedTuple):
    algorithm: PyTree
    count: jax.Array  # shape=(), dtype=int32


def as_optax(algorithm: Algorithm) -> optax.GradientTransformationExtraArgs:
    """The algorithm as an optimizer for an unchanged training loop: its updates are `new parameters - parameters`.

    The loop must run once per worker: wrap its step in `per_worker` (or an own `shard_map` or `vmap` with a named
    axis); in a plain data-parallel `jit` there is only one copy of the parameters and nothing to mix.
    `optax.apply_updates` adds the difference back, so float32 parameters are `algorithm.update`'s to the rounding of
    the larger of old and new. Steps are counted in the optimizer's own state, which the type system takes to vary
    between workers: exchanges at every step over channels work, `every` and a switch are refused.

    Transforms that skip updates by a condition (`optax.apply_if_finite`) go around the optimizer inside the algorithm,
    never around `as_optax`: a worker that skips its update would send nothing, and all would wait for it for ever.

    Raises `ValueError` for algorithms whose model is not their parameters (push-sum): the loop would take gradients at
    biased values; and, in the step, if parameters are not passed to `update`.

    >>> from crossover_jax import crossover_sgd
    >>> tx = as_optax(crossover_sgd(optax.adam(1e-3), num_workers=8))
    >>> tx.init({"w": jnp.zeros(100)}).count.item()
    0
    """
    if algorithm.model is not _params_as_they_are:
        raise ValueError(
            "`algorithm` must train its parameters as they are: push-sum needs `algorithm.model` in the loss."
        )

    def init(params):
        return CountedState(algorithm.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("`params` must be passed to `update`, as `tx.update(grads, state, params)`, got None.")
        new, inner = algorithm.update(updates, state.algorithm, params, state.count, **extra)
        return jax.tree.map(_difference, new, params), CountedState(inner, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    """In float32 at least: a difference rounded to bfloat16 would not lead back to `new`."""
    wide = widened(new.dtype)
    return new.astype(wide) - old.astype(wide)
