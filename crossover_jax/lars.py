"""LARS for workers that see different gradients: trust ratios from own norms, or from norms averaged over workers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

PyTree = Any
ScalarOrSchedule = float | jax.Array | optax.Schedule
Mask = Callable[[PyTree], PyTree]  # params -> which leaves have a trust ratio and weight decay


class TrustRatioState(NamedTuple):
    count: jax.Array  # shape=(), dtype=int32


def matrices(params: PyTree) -> PyTree:
    """Leaves of two dimensions or more: not biases, not the scales of normalisation.

    >>> matrices({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)})
    {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: x.ndim > 1, params)


def lars(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    coefficient: float = 0.001,
    eps: float = 1e-9,
    nesterov: bool = False,
    mask: Mask = matrices,
    axis: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Layer-wise adaptive rate scaling: m <- β m + γ f (g + λ w), w <- w − m, the trust ratio f one number per leaf.

    The learning rate is inside the buffer, as in the paper and its reference code: a change of it does not rescale what
    the buffer holds. The arguments from `weight_decay` on are those of `scale_by_trust_ratio`.

    Reference: You et al., Large Batch Training of Convolutional Networks, arXiv:1708.03888, Algorithm 1.

    >>> tx, params = lars(1.0, momentum=0.9, coefficient=0.1), {"w": jnp.full((2, 2), 3.0)}
    >>> updates, _ = tx.update({"w": jnp.full((2, 2), 5.0)}, tx.init(params), params)  # of 0.1 of the norm of w
    >>> round(updates["w"][0, 0].item(), 4)
    -0.3
    """
    return optax.chain(
        scale_by_trust_ratio(coefficient, weight_decay=weight_decay, eps=eps, mask=mask, axis=axis),
        optax.scale_by_learning_rate(learning_rate),
        optax.trace(decay=momentum, nesterov=nesterov),
    )


def scale_by_trust_ratio(
    coefficient: float = 0.001,
    *,
    weight_decay: ScalarOrSchedule = 0.0,
    eps: float = 1e-9,
    mask: Mask = matrices,
    axis: str | None = None,
) -> optax.GradientTransformation:
    """Scale a gradient to its parameter: f (g + λ w), f = η |w| / (|g| + λ |w| + ε), 1 where a norm is zero.

    Leaves for which `mask` says False go through as they are. Unlike `optax.scale_by_trust_ratio` the norm of the
    gradient is its own, not that of its sum with the decay.

    In gossip every worker divides by the norm of its own gradient, which is noisier the smaller its batch is: with more
    workers at the same global batch ratios shrink, and differ between workers. With an `axis`, norms are averaged over
    its workers first, two float32 per leaf in one all-reduce, so that all take the same ratio; the axis must be bound.

    Raises `ValueError` where parameters are not passed to `update`.

    >>> tx, params = scale_by_trust_ratio(0.1, weight_decay=0.5), {"w": jnp.full((2, 2), 3.0), "b": jnp.zeros(2)}
    >>> updates, _ = tx.update({"w": jnp.full((2, 2), 0.5), "b": jnp.ones(2)}, tx.init(params), params)
    >>> round(updates["w"][0, 0].item(), 4), updates["b"].tolist()
    (0.3, [1.0, 1.0])
    """

    def init(params: PyTree) -> TrustRatioState:
        del params
        return TrustRatioState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, TrustRatioState]:
        if params is None:
            raise ValueError("`params` must be passed to `update`, as `tx.update(grads, state, params)`, got None.")
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        grads, treedef = jax.tree.flatten(updates)
        own, masked = treedef.flatten_up_to(params), treedef.flatten_up_to(mask(params))
        scaled = [i for i, is_scaled in enumerate(masked) if is_scaled]
        norms = _norms([(own[i], grads[i]) for i in scaled], axis)
        for i, (of_param, of_grad) in zip(scaled, norms, strict=True):
            ratio = coefficient * of_param / (of_grad + decay * of_param + eps)
            ratio = jnp.where((of_param == 0) | (of_grad == 0), 1, ratio)
            grads[i] = (ratio * (grads[i] + decay * own[i])).astype(grads[i].dtype)
        return treedef.unflatten(grads), TrustRatioState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformation(init, update)


def _norms(pairs: list[tuple[Any, Any]], axis: str | None) -> jax.Array | list:
    """Norms of parameter and gradient of each pair, `[pairs, 2]`."""
    if not pairs:
        return []
    norms = jnp.stack([jnp.stack([optax.tree.norm(x.astype(jnp.float32)) for x in pair]) for pair in pairs])
    return norms if axis is None else lax.pmean(norms, axis)
