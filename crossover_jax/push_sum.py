"""Stochastic gradient push: gossip over pools that keep only mass, with weights that take out what they distort."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from crossover_jax.algorithms import Algorithm, apply_if_finite, init_of
from crossover_jax.axes import axis_or_default, check_axis, vary
from crossover_jax.cuts import Cut
from crossover_jax.deprecated import renames
from crossover_jax.leaves import PyTree, widened
from crossover_jax.lowering import Pieces, row_at
from crossover_jax.mixing import Step, TableOrFunction, exchange, make_table
from crossover_jax.packing import Leaves, map_packed
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.tables import Table, shuffle


class PushSumState(NamedTuple):
    optimizer: PyTree
    weights: jax.Array  # [segments, workers], the same on all workers


@renames(cut_at=2, where="leaves")
def push_sum(
    optimizer: optax.GradientTransformation,
    pool: Pool,
    cut: Cut,
    table: TableOrFunction = shuffle,
    *,
    axis: str | None = None,
    leaves: Leaves = None,
    specs: PyTree = None,
    wire: str | None = None,
    in_flight: int | None = None,
) -> Algorithm:
    """Stochastic gradient push: x <- W(x + u(z)), w <- W w, z = x / w, for pools that keep only mass.

    Gradient, optimizer and weight decay see the unbiased z; the optimizer's update is added to the biased x. Where the
    pool keeps agreement too, w stays 1 and this is `mix_after`. The weights are exact whatever the `wire`, which keeps
    the mass too. Arguments are `gossip`'s. Raises `ValueError` if the pool does not keep mass.

    Every worker computes all weights, so none is sent with a message. At each step workers tell each other their own,
    `[segments, workers]` numbers: where a loop restores one worker's state, its peers go on with its old weight.

    Reference: Assran et al., Stochastic Gradient Push, arXiv:1811.10792, Algorithm 1.

    >>> from crossover_jax import topology, whole
    >>> algorithm = push_sum(optax.sgd(0.0), topology.pull(4, 1).transpose(), whole())
    >>> x = jnp.arange(4.0)
    >>> step = jax.vmap(lambda x, s: algorithm.update(x, s, x, 0), in_axes=(0, None), axis_name="worker")
    >>> x, state = step(x, algorithm.init(x[0]))
    >>> x.sum().item(), state.weights[0].sum().item()
    (6.0, 4.0)
    """
    if not pool.keeps_mass:
        raise ValueError("`pool` must keep mass (columns of W sum to 1) for push-sum, this one does not: transpose it?")
    optimizer, table = optax.with_extra_args_support(optimizer), make_table(table, pool, cut)
    mix = exchange(pool, cut, table, axis, leaves, specs, wire, in_flight)
    push, z = push_weights(pool, table), unbias(cut, axis, leaves=leaves, specs=specs)
    first = init_of(optimizer)

    def init(params):
        weights = jnp.ones((cut.num_segments, pool.num_workers), jax.dtypes.canonicalize_dtype(np.float64))
        return PushSumState(first(params), weights)

    def update(grads, state, params, step, **extra):
        updates, new = optimizer.update(grads, state.optimizer, z(params, state.weights), **extra)
        params, new = apply_if_finite(params, updates, new, state.optimizer)
        weights = push(_as_each_has_it(state.weights, axis_or_default(axis)), step)
        return mix(params, step), PushSumState(new, weights)

    return Algorithm(init, update, lambda params, state: z(params, state.weights))


def _as_each_has_it(weights: Array, axis: str) -> Array:
    """Column i by worker i: what a worker holds of its peers is too new if their state was restored."""
    return vary(lax.all_gather(weights[:, lax.axis_index(axis)], axis, axis=1), axis)


def push_weights(pool: Pool, table: Table) -> Callable[[Array, Step], Array]:
    """Push-sum weights of all workers after a round: w[s] <- W w[s], W = pool.matrix(table[step, s]).

    They depend on pool and table only, so every worker computes all of them, `[segments, workers]`.
    """
    everyone = np.broadcast_to(np.arange(pool.num_workers), (1, pool.num_workers))
    # The last round is the one in which everybody stays at home, so that −1 in the table finds it.
    share = np.concatenate([pool.share, np.eye(pool.num_peers + 1)[:1, :, None] + 0 * pool.share[:1]])
    sources = np.concatenate([pool.receive_from, np.broadcast_to(everyone, (1, *pool.receive_from.shape[1:]))])

    def push(weights: Array, step: Step) -> Array:
        row = row_at(table, jnp.asarray(step))
        own, *others = jnp.moveaxis(jnp.asarray(share, weights.dtype)[row], 1, 0)
        pushed = own * weights
        for k, part in enumerate(others):
            pushed = pushed + part * jnp.take_along_axis(weights, jnp.asarray(sources)[row, k], axis=1)
        return pushed

    return push


def unbias(
    cut: Cut, axis: str | None = None, *, leaves: Leaves = None, specs: PyTree = None
) -> Callable[[PyTree, Array], PyTree]:
    """Divide each segment of a worker's values by its push-sum weight: z = x / w, the model that SGP trains.

    Weights are `[segments, workers]`, as `push_weights` keeps them.
    """

    def divide_packed(arrays: list[Array], pieces: Pieces, weights: Array) -> list[Array]:
        divided = []
        for x, (d, bounds) in zip(arrays, pieces, strict=True):
            wide = widened(x.dtype)
            scale = jnp.repeat(weights.astype(wide), np.diff(bounds), total_repeat_length=bounds[-1])
            scale = jnp.expand_dims(scale, [*range(d), *range(d + 1, x.ndim)])
            divided.append((x.astype(wide) / scale).astype(x.dtype))
        return divided

    def divide(tree: PyTree, weights: Array) -> PyTree:
        along = axis_or_default(axis)
        check_axis(along)
        return map_packed(divide_packed, tree, cut, along, leaves, specs, weights[:, lax.axis_index(along)])

    return divide
