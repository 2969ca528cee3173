"""Who hears whom, and when: numpy only, the same on every host."""
# ruff: noqa: F401  # imported for callers

from crossover_jax.topology.graphs import base, complete, exponential, hypercube, ring
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.random import advised_pool_size, balanced, derangements, latin, pull, symmetric
from crossover_jax.topology.spectral import (
    Contraction,
    Messages,
    contraction,
    decay,
    effective_neighbors,
    ideal_contraction,
    messages,
    modes,
    product,
    rounds_until,
)
from crossover_jax.topology.tables import cycle, rotate, sample, shuffle, stream
