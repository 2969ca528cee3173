"""Gossip training in JAX: workers exchange parameters, segment by segment, along load-balanced random permutations."""

import sys
from typing import Any

from crossover_jax import topology as topology
from crossover_jax.algorithms import Algorithm as Algorithm
from crossover_jax.algorithms import as_optax as as_optax
from crossover_jax.algorithms import mix_after as mix_after
from crossover_jax.algorithms import mix_during as mix_during
from crossover_jax.algorithms import mix_relative as mix_relative
from crossover_jax.algorithms import mix_with_momentum as mix_with_momentum
from crossover_jax.consensus import check_copies as check_copies
from crossover_jax.consensus import consensus_distance as consensus_distance
from crossover_jax.copies import abstract_copies as abstract_copies
from crossover_jax.copies import copies as copies
from crossover_jax.copies import from_local as from_local
from crossover_jax.copies import local_part as local_part
from crossover_jax.copies import mean_over_workers as mean_over_workers
from crossover_jax.copies import one_worker as one_worker
from crossover_jax.copies import split as split
from crossover_jax.cuts import Cut as Cut
from crossover_jax.cuts import by_module as by_module
from crossover_jax.cuts import by_rows as by_rows
from crossover_jax.cuts import by_size as by_size
from crossover_jax.cuts import whole as whole
from crossover_jax.deprecated import moved as _moved
from crossover_jax.mesh import make_mesh as make_mesh
from crossover_jax.mixing import Mix as Mix
from crossover_jax.mixing import average as average
from crossover_jax.mixing import chain as chain
from crossover_jax.mixing import every as every
from crossover_jax.mixing import gossip as gossip
from crossover_jax.mixing import is_channels as is_channels
from crossover_jax.mixing import repeat as repeat
from crossover_jax.presets import allreduce_sgd as allreduce_sgd
from crossover_jax.presets import crossover as crossover
from crossover_jax.presets import crossover_sgd as crossover_sgd
from crossover_jax.presets import crossover_sgd_paper as crossover_sgd_paper
from crossover_jax.presets import crossover_sgd_phases as crossover_sgd_phases
from crossover_jax.presets import d_psgd as d_psgd
from crossover_jax.presets import local_sgd as local_sgd
from crossover_jax.presets import sgp as sgp
from crossover_jax.push_sum import push_sum as push_sum
from crossover_jax.resize import average_matrix as average_matrix
from crossover_jax.resize import overlap_matrix as overlap_matrix
from crossover_jax.resize import resize as resize
from crossover_jax.specs import fsdp_specs as fsdp_specs
from crossover_jax.specs import on_mesh as on_mesh
from crossover_jax.specs import state_specs as state_specs
from crossover_jax.workers import in_place as in_place
from crossover_jax.workers import per_worker as per_worker


def __getattr__(name: str) -> Any:
    return _moved(sys.modules[__name__], name)
