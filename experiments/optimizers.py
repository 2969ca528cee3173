"""The optimizers of the experiments by name, their schedule, and LARS for workers that see different gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax import lax

import crossover_jax as cj

PyTree = Any
ScalarOrSchedule = float | jax.Array | optax.Schedule
Mask = Callable[[PyTree], PyTree]  # params -> which leaves have a trust ratio and weight decay


def make_optimizer(
    config: ml_collections.ConfigDict, num_steps: int, learning_rate: jax.Array | None = None
) -> optax.GradientTransformation:
    """What `config.optimizer` names, with its own group of keys; weight decay is of `matrices` only.

    Before it the gradient is scaled down to a norm of `config.clip_norm`, over all its leaves, where it is longer: each
    worker's own before anything is mixed, but the average where the algorithm averages gradients ("allreduce"), for an
    optimizer sees no other. So at one norm allreduce clips less: an average is shorter than what it is of.

    The highest learning rate is `config.schedule.learning_rate`, or `learning_rate`, which may be traced.
    """
    scheduled = partial(make_schedule, config.schedule, num_steps)
    if learning_rate is None:
        rate = scheduled(config.schedule.learning_rate)
    else:
        shape = scheduled(1.0)

        def rate(step):  # optax' own take no traced rate
            return learning_rate * shape(step)

    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    optimizer = OPTIMIZERS[config.optimizer](rate, scheduled, config.num_workers, **config[config.optimizer])
    return optax.chain(*clip, optimizer, note_updates())


class NoteState(NamedTuple):
    count: jax.Array  # shape=(), dtype=int32: of all updates
    taken: jax.Array  # shape=(), dtype=float32, exact up to 2**24: what `count` was behind the last that was taken

    @property
    def is_left_out(self) -> jax.Array:
        """Whether the algorithm left out the last update."""
        return self.taken != self.count.astype(self.taken.dtype)


def note_updates() -> optax.GradientTransformation:
    """Keep in the state whether the algorithm has taken the last update, and change nothing.

    The algorithms leave out an update that is not finite, so that peers do not take a NaN. A run in which every one is
    left out would go on to its end, having learnt nothing: `train_step` tells it by this note. For they then keep what
    integers count, and take back all floating-point numbers: one number as both comes apart.
    """

    def init(params: PyTree) -> NoteState:
        del params
        return NoteState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, NoteState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, NoteState(count, count.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def make_schedule(config: ml_collections.ConfigDict, num_steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to `cosine.end` of it, or (1 - t) to the power of `polynomial.power`.

    `config` is `config.schedule`. Of w steps of warm-up the first takes 1 / (w + 1) of the peak. A fall by a power ends
    at `polynomial.end` of the peak, and stays there. `warmup` and `polynomial.tail`, that stay, are parts of all steps.

    >>> from experiments.configs import imagenet_resnet50_crossover
    >>> schedule = make_schedule(imagenet_resnet50_crossover.get_config().schedule, 100, peak=1.0)
    >>> [round(float(schedule(step)), 4) for step in (0, 40, 70, 98, 100)]
    [0.0244, 1.0, 0.2035, 0.0025, 0.0025]
    """
    warmup = round(config.warmup * num_steps)
    last = max(num_steps, warmup + 1)
    if config.decay == "cosine":
        end = config.cosine.end * peak
        return optax.schedules.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, last, end)
    own = config.polynomial
    rise = optax.schedules.linear_schedule(peak / (warmup + 1), peak, warmup)
    until = max(last - round(own.tail * num_steps), warmup + 1)

    def fall(count):
        # Not optax' polynomial: compiled, 1 - 60 / 60 may be a little less than zero, and a power of that is NaN.
        left = jnp.clip(1 - count / (until - warmup), 0, 1)
        return (1 - own.end) * peak * left**own.power + own.end * peak

    return optax.schedules.join_schedules([rise, fall], [warmup])


def _sgd(rate, scheduled, num_workers, *, momentum, nesterov, weight_decay):
    del scheduled, num_workers
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=matrices),
        optax.sgd(rate, momentum=momentum, nesterov=nesterov),
    )


def _lars(rate, scheduled, num_workers, *, weight_decay, average_norms, **own):
    del num_workers
    # As in the paper the decay follows the learning rate: a constant one would grow beside a rate that falls to zero.
    return lars(rate, weight_decay=scheduled(weight_decay), axis="worker" if average_norms else None, **own)


def _adamw(rate, scheduled, num_workers, **own):
    del scheduled, num_workers
    return optax.adamw(rate, mask=matrices, **own)


