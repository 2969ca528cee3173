"""Checksums of a state, taken on the devices where it lies, and which of its leaves are finite.

orbax and tensorstore check what they read against what they wrote. These go further: from the device before the save
to the device after the restore, so that what a host's memory or a copy spoils is seen as well.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from crossover_jax.leaves import travels

PyTree = Any


@jax.jit
def inspect(state: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Checksums of leaves `[leaves, 2]` and of workers `[workers, 2]`, and what is finite, `[leaves, workers]`."""
    leaves = jax.tree.leaves(state)
    sums = jnp.stack([_checksums(x) for x in leaves])
    return sums.sum(1, dtype=jnp.uint32), sums.sum(0, dtype=jnp.uint32), jnp.stack([_is_finite(x) for x in leaves])


def _is_finite(x: jax.Array) -> jax.Array:
    inner = tuple(range(1, x.ndim))
    return jnp.isfinite(x).all(inner) if travels(x) else jnp.ones(len(x), bool)


def _checksums(x: jax.Array) -> jax.Array:
    """Two uint32 per worker: sums modulo 2**32 of every word mixed with its place.

    Sums of integers do not depend on their order, so a leaf has the same ones however it lies on the devices. The
    mixing is one to one in the word: no change of a single one goes unseen, and any other with 2**-64 only.
    """
    words = _words(x)
    place, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for d in reversed(range(words.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, words.shape, d) * np.uint32(stride % 2**32)
        stride *= words.shape[d]

    def total(seed: int) -> jax.Array:
        mixed = words ^ (place * np.uint32(0x9E3779B1) + np.uint32(seed))
        for factor in (0x85EBCA6B, 0xC2B2AE35):  # the finaliser of MurmurHash3
            mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(factor)
        return (mixed ^ (mixed >> np.uint32(15))).sum(tuple(range(1, words.ndim)), dtype=jnp.uint32)

    return jnp.stack([total(1), total(0x7F4A7C15)], -1)


def _words(x: jax.Array) -> jax.Array:
    """The bits as uint32: one per element, two for 64-bit dtypes on a new last axis."""
    if jnp.iscomplexobj(x):
        return _words(jnp.stack([x.real, x.imag], -1))
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
