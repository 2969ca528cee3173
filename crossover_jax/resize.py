"""The state of n workers on m: a run goes on with another number of workers than it was saved with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float64

from crossover_jax.leaves import PyTree, flatten, fold_in, is_key, travels, widened
from crossover_jax.push_sum import PushSumState


def overlap_matrix(n: int, m: int) -> Float64[np.ndarray, "m n"]:
    """R[j, i] = m·|[j/m, (j+1)/m) ∩ [i/n, (i+1)/n)|: each of m workers is made of those of n that were in its place.

    The identity for n = m; neighbours are averaged where m divides n, and copied where n divides m. Rows sum to 1,
    columns to m/n, which keeps the mean over workers. Raises `ValueError` for fewer than one worker.

    >>> overlap_matrix(4, 2)
    array([[0.5, 0.5, 0. , 0. ],
           [0. , 0. , 0.5, 0.5]])
    """
    _check_numbers(n, m)
    new, old = np.arange(m)[:, None], np.arange(n)  # in units of 1/(n·m) worker j begins at j·n, and was i at i·m
    return np.maximum(np.minimum((new + 1) * n, (old + 1) * m) - np.maximum(new * n, old * m), 0) / n


def average_matrix(n: int, m: int) -> Float64[np.ndarray, "m n"]:
    """Every entry 1/n: all m workers start from the average of n. Raises `ValueError` for fewer than one worker.

    >>> average_matrix(4, 1)
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    _check_numbers(n, m)
    return np.full((m, n), 1 / n)


def _check_numbers(n: int, m: int) -> None:
    for name, value in (("n", n), ("m", m)):
        if value < 1:
            raise ValueError(
                f"`{name}` must be at least 1 worker, got {value}: pass how many there were, and shall be."
            )


def resize(tree: PyTree, matrix: np.ndarray) -> PyTree:
    """The state of m workers from that of n: floating-point leaves `[n, ...]` become `matrix @ leaf`, `[m, ...]`.

    `matrix`, `[m, n]` on the host, has rows that sum to 1. Products are taken in float32 at least, as what differs from
    one worker that the row names: workers that are equal stay equal in every bit, and a row with a single 1 copies its
    worker's bits. Counters, `[n]` integers, become the highest of all, so that a worker that skipped a step catches up.
    All else (flags, keys) is that of the worker with the largest share; keys that come from one worker are made
    different. Push-sum weights `[n, segments, n]` are resized as what they divide: the model is (R x)/(R w).

    Raises `ValueError` for another matrix, and for a leaf without the leading axis of n workers. A sharded state is
    resized in place by `jax.jit(partial(resize, matrix=matrix), out_shardings=...)(state)`. Sharded by workers, a
    device may need room for n models; if it holds a part of the elements of all workers,
    `PartitionSpec(None, ("worker", "fsdp"))`, for 1-3.

    >>> state = {"w": jnp.arange(4.0), "count": jnp.full(4, 7)}
    >>> resized = resize(state, overlap_matrix(4, 2))
    >>> resized["w"].tolist(), resized["count"].tolist()
    ([0.5, 2.5], [7, 7])
    """
    matrix = np.asarray(matrix, np.float64)
    has_rows = matrix.ndim == 2 and matrix.size > 0
    if not has_rows or not np.allclose(matrix.sum(1), 1, rtol=0, atol=1e-6):
        got = f"sums {matrix.sum(1)}" if has_rows else f"shape {matrix.shape}"
        raise ValueError(f"`matrix` must be [m, n] with rows that sum to 1, got {got}: make it by `overlap_matrix`.")
    names, leaves, _ = flatten(tree)
    for name, leaf in zip(names, leaves, strict=True):
        if np.shape(leaf)[:1] != (matrix.shape[1],):
            raise ValueError(
                f"leaf {name!r} must have a leading axis of {matrix.shape[1]} workers, the columns of `matrix`, got "
                f"shape {np.shape(leaf)}: stack it with `copies`, or make the matrix for as many."
            )
    # The largest share first: sums begin with its worker, and what cannot be averaged is that worker's.
    sources = np.argsort(-np.abs(matrix), axis=1, kind="stable")[:, : (matrix != 0).sum(1).max()]
    earlier = np.tril(sources[:, :1] == sources[:, 0], -1).sum(1)  # how many new workers before have the same first one
    return _resized(tree, sources.T, np.take_along_axis(matrix, sources, 1).T, earlier)


@jax.jit
def _resized(tree: PyTree, sources: jax.Array, shares: jax.Array, earlier: jax.Array) -> PyTree:
    """Worker j becomes Σ_k shares[k, j]·(worker sources[k, j]); the first of them, of any share, is what is left of 1.

    A loop of gathers, where a product of matrices would hold n models on each device and let a worker that diverged
    spoil all, zero times infinity being no number.
    """

    def mixed(x):
        wide = widened(x.dtype)
        first = x[sources[0]]
        parts = shares.reshape(*shares.shape, *[1] * (x.ndim - 1)).astype(wide)

        def add(k, total):
            here, ours = x[sources[k]].astype(wide), first.astype(wide)
            nothing = (parts[k] == 0) | (here == ours)  # also for equal infinities
            return total + parts[k] * jnp.where(nothing, 0, here - ours)

        change = lax.fori_loop(1, len(sources), add, jnp.zeros(first.shape, wide))
        return jnp.where(change == 0, first, (first.astype(wide) + change).astype(x.dtype))  # −0 + 0 would be +0

    def copied(x):
        if is_key(x, leading=1):
            # By the new number: `copies` folded the worker alone, and so would give one of them the same key again.
            return jax.vmap(partial(fold_in, purpose=len(earlier)))(x[sources[0]], earlier)
        if x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.broadcast_to(x.max(), sources.shape[1:])
        return x[sources[0]]

    def weights(w):
        if w.shape[2:] != w.shape[:1]:
            raise ValueError(f"push-sum weights must be [n, segments, n], got {w.shape}: stack them with `copies`.")
        own = jnp.diagonal(w, axis1=0, axis2=2)  # [segments, n]: what each worker says of itself
        return jnp.broadcast_to(mixed(own.T).T, (sources.shape[1], w.shape[1], sources.shape[1]))

    return _map(lambda x: mixed(x) if travels(x) else copied(x), weights, tree)


def _map(leaf: Callable[[Any], Any], weights: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """`jax.tree.map`, with another function for push-sum weights."""

    def one(node):
        if isinstance(node, PushSumState):
            return PushSumState(_map(leaf, weights, node.optimizer), weights(node.weights))
        return leaf(node)

    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, PushSumState))
