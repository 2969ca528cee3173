"""What an exchange compiles to; the only `ppermute`.

Channels: every round is a permute, and a table that chooses at run time chooses which segments travel on it. Switch:
every segment chooses among permutes. Index: one device holds all workers and reads what would have been sent.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from crossover_jax.leaves import widened
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.tables import Table
from crossover_jax.wire import BLOCK, Wire


def row_at(table: Table, step: Any) -> Array:
    """The table's row at a traced `step`."""
    return jnp.asarray(table)[_wrapped(step, len(table))]


def _wrapped(step: Array, period: int) -> Array:
    step = step.astype(jnp.int32) if step.dtype.itemsize < 4 else step  # a uint8 cannot be compared with 1024
    return step % period


# What an exchange works on: arrays that are cut, and of each the dimension along which, and where: [segments + 1].
Pieces = Sequence[tuple[int, tuple[int, ...]]]
# A channel: a round and the segments that travel on it, (first, how many); traced where the table decides.
Channels = Sequence[tuple[int, Sequence[tuple[Any, int]]]]


def static_channels(row: np.ndarray) -> Channels:
    """Neighbours that share a round travel as one."""
    at = [np.flatnonzero(row == p) for p in np.unique(row[row >= 0])]
    runs = [np.split(s, np.flatnonzero(np.diff(s) > 1) + 1) for s in at]
    return [(int(row[r[0][0]]), [(int(s[0]), len(s)) for s in r]) for r in runs]


def traced_channels(table: Table, step: Any) -> Channels:
    rounds, uses = np.unique(table[0][table[0] >= 0], return_counts=True)
    at_home = table.shape[1] - uses.sum()
    by_round = np.argsort(table, axis=1, kind="stable")[:, at_home:].astype(np.int32)
    segments = jnp.asarray(by_round)[_wrapped(step, len(table))]
    parts = iter([(segments[i], 1) for i in range(by_round.shape[1])])
    return [(p, [next(parts) for _ in range(n)]) for p, n in zip(rounds.tolist(), uses.tolist(), strict=True)]


def exchange_by_channels(
    arrays: list[Array], pieces: Pieces, channels: Channels, pool: Pool, axis: str, wire: Wire, in_flight: int | None
) -> list[Array]:
    """Groups of `in_flight` channels (None: of all) one after the other; in a group no message waits for another."""
    size = in_flight or len(channels) or 1
    for first in range(0, len(channels), size):
        arrays = _exchange(arrays, pieces, channels[first : first + size], pool, axis, wire)
    return arrays


def _exchange(
    arrays: list[Array], pieces: Pieces, channels: Channels, pool: Pool, axis: str, wire: Wire
) -> list[Array]:
    """All segments leave before any is written back.

    The barriers keep what left and what arrived alive, and no more: without them the TPU compiler holds the arrays
    while messages arrive and makes room for the result before the last is averaged, 2.8 to 5.1 models
    (tests/test_memory.py).
    """
    sent = lax.optimization_barrier([_take(arrays, pieces, segments) for _, segments in channels])
    received = [_receive(x, pool, p, axis, wire) for x, (p, _) in zip(sent, channels, strict=True)]
    sent, received = lax.optimization_barrier((sent, received))
    shares = [_shares(pool, p, axis) for p, _ in channels]
    mixed = [_average(x, wire.quantize(x), y, share) for x, y, share in zip(sent, received, shares, strict=True)]
    leaving = sum(count for _, segments in channels for _, count in segments)
    if leaving == len(pieces[0][1]) - 1:  # nothing stays at home: they are not needed any more
        mixed = lax.optimization_barrier(mixed)
        arrays = [jnp.zeros_like(x) for x in arrays]
    for (_, segments), x in zip(channels, mixed, strict=True):
        arrays = _put(arrays, pieces, segments, x)
    return arrays


def _take(arrays: list[Array], pieces: Pieces, segments: Sequence[tuple[Any, int]]) -> Array:
    """The parts of all arrays that segments are made of, in one vector."""
    parts = [
        _slice(x, *_place(bounds, first, count), d).reshape(-1)
        for first, count in segments
        for x, (d, bounds) in zip(arrays, pieces, strict=True)
    ]
    if len(arrays) == 1:
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)
    size = sum(part.size for part in parts)
    if size >= 64 * BLOCK and size % BLOCK:  # int8 would copy the vector to fill its last block up
        parts.append(jnp.zeros_like(parts[0], shape=-size % BLOCK))
    # XLA:CPU would make an array of each part before it concatenates them; on TPUs filling a vector needs more memory.
    return lax.platform_dependent(*parts, cpu=_fill, default=lambda *parts: jnp.concatenate(parts))


def _fill(*parts: Array) -> Array:
    vector, at = jnp.zeros_like(parts[0], shape=sum(part.size for part in parts)), 0
    for part in parts:
        vector = lax.dynamic_update_slice_in_dim(vector, part, at, 0)
        at += part.size
    return vector


def _slice(x: Array, start: Any, length: int, dimension: int) -> Array:
    if isinstance(start, int):
        return lax.slice_in_dim(x, start, start + length, axis=dimension)
    return lax.dynamic_slice_in_dim(x, start, length, dimension)


def _put(arrays: list[Array], pieces: Pieces, segments: Sequence[tuple[Any, int]], vector: Array) -> list[Array]:
    """The arrays with a vector written where it was `_take`n from."""
    arrays, at = list(arrays), 0
    for first, count in segments:
        for i, (d, bounds) in enumerate(pieces):
            start, length = _place(bounds, first, count)
            shape = (*arrays[i].shape[:d], length, *arrays[i].shape[d + 1 :])
            part = vector[at : at + math.prod(shape)].reshape(shape)
            arrays[i] = lax.dynamic_update_slice_in_dim(arrays[i], part, start, d)
            at += part.size
    return arrays


