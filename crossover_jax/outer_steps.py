"""Two optimizers: an inner one at every step, an outer one when workers exchange what they have become."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from crossover_jax.algorithms import Algorithm, apply_if_finite, is_like, mix_after, params_as_they_are
from crossover_jax.axes import axis_or_default
from crossover_jax.leaves import PyTree, flatten, travels
from crossover_jax.mixing import AnyMix, as_mix, chain
from crossover_jax.packing import Leaves
from crossover_jax.steps import after_each


class OuterState(NamedTuple):
    inner: PyTree
    slow: PyTree  # φ, the parameters after the last outer step, of the leaves that travel
    outer: PyTree


def outer(
    inner: Algorithm | optax.GradientTransformation,
    outer_optimizer: optax.GradientTransformation | None,
    mix: AnyMix,
    every: int,
    *,
    overlap: bool = False,
) -> Algorithm:
    """After each `every` inner steps an outer one: φ <- W(φ + u(φ − θ)), θ <- φ.

    θ are the parameters, φ what they were after the last outer step. The outer optimizer sees φ − θ as its gradient and
    gives u, None: u = θ − φ, so that φ <- W θ. Between two outer steps nothing travels.

    With `overlap` it is φ <- W φ + u(φ − θ): the exchange needs only what the inner steps began with, so that it can
    hide behind all of them (see `period`). What the exchange changes is never part of φ − θ, nor of momentum.

    `average()` with `optax.sgd(η, momentum=μ, nesterov=True)` is DiLoCo in exact arithmetic if all φ begin alike, for
    u is then linear; Adam, clipping and signs are not linear, and differ. With `crossover(n)` one model per period
    travels. Compare momenta at one η / (1 − μ): the steps of an outer momentum are longer by 1 / (1 − μ).

    Args:
      inner: an optimizer, or an algorithm of its own exchanges, as `allreduce_sgd(optimizer, "fast")` inside a group.
      mix: its step is the number of outer steps before; leaves that it keeps at home take no outer step.
      every: inner steps between two outer ones.

    An outer step that is not finite is left out, and its worker goes on from φ. Raises `ValueError` for `every` below 1
    and for push-sum inside.
    Reference: Douillard et al., DiLoCo, arXiv:2311.08105, Algorithm 1.

    >>> from crossover_jax import average
    >>> algorithm = outer(optax.sgd(1.0), optax.sgd(0.5), average(), every=2)
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> state = jax.vmap(algorithm.init)(x)
    >>> update = jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")
    >>> for t in range(2):
    ...     x, state = update(grads, state, x, t)
    >>> x.tolist()
    [-1.5, -1.5, -1.5, -1.5]
    """
    if every < 1:
        raise ValueError(f"`every` must be at least 1, got {every}.")
    inner, mix = inner if isinstance(inner, Algorithm) else mix_after(inner, chain()), as_mix(mix)
    if inner.model is not params_as_they_are:
        raise ValueError("`inner` must train its parameters as they are, but push-sum trains x / w: use `mix_after`.")
    outer_optimizer = optax.sgd(1.0) if outer_optimizer is None else outer_optimizer

    def init(params):
        # A buffer of its own: a loop that donates parameters and state would donate theirs twice.
        slow = jax.tree.map(jnp.copy, _moving(params, mix.leaves))
        return OuterState(inner.init(params), slow, outer_optimizer.init(slow))

    def outer_step(pair, count):
        fast, (slow, state) = pair
        delta = jax.tree.map(lambda x, y: x - y, slow, fast)
        updates, new = outer_optimizer.update(delta, state, slow)
        mixed = mix(slow, count) if overlap else slow
        stepped, new = apply_if_finite(slow, updates, new, state, onto=mixed)
        stepped = stepped if overlap else mix(stepped, count)
        if mix.stays is None:
            return stepped, (stepped, new)
        stays = mix.stays(slow, count)
        return _at_home(stays, fast, stepped), (_at_home(stays, slow, stepped), _state_at_home(stays, state, new))

    def update(grads, state, params, step, **extra):
        params, own = inner.update(grads, state.inner, params, step, **extra)
        fast = _moving(params, mix.leaves)
        axis = axis_or_default(mix.axis)
        fast, (slow, outer_state) = after_each(every, step, outer_step, (fast, (state.slow, state.outer)), axis)
        return _merged(params, fast), OuterState(own, slow, outer_state)

    return Algorithm(init, update)


def _moving(params: PyTree, leaves: Leaves) -> PyTree:
    """The leaves that take outer steps; a masked node, without leaves, stands for each of the others."""
    names, values, treedef = flatten(params)
    return treedef.unflatten(
        x if travels(x) and (leaves is None or leaves(name)) else optax.MaskedNode()
        for name, x in zip(names, values, strict=True)
    )


def _merged(params: PyTree, moving: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x if isinstance(y, optax.MaskedNode) else y, params, moving)


def _at_home(stays: PyTree, old: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(jnp.where, stays, old, new)


def _state_at_home(stays: PyTree, old: PyTree, new: PyTree) -> PyTree:
    """Momenta of elements that take no outer step stay as they are."""
    is_momentum = is_like(stays)
    return jax.tree.map(lambda x, y: _at_home(stays, x, y) if is_momentum(x) else y, old, new, is_leaf=is_momentum)
