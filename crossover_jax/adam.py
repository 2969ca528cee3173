"""Adam for workers that gossip: the second moment of the average gradient, from one worker's own gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from crossover_jax.leaves import OwnGradient, PyTree

ScalarOrSchedule = float | jax.Array | optax.Schedule


class ScaleByGossipAdamState(NamedTuple):
    count: jax.Array  # shape=(), dtype=int32
    mu: PyTree
    nu: PyTree
    signal: PyTree  # Σ EMA(q) of each leaf, shape=(), dtype=float32
    last: OwnGradient  # the gradient before


def gossip_adamw(
    learning_rate: ScalarOrSchedule,
    num_workers: int,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    mask: Callable[[PyTree], PyTree] | PyTree | None = None,
) -> optax.GradientTransformation:
    """`optax.adamw` whose steps are those of Adam on the average gradient of `num_workers`: see `scale_by_gossip_adam`.

    For `mix_after`, `mix_during`, `crossover_sgd` and whatever else exchanges parameters at every step or so. Its
    learning rate is the one that AllReduce has; plain AdamW under gossip needs one up to √n times as high. An algorithm
    whose optimizer sees the average gradient, `allreduce_sgd`, refuses it.

    >>> from crossover_jax import crossover_sgd
    >>> algorithm = crossover_sgd(gossip_adamw(1e-3, num_workers=8), num_workers=8)
    >>> state = algorithm.init({"w": jnp.zeros((100, 100))})
    """
    return optax.chain(
        scale_by_gossip_adam(num_workers, b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_gossip_adam(
    num_workers: int, b1: float = 0.9, b2: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam with the second moment that the average of `num_workers` gradients has, and nothing sent for it.

    A worker's gradient is g = μ + ε: what all share, and the noise of its own batch. Noise of n independent workers
    averages out, so that E[ḡ²] = v / n + (1 − 1/n) μ², v = E[g²]. Plain Adam under gossip divides by √v instead: where
    noise is most of v its steps are up to √n too short, unevenly over the layers. Of each leaf

        q_t = g_t · g_(t−1),   r = clip(Σ EMA(q) / Σ EMA(g²), 0, 1),   v' = EMA(g²) (1/n + (1 − 1/n) r).

    Two batches have nothing in common but μ, so E[q] = μ² while μ hardly changes from one step to the next. Sums are
    over the whole leaf, because clipping a noisy number at 0 biases it upwards. EMA(q) has the b2 of EMA(g²) and began
    one step later; at the first step v' = v. The gradient before is kept, a third model beside the two of Adam.

    It is wrong where the gradients of workers differ by more than the noise of a batch (private data), and where μ
    changes its sign from step to step: there r is 0, and steps are √n too long. Gradients clipped by each worker give
    the moment of an average of clipped gradients. With one worker this is `optax.scale_by_adam`.

    Raises `ValueError` for `num_workers` below 1.

    >>> tx, params = scale_by_gossip_adam(4), {"w": jnp.zeros(1000)}
    >>> keys = jax.random.split(jax.random.key(0), 300)
    >>> _, state = jax.lax.scan(
    ...     lambda s, key: (tx.update({"w": jax.random.normal(key, (1000,))}, s)[1], None), tx.init(params), keys
    ... )[::-1]
    >>> abs(float(state.signal["w"])) < 10  # no signal in noise: of 1000 numbers of variance 1
    True
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    if num_workers == 1:
        return optax.scale_by_adam(b1, b2, eps)

    def init(params: PyTree) -> ScaleByGossipAdamState:
        mu, nu, last = (optax.tree.zeros_like(params) for _ in range(3))
        signal = jax.tree.map(lambda x: jnp.zeros((), jnp.float32), params)
        return ScaleByGossipAdamState(jnp.zeros((), jnp.int32), mu, nu, signal, OwnGradient(last))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, ScaleByGossipAdamState]:
        del params
        before, count = state.count, jnp.asarray(optax.safe_increment(state.count))
        signal = jax.tree.map(
            lambda s, g, last: b2 * s + (1 - b2) * jnp.sum(g * last, dtype=jnp.float32),
            state.signal,
            updates,
            state.last.tree,
        )
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        m_hat, v_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)

        def step(m: jax.Array, v: jax.Array, s: jax.Array) -> jax.Array:
            q = s / (1 - b2 ** jnp.maximum(before, 1))  # there is one q less than there are gradients
            r = jnp.clip(q / jnp.maximum(jnp.sum(v, dtype=jnp.float32), 1e-30), 0, 1)
            r = jnp.where(before == 0, 1.0, r)
            return m / (jnp.sqrt(v * (1 / num_workers + (1 - 1 / num_workers) * r).astype(v.dtype)) + eps)

        new = ScaleByGossipAdamState(count, mu, nu, signal, OwnGradient(updates))
        return jax.tree.map(step, m_hat, v_hat, signal), new

    return optax.GradientTransformation(init, update)