def _place(bounds: tuple[int, ...], first: Any, count: int) -> tuple[Any, int]:
    """Where segments begin, and how long they are; which they are is traced only where all are equally long."""
    if isinstance(first, int):
        return bounds[first], bounds[first + count] - bounds[first]
    return first * bounds[1], count * bounds[1]


def exchange_by_switch(
    arrays: list[Array], pieces: Pieces, row: Array, table: Table, pool: Pool, axis: str, wire: Wire
) -> list[Array]:
    def mix_round(p: int, x: Array) -> Array:
        if p < 0:
            return x
        return _average(x, wire.quantize(x), _receive(x, pool, p, axis, wire), _shares(pool, p, axis))

    mixed = []
    for s in range(table.shape[1]):
        rounds = np.unique(table[:, s])  # only what this segment ever takes is compiled into its switch
        branches = [partial(mix_round, p) for p in rounds.tolist()]
        part = _take(arrays, pieces, [(s, 1)])
        mixed.append(lax.switch(jnp.searchsorted(rounds.astype(np.int32), row[s]), branches, part))
    return _join(arrays, pieces, mixed)


def exchange_by_index(
    arrays: list[Array], pieces: Pieces, row: Array, pool: Pool, axis: str, wire: Wire
) -> list[Array]:
    """The same exchange where one device holds all workers: everybody reads what he would have got.

    A batched `ppermute` would read element by element on a CPU (benchmarks/simulated_exchange.py).
    """
    parts = [_take(arrays, pieces, [(s, 1)]) for s in range(len(row))]
    round_, me = jnp.maximum(row, 0), lax.axis_index(axis)
    share = jnp.asarray(pool.share, widened(parts[0].dtype))[round_, :, me]
    sources = jnp.asarray(pool.receive_from)[round_, :, me]
    mixed = []
    for s, part in enumerate(parts):
        sent = wire.quantize(part)
        everyone = lax.all_gather(sent, axis)
        received = [jnp.take(everyone, j, axis=0, mode="clip") for j in sources[s]]
        mixed.append(jnp.where(row[s] < 0, part, _average(part, sent, received, share[s])))
    return _join(arrays, pieces, mixed)


def _join(arrays: list[Array], pieces: Pieces, vectors: list[Array]) -> list[Array]:
    """The arrays that are made of all segments, each a vector as it was `_take`."""
    parts: list[list[Array]] = [[] for _ in arrays]
    for s, vector in enumerate(vectors):
        at = 0
        for i, (d, bounds) in enumerate(pieces):
            shape = (*arrays[i].shape[:d], bounds[s + 1] - bounds[s], *arrays[i].shape[d + 1 :])
            parts[i].append(vector[at : at + math.prod(shape)].reshape(shape))
            at += math.prod(shape)
    return [jnp.concatenate(of_one, d) for of_one, (d, _) in zip(parts, pieces, strict=True)]


def _receive(x: Array, pool: Pool, p: int, axis: str, wire: Wire) -> list[Array]:
    """What the messages of a round say, one `ppermute` per peer that anybody listens to."""
    message = wire.encode(x)
    # Fixed points are pairs too: vmap refuses partial permutations, and on GPUs they can hang.
    pairs = [[(int(j), i) for i, j in enumerate(pool.receive_from[p, k])] for k in _peers(pool, p)]
    return [wire.decode(lax.ppermute(message, axis, pairs_of_peer), x) for pairs_of_peer in pairs if x.size]


def _average(x: Array, sent: Array, received: list[Array], share: Sequence[Any] | Array) -> Array:
    """x_i <- share[0] x_i + Σ_k share[1 + k] x_j, in float32 at least, returned in the dtype of `x`.

    Where messages are rounded to Q(x), a worker subtracts what it *sent*, not what it holds:
    x_i − (1 − share[0]) Q(x_i) + Σ_k share[1 + k] Q(x_j). The sum over i is then exact for any Q.
    """
    wide = widened(x.dtype)
    mixed = _scaled(share[0], x.astype(wide))
    if sent is not x:
        mixed = x.astype(wide) - _scaled(1 - share[0], sent.astype(wide))
    for message, of_message in zip(received, share[1:], strict=bool(x.size)):
        mixed = mixed + _scaled(of_message, message.astype(wide))
    if sent is not x:
        # What was rounded up on one side only may lie behind the largest number of the dtype.
        largest = jnp.asarray(jnp.finfo(x.dtype).max, wide)
        mixed = jnp.where(jnp.isfinite(x), jnp.clip(mixed, -largest, largest), mixed)
    return mixed.astype(x.dtype)


def _peers(pool: Pool, p: int) -> list[int]:
    return np.flatnonzero(pool.share[p, 1:].any(-1)).tolist()


def _shares(pool: Pool, p: int, axis: str) -> list[Any]:
    """This worker's, of itself and of the peers that anybody listens to; a number where all workers have the same."""
    rows = [pool.share[p, k] for k in (0, *(1 + k for k in _peers(pool, p)))]
    return [row[0] if (row == row[0]).all() else jnp.asarray(row)[lax.axis_index(axis)] for row in rows]


def _scaled(share: Any, x: Array) -> Array:
    """A share of 0 takes nothing, not even the NaN of a message that nobody wanted."""
    if isinstance(share, float):
        return jnp.asarray(share, x.dtype) * x
    share = share.astype(x.dtype)
    return jnp.where(share == 0, 0, share * x)
