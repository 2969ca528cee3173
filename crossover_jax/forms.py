"""The compiled forms of an exchange of one packed vector; the only `ppermute`.

Channels: every round is a permute, and a table that chooses at run time chooses which segments travel on it. Switch:
every segment chooses among permutes. Index: one device holds all workers and reads what would have been sent.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from crossover_jax.cuts import widened
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.tables import Table
from crossover_jax.wire import decode, encode, said


def row_at(table: Table, step: Any) -> Array:
    """The table's row at a traced `step`."""
    return jnp.asarray(table)[_wrapped(step, len(table))]


def _wrapped(step: Array, period: int) -> Array:
    step = step.astype(jnp.int32) if step.dtype.itemsize < 4 else step  # a uint8 cannot be compared with 1024
    return step % period


# A channel: a round and the segments that travel on it, (start, length); starts are traced where the table decides.
Channels = Sequence[tuple[int, Sequence[tuple[Any, int]]]]


def static_channels(row: np.ndarray, bounds: tuple[int, ...]) -> Channels:
    """Neighbours that share a round travel as one."""
    at = [np.flatnonzero(row == p) for p in np.unique(row[row >= 0])]
    runs = [np.split(s, np.flatnonzero(np.diff(s) > 1) + 1) for s in at]
    return [(int(row[r[0][0]]), [(bounds[s[0]], bounds[s[-1] + 1] - bounds[s[0]]) for s in r]) for r in runs]


def traced_channels(table: Table, step: Any, bounds: tuple[int, ...]) -> Channels:
    rounds, uses = np.unique(table[0][table[0] >= 0], return_counts=True)
    at_home = table.shape[1] - uses.sum()
    by_round = np.argsort(table, axis=1, kind="stable")[:, at_home:].astype(np.int32)
    length = bounds[1] - bounds[0]
    starts = jnp.asarray(by_round)[_wrapped(step, len(table))] * length
    parts = iter([(starts[i], length) for i in range(by_round.shape[1])])
    return [(p, [next(parts) for _ in range(n)]) for p, n in zip(rounds.tolist(), uses.tolist(), strict=True)]


def by_channels(
    flat: Array, channels: Channels, pool: Pool, axis: str, wire: str | None, in_flight: int | None = None
) -> Array:
    """Groups of `in_flight` channels (None: of all) one after the other; in a group no message waits for another."""
    size = in_flight or len(channels) or 1
    for first in range(0, len(channels), size):
        flat = _exchanged(flat, channels[first : first + size], pool, axis, wire)
    return flat


def _exchanged(flat: Array, channels: Channels, pool: Pool, axis: str, wire: str | None) -> Array:
    """All segments leave before any is written back.

    The barriers keep what left and what arrived alive, and no more: without them the TPU compiler holds `flat` while
    messages arrive and makes room for the result before the last is averaged, 2.8 to 5.1 models (tests/test_memory.py).
    """
    sent = lax.optimization_barrier([_taken(flat, segments) for _, segments in channels])
    received = [_received(x, pool, p, axis, wire) for x, (p, _) in zip(sent, channels, strict=True)]
    sent, received = lax.optimization_barrier((sent, received))
    shares = [_shares(pool, p, axis) for p, _ in channels]
    own = [said(x, wire) for x in sent]
    mixed = [_averaged(*each) for each in zip(sent, own, received, shares, strict=True)]
    if sum(x.size for x in mixed) == flat.size:  # nothing stays at home, so `flat` itself is not needed any more
        mixed = lax.optimization_barrier(mixed)
        flat = jnp.zeros_like(flat)
    for (_, segments), x in zip(channels, mixed, strict=True):
        ends = np.cumsum([length for _, length in segments])
        for (start, _), part in zip(segments, jnp.split(x, ends[:-1]), strict=True):
            flat = lax.dynamic_update_slice(flat, part, (start,))
    return flat


