"""What a step must compute, written again in numpy."""

import jax
import numpy as np

from crossover_jax.topology import (
    balanced,
    base,
    complete,
    derangements,
    exponential,
    hypercube,
    latin,
    pull,
    ring,
    symmetric,
)

POOLS = {
    "balanced": lambda n: balanced(n, 4, seed=1),
    "base": base,
    "base2": lambda n: base(n, 2),
    "complete": complete,
    "derangements": lambda n: derangements(n, 4, seed=1),
    "exponential": exponential,
    "exponential2": lambda n: exponential(n, 2),
    "hypercube": hypercube,
    "latin": lambda n: latin(n, max(1, min(4, n - 1)), seed=1),
    "pull": lambda n: pull(n, 3, seed=1),
    "ring": ring,
    "ring_directed": lambda n: ring(n, directed=True),
    "symmetric": lambda n: symmetric(n, 4, slices=2 if n % 2 == 0 else 1, seed=1),
}


def pool_of(name, num_workers):
    return POOLS[name](num_workers)


def has(name, num_workers):
    """Whether there is such a pool: a hypercube has a power of two workers."""
    return name != "hypercube" or num_workers & (num_workers - 1) == 0


def mixed_by_matrices(tree, step, pool, cut, table):
    """Every element of every leaf `[workers, ...]` times the matrix of the round its segment takes, in float64."""
    segments = cut.segment_of(jax.tree.map(lambda x: x[0], tree))
    row = table[step % len(table)].tolist()

    def mix(x, segment):
        mixed = np.array(x, np.float64)
        for s, p in enumerate(row):
            if p >= 0:
                here = segment == s
                mixed[:, here] = pool.matrix(p) @ mixed[:, here]
        return mixed

    return jax.tree.map(mix, jax.tree.map(np.asarray, tree), segments)