def _gossip_adamw(rate, scheduled, num_workers, **own):
    del scheduled
    return cj.gossip_adamw(rate, num_workers, mask=matrices, **own)


def _oracle_adamw(rate, scheduled, num_workers, *, b1, b2, weight_decay):
    del scheduled, num_workers
    return optax.chain(
        scale_by_oracle_adam(b1, b2),
        optax.add_decayed_weights(weight_decay, mask=matrices),
        optax.scale_by_learning_rate(rate),
    )


def _muon(rate, scheduled, num_workers, *, beta, b2, weight_decay):
    del scheduled, num_workers
    # As long as AdamW's steps, arXiv:2502.16982, for which there is one learning rate. Decay is of `matrices`, and
    # optax' own would be of the scales of normalisation too.
    muon = optax.contrib.muon(
        1.0, beta=beta, adam_b2=b2, muon_weight_dimension_numbers=matrices_of_layers, consistent_rms=0.2
    )
    decay = optax.add_decayed_weights(weight_decay, mask=matrices)
    return optax.chain(muon, optax.scale(-1.0), decay, optax.scale_by_learning_rate(rate))


# name -> (learning rate, peak -> schedule of that peak, number of workers, the keys of its group) -> optimizer
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": _sgd,
    "lars": _lars,
    "adamw": _adamw,
    "gossip_adamw": _gossip_adamw,
    "oracle_adamw": _oracle_adamw,
    "muon": _muon,
}
DECAYS = ("cosine", "polynomial")


class TrustRatioState(NamedTuple):
    count: jax.Array  # shape=(), dtype=int32


def matrices(params: PyTree) -> PyTree:
    """Leaves of two dimensions or more: not biases, not the scales of normalisation.

    >>> matrices({"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "norm": jnp.zeros((4, 3))})
    {'bias': False, 'kernel': True, 'norm': False}
    """

    def is_matrix(path: tuple, x: jax.Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x.ndim > 1 and not name.endswith("norm")  # the scales of scanned layers are [layers, width]

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def matrices_of_layers(params: PyTree) -> PyTree:
    """Which axes of a decoder's scanned layers are a matrix's rows and columns, for Muon; None of all other leaves.

    >>> matrices_of_layers({"layers": {"out": jnp.zeros((2, 4, 8, 32)), "norm": jnp.zeros((2, 32))}})["layers"]["out"]
    MuonDimensionNumbers(reduction_axis=(1, 2), output_axis=(3,))
    """

    def axes(path: tuple, x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.startswith("layers/") or x.ndim < 3:
            return None
        first_of_output = x.ndim - 1 if name.endswith("out") else 2  # heads are two axes: behind, or before, the width
        return optax.contrib.MuonDimensionNumbers(
            tuple(range(1, first_of_output)), tuple(range(first_of_output, x.ndim))
        )

    return jax.tree_util.tree_map_with_path(axes, params)


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


def scale_by_oracle_adam(b1: float, b2: float, eps: float = 1e-8, axis: str = "worker") -> optax.GradientTransformation:
    """Adam whose second moment is that of the average gradient, by an all-reduce over `axis`, which must be bound.

    m <- β1 m + (1 − β1) g, v <- β2 v + (1 − β2) ḡ². It is what `crossover_jax.scale_by_gossip_adam` estimates, at the
    price of AllReduce: what is still lost beside AllReduce is lost elsewhere. With one worker it is
    `optax.scale_by_adam`.

    >>> tx, grads = scale_by_oracle_adam(0.9, 0.99), jnp.array([1.0, -1.0])
    >>> updates, _ = jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="worker")(grads)  # the average is 0
    >>> bool((jnp.abs(updates) > 1e7).all())
    True
    """
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state, params=None):
        del params
        mean = lax.pmean(updates, axis)
        own: Any = state  # optax leaves open what a state is
        new: Any = adam.update(mean, own)[1]
        count, mu = new.count, optax.tree.update_moment(updates, own.mu, b1, 1)
        m_hat, v_hat = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(new.nu, b2, count)
        steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m_hat, v_hat)
        return steps, new._replace(mu=mu)

    return optax.GradientTransformation(adam.init, update)


def _norms(pairs: list[tuple[Any, Any]], axis: str | None) -> jax.Array | list:
    """Norms of parameter and gradient of each pair, `[pairs, 2]`."""
    if not pairs:
        return []
    norms = jnp.stack([jnp.stack([optax.tree.norm(x.astype(jnp.float32)) for x in pair]) for pair in pairs])
    return norms if axis is None else lax.pmean(norms, axis)
