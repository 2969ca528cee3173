"""The algorithms of the experiments by name."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import ml_collections
import optax

import crossover_jax as cj
from crossover_jax.presets import pool_size
from experiments import models

PyTree = Any


CUTS = {"size": cj.by_size, "rows": cj.by_rows}
ROWS = 8  # segments of rows: most layers have a multiple of it, and what a segment does not divide is packed
POOLS = {"latin": cj.latin, "balanced": cj.balanced, "derangements": cj.derangements}


def make_cut(c: ml_collections.ConfigDict, num_workers: int, params: PyTree) -> cj.Cut | None:
    """How the algorithm of `config.algorithm` divides the model; None if it does not."""
    if c.name == "crossover":
        require_known("config.algorithm.cut", c.cut, CUTS)
        return CUTS[c.cut](c.segments or c.pool_size or (ROWS if c.cut == "rows" else pool_size(num_workers)))
    if c.name == "crossover_phases":
        return cj.by_size(cj.exponential(num_workers).num_rounds)
    if c.name in ("crossover_paper", "crossover_no_balance"):
        return cj.by_size(c.segments) if c.segments else cj.by_module(params, models.fine)
    return None


def _crossover(c, optimizer, n, params, specs):
    """As recommended: `latin`, `shuffle`, `by_size`; 0 `segments` or `pool_size` choose by the number of workers."""
    require_known("config.algorithm.pool", c.pool, POOLS)
    cut = make_cut(c, n, params)
    rounds = c.pool_size or pool_size(n, cut if c.cut == "rows" else None)
    return cj.crossover_sgd(
        optimizer,
        n,
        pool=POOLS[c.pool](n, rounds, c.seed),
        cut=cut,
        during=c.during,
        local_steps=c.local_steps,
        rounds=c.rounds,
        momentum_rounds=c.momentum_rounds,
        wire=c.wire,
        in_flight=c.in_flight or None,
        renew=c.renew,
        seed=c.seed,
        specs=specs,
    )


def _paper(load_balanced: bool):
    def make(c, optimizer, n, params, specs):
        cut, size = make_cut(c, n, params) or cj.whole(), c.pool_size or 8
        return cj.crossover_sgd_paper(
            optimizer, n, cut, pool_size=size, load_balanced=load_balanced, seed=c.seed, specs=specs
        )

    return make


def _phases(c, optimizer, n, params, specs):
    return cj.crossover_sgd_phases(optimizer, n, during=c.during, specs=specs)


# name -> (config.algorithm, optimizer, number of workers, one worker's parameters and their specs) -> Algorithm
ALGORITHMS: dict[str, Callable[[ml_collections.ConfigDict, Any, int, PyTree, PyTree], cj.Algorithm]] = {
    "alone": lambda c, optimizer, n, params, specs: cj.mix_after(optimizer, cj.chain()),  # nobody hears anybody
    "allreduce": lambda c, optimizer, n, params, specs: cj.allreduce_sgd(optimizer, specs=specs),
    "local_sgd": lambda c, optimizer, n, params, specs: cj.local_sgd(optimizer, c.local_steps, specs=specs),
    "d_psgd": lambda c, optimizer, n, params, specs: cj.d_psgd(optimizer, n, specs=specs),
    "sgp": lambda c, optimizer, n, params, specs: cj.sgp(optimizer, n, peers=c.peers, specs=specs),
    "crossover": _crossover,
    "crossover_phases": _phases,
    "crossover_paper": _paper(load_balanced=True),
    "crossover_no_balance": _paper(load_balanced=False),
    "crossover_no_segments": _paper(load_balanced=True),
    "crossover_neither": _paper(load_balanced=False),
}


def make_algorithm(
    config: ml_collections.ConfigDict,
    optimizer: optax.GradientTransformation,
    num_workers: int,
    params: PyTree,
    specs: PyTree = None,
) -> cj.Algorithm:
    """The algorithm that `config.algorithm` describes; `specs` is how parameters lie inside a worker."""
    return ALGORITHMS[config.name](config, optimizer, num_workers, params, specs)


def require_known(key: str, name: str, names: Iterable[str]) -> None:
    """Raise `ValueError` with the near miss if `name`, the value of `key`, is not one of `names`."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"`{key}` must be one of {', '.join(names)}, got {name!r}{hint}")


def make_optimizer(
    config: ml_collections.ConfigDict, num_steps: int, learning_rate: jax.Array | None = None
) -> optax.GradientTransformation:
    """Momentum SGD, LARS or AdamW; weight decay on matrices and filters only, which alone have LARS' trust ratios.

    The highest learning rate is `config.learning_rate`, or `learning_rate`, which may be traced. Raises `ValueError`
    for an unknown `config.name` or `config.decay`.
    """
    require_known("config.optimizer.name", config.name, ("sgd", "lars", "adamw"))
    if learning_rate is None:
        schedule = make_schedule(config, num_steps, config.learning_rate)
    else:
        shape = make_schedule(config, num_steps, 1.0)

        def schedule(step):  # optax' own take no traced rate
            return learning_rate * shape(step)

    if config.name == "lars":
        return cj.lars(
            schedule,
            momentum=config.momentum,
            weight_decay=make_schedule(config, num_steps, config.weight_decay),
            coefficient=config.trust_coefficient,
            nesterov=config.nesterov,
            mask=_is_matrix,
            axis="worker" if config.average_norms else None,
        )
    if config.name == "adamw":
        return optax.adamw(
            schedule,
            b1=config.momentum,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
            nesterov=config.nesterov,
        )
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.sgd(schedule, momentum=config.momentum, nesterov=config.nesterov),
    )


def make_schedule(config: ml_collections.ConfigDict, num_steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up to `peak` and decay: a cosine to zero, or (1 - t) to the `config.power`th to `config.end` of it.

    `config.warmup` and `config.tail`, where it stays at the end, are parts of all steps: of w steps of warm-up the
    first takes 1 / (w + 1) of the peak.

    >>> from experiments.configs import imagenet_resnet50_crossover
    >>> schedule = make_schedule(imagenet_resnet50_crossover.get_config().optimizer, 100, peak=1.0)
    >>> [round(float(schedule(step)), 4) for step in (0, 40, 70, 98, 100)]
    [0.0244, 1.0, 0.2035, 0.0025, 0.0025]
    """
    require_known("config.optimizer.decay", config.decay, ("cosine", "polynomial"))
    warmup = round(config.warmup * num_steps)
    last = max(num_steps, warmup + 1)
    if config.decay == "cosine":
        return optax.schedules.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, last)
    rise = optax.schedules.linear_schedule(peak / (warmup + 1), peak, warmup)
    until = max(last - round(config.tail * num_steps), warmup + 1)
    fall = optax.schedules.polynomial_schedule(peak, config.end * peak, config.power, until - warmup)
    return optax.schedules.join_schedules([rise, fall], [warmup])


def _is_matrix(params: PyTree) -> PyTree:
    def is_matrix(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x.ndim > 1 and not name.endswith("norm")  # the scales of scanned layers are [layers, width]

    return jax.tree_util.tree_map_with_path(is_matrix, params)
