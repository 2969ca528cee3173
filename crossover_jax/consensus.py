"""How far the workers are apart."""

import jax
import jax.numpy as jnp

from crossover_jax.leaves import PyTree, flatten, is_key, travels, widened


@jax.jit
def consensus_distance(tree: PyTree) -> jax.Array:
    """Ξ = sqrt((1/n) Σ_i |x_i − x̄|²), the root mean square distance of the workers to their average.

    `tree` has a leading axis of workers; only floating-point leaves count. Reference: Kong et al., Consensus Control
    for Decentralized Deep Learning, arXiv:2102.04828.

    >>> consensus_distance({"w": jnp.array([[0.0, 0.0], [6.0, 8.0]])}).item()
    5.0
    """

    def spread(x):
        x = x.astype(widened(x.dtype))
        return jnp.square(jnp.abs(x - x.mean(0, keepdims=True))).sum() / x.shape[0]

    return jnp.sqrt(sum(spread(x) for x in jax.tree.leaves(tree) if travels(x)))


@jax.jit
def _first_that_differs(leaves: list[jax.Array]) -> list[jax.Array]:
    """For each leaf the first worker that differs from worker 0, which is 0 itself if none does."""

    def first(x):
        same = (x == x[:1]) | ((x != x) & (x[:1] != x[:1]))  # NaN equals NaN
        return jnp.any(~same, axis=tuple(range(1, x.ndim))).argmax()

    return [first(x) for x in leaves]


def check_copies(tree: PyTree) -> None:
    """Raise `ValueError` naming leaf and worker if the workers' copies are not equal.

    Every leaf has a leading axis of workers. Random keys do not count: `copies` gives each worker its own.

    >>> check_copies({"w": jnp.ones((4, 2))})
    """
    names, leaves, _ = flatten(tree)
    alike = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if not is_key(leaf, leading=1)]
    if bare := [name for name, leaf in alike if not leaf.ndim]:
        raise ValueError(f"leaf {bare[0]!r} must have a leading axis of workers, got shape (): stack it with `copies`.")
    # One program and one transfer for all leaves: a model has hundreds.
    firsts = jax.device_get(_first_that_differs([leaf for _, leaf in alike]))
    for (name, _), first in zip(alike, firsts, strict=True):
        if first:
            raise ValueError(
                f"the workers' copies must start equal, but leaf {name!r} of worker {first} differs "
                "from worker 0's: initialise every worker from one seed, or with `copies`."
            )
