"""Gossip training in JAX: workers exchange parameters, segment by segment, along load-balanced random permutations."""

# ruff: noqa: F401  # imported for callers

import sys
from typing import Any

from crossover_jax import topology
from crossover_jax.adam import gossip_adamw, scale_by_gossip_adam
from crossover_jax.algorithms import Algorithm, as_optax, mix_after, mix_during, mix_relative, mix_with_momentum
from crossover_jax.consensus import check_copies, consensus_distance
from crossover_jax.copies import abstract_copies, copies, from_local, local_part, mean_over_workers, one_worker, split
from crossover_jax.cuts import Cut, by_module, by_rows, by_size, whole
from crossover_jax.deprecated import moved as _moved
from crossover_jax.mesh import make_mesh
from crossover_jax.mixing import Mix, average, chain, every, gossip, is_channels, repeat
from crossover_jax.outer_steps import outer
from crossover_jax.periods import period
from crossover_jax.presets import (
    allreduce_sgd,
    crossover,
    crossover_sgd,
    crossover_sgd_paper,
    crossover_sgd_phases,
    d_psgd,
    local_sgd,
    sgp,
)
from crossover_jax.push_sum import push_sum
from crossover_jax.resize import average_matrix, overlap_matrix, resize
from crossover_jax.specs import fsdp_specs, on_mesh, state_specs
from crossover_jax.workers import in_place, per_worker

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    return _moved(sys.modules[__name__], name)
