"""Stochastic gradient push: gossip over pools that keep only mass, with weights that take out what they distort."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array

from crossover_jax.algorithms import Algorithm
from crossover_jax.cuts import Cut, widened
from crossover_jax.forms import Pieces, row_at
from crossover_jax.mixing import Step, check_axis, exchange, map_packed
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.tables import Table

PyTree = Any


class PushSumState(NamedTuple):
    optimizer: PyTree
    weights: jax.Array  # [segments, workers], the same on all workers


def push_sum(
    optimizer: optax.GradientTransformation,
    pool: Pool,
    table: Table,
    cut: Cut,
    *,
    axis: str = "worker",
    where: Callable[[str], bool] | None = None,
    specs: PyTree = None,
    wire: str | None = None,
    in_flight: int | None = None,
) -> Algorithm:
    """Stochastic gradient push: x <- W(x + u(z)), w <- W w, z = x / w, for pools that keep only mass.

    Gradient, optimizer and weight decay see the unbiased z; the optimizer's update is added to the biased x. Where the
    pool keeps agreement too, w stays 1 and this is `mix_after`. The weights are exact whatever the `wire`, which keeps
    the mass too. Raises `ValueError` if the pool does not keep mass.

    Reference: Assran et al., Stochastic Gradient Push, arXiv:1811.10792, Algorithm 1.

    >>> from crossover_jax import cycle, pull, whole
    >>> algorithm = push_sum(optax.sgd(0.0), pull(4, 1).transpose(), cycle(1, 1), whole())
    >>> x = jnp.arange(4.0)
    >>> step = jax.vmap(lambda x, s: algorithm.update(x, s, x, 0), in_axes=(0, None), axis_name="worker")
    >>> x, state = step(x, algorithm.init(x[0]))
    >>> x.sum().item(), state.weights[0].sum().item()
    (6.0, 4.0)
    """
    if not pool.keeps_mass:
        raise ValueError("`pool` must keep mass (columns of W sum to 1) for push-sum, this one does not: transpose it?")
    optimizer = optax.with_extra_args_support(optimizer)
    mix, push, z = (
        exchange(pool, table, cut, axis, where=where, specs=specs, wire=wire, in_flight=in_flight),
        push_weights(pool, table),
        unbias(cut, axis, where=where, specs=specs),
    )

    def init(params):
        weights = jnp.ones((cut.num_segments, pool.num_workers), jax.dtypes.canonicalize_dtype(np.float64))
        return PushSumState(optimizer.init(params), weights)

    def update(grads, state, params, step, **extra):
        updates, optimizer_state = optimizer.update(grads, state.optimizer, z(params, state.weights), **extra)
        params = mix(optax.apply_updates(params, updates), step)
        return params, PushSumState(optimizer_state, push(state.weights, step))

    return Algorithm(init, update, lambda params, state: z(params, state.weights))


def push_weights(pool: Pool, table: Table) -> Callable[[Array, Step], Array]:
    """Push-sum weights of all workers after a round: w[s] <- W w[s], W = pool.matrix(table[step, s]).

    They depend on pool and table only, so every worker computes all of them, `[segments, workers]`, and none is sent.

    Reference: Stochastic Gradient Push, arXiv:1811.10792, Algorithm 1.
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
    cut: Cut, axis: str = "worker", *, where: Callable[[str], bool] | None = None, specs: PyTree = None
) -> Callable[[PyTree, Array], PyTree]:
    """Divide each segment of a worker's values by its push-sum weight: z = x / w, the model that SGP trains.

    Weights are `[segments, workers]`, as `push_weights` keeps them.

    Reference: Stochastic Gradient Push, arXiv:1811.10792, Algorithm 1.
    """

    def divide_packed(arrays: list[Array], pieces: Pieces, weights: Array) -> list[Array]:
        own, divided = weights[:, lax.axis_index(axis)], []
        for x, (d, bounds) in zip(arrays, pieces, strict=True):
            wide = widened(x.dtype)
            scale = jnp.repeat(own.astype(wide), np.diff(bounds), total_repeat_length=bounds[-1])
            scale = jnp.expand_dims(scale, [*range(d), *range(d + 1, x.ndim)])
            divided.append((x.astype(wide) / scale).astype(x.dtype))
        return divided

    def divide(tree: PyTree, weights: Array) -> PyTree:
        check_axis(axis)
        return map_packed(divide_packed, tree, cut, axis, where, specs, weights)

    return divide
