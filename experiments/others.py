"""Algorithms of others, written from their equations to be compared with: NoLoCo and DES-LOC."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import crossover_jax as cj
from crossover_jax import topology
from crossover_jax.algorithms import is_like

PyTree = Any


class NoLoCoState(NamedTuple):
    inner: PyTree
    slow: PyTree  # φ, the parameters after the last outer step
    momentum: PyTree


def noloco(
    optimizer: optax.GradientTransformation, mix: cj.Mix, every: int, learning_rate: float, momentum: float
) -> cj.Algorithm:
    """After each `every` inner steps m <- μ m − η WΔ + η (Wφ − φ), φ <- φ + m, θ <- φ, with Δ = φ − θ.

    W is one exchange, in which Δ and φ travel: two models per period, where `crossover_jax.outer` sends one. `mix` is
    of pairs in the paper (`pairs`). Of parameters that are all floating-point.

    Reference: NoLoCo, arXiv:2506.10911, and the authors' code, whose η is the rate of both terms.

    >>> algorithm = noloco(optax.sgd(1.0), cj.average(), every=1, learning_rate=0.5, momentum=0.5)
    >>> x, grads = jnp.zeros(4), jnp.arange(4.0)
    >>> state = jax.vmap(algorithm.init)(x)
    >>> jax.vmap(algorithm.update, in_axes=(0, 0, 0, None), axis_name="worker")(grads, state, x, 0)[0].tolist()
    [-0.75, -0.75, -0.75, -0.75]
    """
    local = cj.mix_after(optimizer, cj.chain())

    def init(params):
        slow = jax.tree.map(jnp.copy, params)  # a loop that donates both would donate one buffer twice
        return NoLoCoState(local.init(params), slow, jax.tree.map(jnp.zeros_like, params))

    def outer_step(trees, count):
        fast, slow, m = trees
        delta = jax.tree.map(jnp.subtract, slow, fast)
        mixed, mean_delta = mix((slow, delta), count)
        m = jax.tree.map(
            lambda m, d, w, x: momentum * m - learning_rate * d + learning_rate * (w - x), m, mean_delta, mixed, slow
        )
        slow = jax.tree.map(jnp.add, slow, m)
        return slow, slow, m

    sometimes = cj.every(every, outer_step)

    def update(grads, state, params, step, **extra):
        params, inner = local.update(grads, state.inner, params, step, **extra)
        params, slow, m = sometimes((params, state.slow, state.momentum), step)
        return params, NoLoCoState(inner, slow, m)

    return cj.Algorithm(init, update)


def pairs(num_workers: int, pool_size: int, seed: int = 0) -> topology.Pool:
    """Rounds of random pairs, each of which takes its mean. Raises `ValueError` for an odd number of workers.

    >>> pairs(2, pool_size=1).matrix(0).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    if num_workers % 2:
        raise ValueError(f"`num_workers` must be even for pairs, got {num_workers}.")
    rng = np.random.default_rng([seed, num_workers, pool_size])
    receive_from = np.empty((pool_size, 1, num_workers), int)
    for row in receive_from[:, 0]:
        a, b = rng.permutation(num_workers).reshape(2, -1)
        row[a], row[b] = b, a
    return topology.Pool.from_peers(receive_from, 0.5)


def des_loc(
    optimizer: optax.GradientTransformation, mix: cj.Mix, every: int, first_every: int, second_every: int
) -> cj.Algorithm:
    """Adam whose moments travel on clocks of their own: x after each `every` steps, m and v at each so many exchanges.

    x <- W x, m <- W m, v <- W v, each by `mix` with the number of its own exchanges so far. With 3 and 6 it is 1 + 1/3
    + 1/6 of the bytes of x alone. Raises `ValueError` for an optimizer without `mu` and `nu` in its state.

    Reference: DES-LOC, arXiv:2505.22549; W is the average over all workers there.

    >>> algorithm = des_loc(optax.adam(0.1), cj.average(), every=1, first_every=3, second_every=6)
    >>> algorithm.init(jnp.zeros(3))[0].mu.tolist()
    [0.0, 0.0, 0.0]
    """
    local = cj.mix_after(optimizer, cj.every(every, mix))
    clocks = {"mu": cj.every(every * first_every, mix), "nu": cj.every(every * second_every, mix)}

    def name_of(path: tuple) -> str:
        return jax.tree_util.keystr(path[-1:], simple=True)

    def init(params):
        state = local.init(params)
        found = jax.tree.leaves_with_path(state, is_leaf=is_like(params))
        if missing := clocks.keys() - {name_of(path) for path, _ in found}:
            raise ValueError(f"`optimizer` must keep `mu` and `nu`, as AdamW does, got one without {min(missing)}.")
        return state

    def update(grads, state, params, step, **extra):
        new, state = local.update(grads, state, params, step, **extra)
        is_moment = is_like(params)

        def mixed(path: tuple, x: PyTree) -> PyTree:
            return clocks[name_of(path)](x, step) if is_moment(x) and name_of(path) in clocks else x

        return new, jax.tree.map_with_path(mixed, state, is_leaf=is_moment)

    return cj.Algorithm(init, update)
