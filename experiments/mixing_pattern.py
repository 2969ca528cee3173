"""Who hears whom: mixing matrices of a config's first exchanges, measured by what its algorithm does."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jaxtyping import Float

import crossover_jax as cj
from experiments.algorithms import make_algorithm

PyTree = Any
LAYERS, ROWS = 12, 70  # 840 rows: as many as most numbers of segments divide
STEPS = 512  # in which an exchange is looked for


class Exchange(NamedTuple):
    """What an exchange did: in row i, which part of what worker i has afterwards was whose."""

    step: int
    layer: Float[np.ndarray, "workers workers"]  # of the first layer
    model: Float[np.ndarray, "workers workers"]  # on average over all layers


def exchanges(config: ml_collections.ConfigDict, count: int) -> list[Exchange]:
    """The first `count` exchanges of a model of twelve equal layers; none where parameters never travel.

    Every worker begins with a vector of its own, which the algorithm then mixes at learning rate zero. Raises
    `ValueError` for keys of the config that do not fit together.
    """
    n = config.num_workers
    one = {f"layer{i}/kernel": jnp.zeros((ROWS, n)) for i in range(LAYERS)}
    algorithm = make_algorithm(config, optax.sgd(0.0, momentum=0.9), one)

    def exchange(params: PyTree, step: jax.Array) -> PyTree:
        zeros = jax.tree.map(jnp.zeros_like, params)
        # A shared reference must begin alike on all workers, the parameters of outer steps as they are.
        is_relative = config.algorithm == "crossover" and config.crossover.renew_every is not None
        state = algorithm.init(zeros if is_relative else params)
        return algorithm.update(zeros, state, params, step)[0]

    apart = jax.tree.map(lambda x: jnp.broadcast_to(jnp.eye(n)[:, None], (n, *x.shape)), one)
    mix = cj.per_worker(exchange, n, replicated=["step"], donate=False)
    layers = ((step, [np.mean(x, 1) for x in jax.tree.leaves(mix(apart, step))]) for step in range(STEPS))
    found = (Exchange(step, of_each[0], np.mean(of_each, 0)) for step, of_each in layers)
    return list(itertools.islice((own for own in found if not np.allclose(own.model, np.eye(n), atol=1e-3)), count))