def _taken(flat: Array, segments: Sequence[tuple[Any, int]]) -> Array:
    parts = [lax.dynamic_slice(flat, (start,), (length,)) for start, length in segments]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def by_switch(
    flat: Array, bounds: tuple[int, ...], row: Array, table: Table, pool: Pool, axis: str, wire: str | None
) -> Array:
    def mix_round(p: int, x: Array) -> Array:
        if p < 0:
            return x
        return _averaged(x, said(x, wire), _received(x, pool, p, axis, wire), _shares(pool, p, axis))

    parts = []
    for s in range(table.shape[1]):
        part = flat[bounds[s] : bounds[s + 1]]
        rounds = np.unique(table[:, s])  # only what this segment ever takes is compiled into its switch
        branches = [partial(mix_round, p) for p in rounds.tolist()]
        parts.append(lax.switch(jnp.searchsorted(rounds.astype(np.int32), row[s]), branches, part))
    return jnp.concatenate(parts)


def by_index(flat: Array, bounds: tuple[int, ...], row: Array, pool: Pool, axis: str, wire: str | None) -> Array:
    """The same exchange where one device holds all workers: nothing is sent, everybody reads what he would have got.

    Batching `ppermute` would do too, but on a CPU it reads element by element, and here whole segments are read
    (benchmarks/simulated_exchange.py).
    """
    parts = [flat[start:end] for start, end in itertools.pairwise(bounds)]
    own = [said(x, wire) for x in parts]
    everyone, me = lax.all_gather(jnp.concatenate(own), axis), lax.axis_index(axis)
    round_ = jnp.maximum(row, 0)
    share = jnp.asarray(pool.share, widened(flat.dtype))[round_, :, me]
    sources = jnp.asarray(pool.receive_from)[round_, :, me]
    mixed = []
    for s, (start, end) in enumerate(itertools.pairwise(bounds)):
        received = [jnp.take(everyone[:, start:end], j, axis=0, mode="clip") for j in sources[s]]
        mixed.append(jnp.where(row[s] < 0, parts[s], _averaged(parts[s], own[s], received, share[s])))
    return jnp.concatenate(mixed)


def is_simulated(axis: str) -> bool:
    return type(lax.axis_index(axis)).__name__ == "BatchTracer"


def _received(x: Array, pool: Pool, p: int, axis: str, wire: str | None) -> list[Array]:
    """What the messages of a round say, one `ppermute` per peer that anybody listens to."""
    message = encode(x, wire)
    # Fixed points are pairs too: vmap refuses partial permutations, and on GPUs they can hang.
    pairs = [[(int(j), i) for i, j in enumerate(pool.receive_from[p, k])] for k in _peers(pool, p)]
    return [decode(lax.ppermute(message, axis, pairs_of_peer), x, wire) for pairs_of_peer in pairs if x.size]


def _averaged(x: Array, own: Array, received: list[Array], share: Sequence[Any] | Array) -> Array:
    """x_i <- share[0] x_i + Σ_k share[1 + k] x_j, in float32 at least, returned in the dtype of `x`.

    Where messages say less than `x`, with `own` = Q(x_i) and Q(x_j) in them, it is x_i − (1 − share[0]) Q(x_i) +
    Σ_k share[1 + k] Q(x_j), which keeps the sum over i.
    """
    wide = widened(x.dtype)
    mixed = _shared(share[0], x.astype(wide))
    if own is not x:
        mixed = x.astype(wide) - _shared(1 - share[0], own.astype(wide))
    for message, of_message in zip(received, share[1:], strict=bool(x.size)):
        mixed = mixed + _shared(of_message, message.astype(wide))
    return mixed.astype(x.dtype)


def _peers(pool: Pool, p: int) -> list[int]:
    return np.flatnonzero(pool.share[p, 1:].any(-1)).tolist()


def _shares(pool: Pool, p: int, axis: str) -> list[Any]:
    """This worker's, of itself and of the peers that anybody listens to; a number where all workers have the same."""
    rows = [pool.share[p, k] for k in (0, *(1 + k for k in _peers(pool, p)))]
    return [row[0] if (row == row[0]).all() else jnp.asarray(row)[lax.axis_index(axis)] for row in rows]


def _shared(share: Any, x: Array) -> Array:
    """A share of 0 takes nothing, not even the NaN of a message that nobody wanted."""
    if isinstance(share, float):
        return jnp.asarray(share, x.dtype) * x
    share = share.astype(x.dtype)
    return jnp.where(share == 0, 0, share * x)
