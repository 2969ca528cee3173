"""Tables: the round of the pool that each segment takes at step `t` is row `t mod period`; −1: it stays at home.

Drawn by numpy: the same on every host, under every JAX version and after every resume. Sizes below 1: `ValueError`.
"""

import numpy as np
from jaxtyping import Int

from crossover_jax.topology.pool import at_least

Table = Int[np.ndarray, "period segments"]


def shuffle(num_segments: int, pool_size: int, period: int = 1024, *, seed: int = 0) -> Table:
    """At every step, a random assignment of the rounds to the segments that uses every round equally often.

    Rounds are equally likely in every segment; where `pool_size` does not divide `num_segments`, counts differ by one.

    >>> np.sort(shuffle(4, pool_size=2, period=2), axis=1)
    array([[0, 0, 1, 1],
           [0, 0, 1, 1]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size, period=period)
    rng = np.random.default_rng([seed, num_segments, pool_size])
    return _shuffled(rng, period, num_segments, pool_size)


def rotate(num_segments: int, pool_size: int) -> Table:
    """Segment `s` takes round (s + t) mod P at step `t`: all walk through the pool in order, each in its own phase.

    Over `exponential` or `base`, P steps average every segment exactly, and a worker hears up to P others in each.

    >>> rotate(4, pool_size=3)
    array([[0, 1, 2, 0],
           [1, 2, 0, 1],
           [2, 0, 1, 2]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size)
    return ((np.arange(num_segments) + np.arange(pool_size)[:, None]) % pool_size).astype(np.int32)


def sample(num_segments: int, pool_size: int, period: int = 1024, *, seed: int = 0) -> Table:
    """Every segment draws its round independently and uniformly at every step, as in Crossover-SGD.

    How often a step uses a round is random, so the rounds cannot be compiled to static channels.
    Reference: Yeo et al., Crossover-SGD, arXiv:2012.15198, Algorithm 1.

    >>> sample(3, pool_size=8, period=2).shape
    (2, 3)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size, period=period)
    rng = np.random.default_rng([seed, num_segments, pool_size])
    return rng.integers(pool_size, size=(period, num_segments), dtype=np.int32)


def cycle(num_segments: int, pool_size: int) -> Table:
    """All segments take round t mod P at step `t`: the whole model goes to the same peers, as in SGP.

    >>> cycle(3, pool_size=2)
    array([[0, 0, 0],
           [1, 1, 1]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size)
    return np.repeat(np.arange(pool_size, dtype=np.int32)[:, None], num_segments, axis=1)


def stream(num_segments: int, pool_size: int, every: int, *, period: int = 1024, seed: int = 0) -> Table:
    """Segment `s` travels at steps t ≡ s (mod `every`) and stays at home otherwise; travellers as in `shuffle`.

    So every step sends 1/`every` of the model. `period` is rounded up to a multiple of `every`.

    >>> stream(4, pool_size=1, every=2, period=2)
    array([[ 0, -1,  0, -1],
           [-1,  0, -1,  0]], dtype=int32)
    """
    at_least(1, num_segments=num_segments, pool_size=pool_size, every=every, period=period)
    rng = np.random.default_rng([seed, num_segments, pool_size])
    # A period that `every` does not divide would give some segment two turns at its end, or none.
    passes = -(-period // every)
    table = np.full((passes * every, num_segments), -1, np.int32)
    for phase in range(min(every, num_segments)):
        # Segments of one phase travel together, so that it is they who share the rounds evenly.
        travellers = len(range(phase, num_segments, every))
        table[phase::every, phase::every] = _shuffled(rng, passes, travellers, pool_size)
    return table


def _shuffled(rng: np.random.Generator, period: int, num_segments: int, pool_size: int) -> Table:
    # Rows that list all rounds in random orders, one order after the other, use them equally often up to one.
    passes = -(-num_segments // pool_size)
    orders = rng.permuted(np.tile(np.arange(pool_size, dtype=np.int32), (period, passes, 1)), axis=-1)
    return rng.permuted(orders.reshape(period, -1)[:, :num_segments], axis=-1)
