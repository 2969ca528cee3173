"""Tables: the round of the pool that each segment takes at step `t` is row `t mod period`; −1: it stays at home.

Drawn by numpy on the host: the same on every host, under every JAX version and after every resume.
"""

import numpy as np
from jaxtyping import Int

from crossover_jax.topology.pool import at_least

Table = Int[np.ndarray, "period segments"]


def shuffle(num_segments: int, pool_size: int, period: int = 1024, *, seed: int = 0) -> Table:
    """At every step, a random assignment of the rounds to the segments that uses every round equally often.

    Each segment takes every round with the same probability. When `pool_size` does not divide `num_segments`, how often
    rounds are used differs by at most one. Raises `ValueError` for sizes below 1.

    >>> np.sort(shuffle(4, pool_size=2, period=3), axis=1)
    array([[0, 0, 1, 1],
           [0, 0, 1, 1],
           [0, 0, 1, 1]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size, period=period)
    return _shuffled(_rng(seed, num_segments, pool_size), period, num_segments, pool_size)


def rotate(num_segments: int, pool_size: int) -> Table:
    """Segment `s` takes round (s + t) mod P at step `t`: all walk through the pool in order, each in its own phase.

    Over `exponential` or `base`, every segment is averaged exactly every P steps, and a worker still hears up to P
    others at every step. Raises `ValueError` for sizes below 1.

    >>> rotate(4, pool_size=3)
    array([[0, 1, 2, 0],
           [1, 2, 0, 1],
           [2, 0, 1, 2]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size)
    return ((np.arange(num_segments) + np.arange(pool_size)[:, None]) % pool_size).astype(np.int32)


def sample(num_segments: int, pool_size: int, period: int = 1024, *, seed: int = 0) -> Table:
    """Every segment draws its round independently and uniformly at every step, as in Crossover-SGD.

    How often a step uses a round is random, so the rounds cannot be compiled to static channels. Raises `ValueError`
    for sizes below 1.

    Reference: Yeo et al., Crossover-SGD, arXiv:2012.15198, Algorithm 1.

    >>> sample(3, pool_size=8, period=2).shape
    (2, 3)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size, period=period)
    return _rng(seed, num_segments, pool_size).integers(pool_size, size=(period, num_segments), dtype=np.int32)


def cycle(num_segments: int, pool_size: int) -> Table:
    """All segments take round t mod P at step `t`: the whole model goes to the same peers, as in SGP.

    Raises `ValueError` for sizes below 1.

    >>> cycle(3, pool_size=2)
    array([[0, 0, 0],
           [1, 1, 1]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size)
    return np.repeat(np.arange(pool_size, dtype=np.int32)[:, None], num_segments, axis=1)


def stream(num_segments: int, pool_size: int, every: int, *, period: int = 1024, seed: int = 0) -> Table:
    """Segment `s` travels at steps t ≡ s (mod `every`) and stays at home otherwise; travellers as in `shuffle`.

    Communication is 1/`every` of the model at every step, instead of the model at every `every`-th. `period` is
    rounded up to a multiple of `every`. Raises `ValueError` for sizes below 1.

    >>> stream(4, pool_size=1, every=2, period=2)
    array([[ 0, -1,  0, -1],
           [-1,  0, -1,  0]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size, every=every, period=period)
    rng = _rng(seed, num_segments, pool_size)
    # A period that `every` does not divide would give some segment two turns at its end, or none.
    passes = -(-period // every)
    table = np.full((passes * every, num_segments), -1, np.int32)
    for phase in range(min(every, num_segments)):
        # Segments of one phase travel together, so that it is they who share the rounds evenly.
        travellers = len(range(phase, num_segments, every))
        table[phase::every, phase::every] = _shuffled(rng, passes, travellers, pool_size)
    return table


def _rng(seed: int, num_segments: int, pool_size: int) -> np.random.Generator:
    return np.random.default_rng([seed, num_segments, pool_size])


def _shuffled(rng: np.random.Generator, period: int, num_segments: int, pool_size: int) -> Table:
    # Rows that list all rounds in random orders, one order after the other, use them equally often up to one.
    passes = -(-num_segments // pool_size)
    orders = rng.permuted(np.tile(np.arange(pool_size, dtype=np.int32), (period, passes, 1)), axis=-1)
    return rng.permuted(orders.reshape(period, -1)[:, :num_segments], axis=-1)
