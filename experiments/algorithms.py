"""The algorithms of the experiments by name, each made from its own group of keys."""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import optax

import crossover_jax as cj
from crossover_jax import topology
from experiments import models, others

PyTree = Any
CUTS = {"size": cj.by_size, "rows": cj.by_rows}
POOLS = {"latin": topology.latin, "balanced": topology.balanced, "derangements": topology.derangements}
ROWS = 8  # segments of rows: most layers have a multiple of it, and what a segment does not divide is packed


def make_algorithm(
    config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation, params: PyTree, specs: PyTree = None
) -> cj.Algorithm:
    """What `config.algorithm` names, for one worker's `params`; `specs` is how they lie inside a worker.

    Raises `ValueError` for keys of its group that do not fit together.
    """
    return ALGORITHMS[config.algorithm](optimizer, config.num_workers, params, specs, **own_keys(config))


def own_keys(config: ml_collections.ConfigDict) -> Mapping[str, Any]:
    """The group of keys of the chosen algorithm; empty for those that have none."""
    return config.get(config.algorithm) or {}


def _crossover(
    optimizer: optax.GradientTransformation,
    num_workers: int,
    params: PyTree,
    specs: PyTree,
    *,
    pool: str,
    pool_size: int | None,
    cut: str,
    segments: int | None,
    local_steps: int,
    rounds: int,
    momentum_rounds: int | None,
    renew_every: int | None,
    during: bool,
    seed: int,
    **messages: Any,
) -> cj.Algorithm:
    """As recommended: `latin`, `shuffle`, `by_size`; what is None is chosen by the number of workers."""
    del params
    orders = {"during": during, "momentum_rounds": momentum_rounds, "renew_every": renew_every}
    if len(found := [name for name, value in orders.items() if value]) > 1:
        raise ValueError(
            f"of `config.crossover.during`, `momentum_rounds` and `renew_every` at most one must be set, got "
            f"{' and '.join(found)}: they are three orders of step and exchange."
        )
    parts = segments or pool_size or (ROWS if cut == "rows" else None)
    size = pool_size or topology.advised_pool_size(num_workers, parts)
    chosen = POOLS[pool](num_workers, size, seed)
    once = cj.crossover(num_workers, pool=chosen, cut=CUTS[cut](parts or size), seed=seed, specs=specs, **messages)
    mix = cj.every(local_steps, cj.repeat(rounds, once))
    if during and not mix.can_overlap:
        raise ValueError(
            "`config.crossover.during` must be False where the exchange compiles to a conditional, beside which "
            f"nothing runs, got {parts or size} segments of a pool of {size} and `local_steps` {local_steps}: take a "
            "multiple of the pool's size, and an exchange at every step."
        )
    if momentum_rounds:
        return cj.mix_with_momentum(optimizer, mix, cj.every(local_steps, cj.repeat(momentum_rounds, once)))
    if renew_every:
        return cj.mix_relative(optimizer, mix, renew_every)
    return (cj.mix_during if during else cj.mix_after)(optimizer, mix)


def _crossover_phases(
    optimizer: optax.GradientTransformation, num_workers: int, params: PyTree, specs: PyTree, *, during: bool
) -> cj.Algorithm:
    """`crossover_sgd_phases`, and its exchange while the gradient is taken."""
    del params
    pool = topology.exponential(num_workers)
    mix = cj.crossover(num_workers, pool=pool, table=topology.rotate, specs=specs)
    return (cj.mix_during if during else cj.mix_after)(optimizer, mix)


def _crossover_paper(
    optimizer: optax.GradientTransformation,
    num_workers: int,
    params: PyTree,
    specs: PyTree,
    *,
    segments: int | None,
    **own: Any,
) -> cj.Algorithm:
    if segments is None:
        cut = cj.by_module(params, models.fine)
    else:
        cut = cj.by_size(segments) if segments > 1 else cj.whole()  # nothing is packed for a cut that cuts nothing
    return cj.crossover_sgd_paper(optimizer, num_workers, cut, specs=specs, **own)


def _outer(
    optimizer: optax.GradientTransformation,
    num_workers: int,
    params: PyTree,
    specs: PyTree,
    *,
    mix: str,
    every: int,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    overlap: bool,
    stream: bool,
    wire: str | None,
    rounds: int,
    seed: int,
) -> cj.Algorithm:
    del params
    outer_optimizer = optax.sgd(learning_rate, momentum=momentum or None, nesterov=nesterov)
    if mix == "average":
        if changed := [name for name, on in (("stream", stream), ("wire", wire), ("rounds", rounds > 1)) if on]:
            raise ValueError(
                f"`config.outer.{changed[0]}` must stay at its default where `config.outer.mix` is 'average', which "
                "sends the whole model by an all-reduce."
            )
        exchange = cj.average(specs=specs)
    elif stream:
        if rounds > 1:
            raise ValueError(f"`config.outer.rounds` must be 1 with `config.outer.stream`, got {rounds}.")
        pool = topology.latin(num_workers, topology.advised_pool_size(num_workers), seed)
        exchange = cj.crossover(
            num_workers,
            pool=pool,
            cut=cj.by_size(every),
            table=topology.stream(every, pool.num_rounds, every, seed=seed),
            wire=wire,
            specs=specs,
        )
    else:
        exchange = cj.repeat(rounds, cj.crossover(num_workers, wire=wire, seed=seed, specs=specs))
    return cj.outer(optimizer, outer_optimizer, exchange, 1 if stream else every, overlap=overlap)


def _noloco(
    optimizer: optax.GradientTransformation,
    num_workers: int,
    params: PyTree,
    specs: PyTree,
    *,
    pool_size: int,
    seed: int,
    **own: Any,
) -> cj.Algorithm:
    """The whole model to one peer, pairs taken in turn."""
    del params
    pool = others.pairs(num_workers, pool_size, seed)
    of_both = None if specs is None else (specs, specs)  # φ and φ − θ travel together
    return others.noloco(optimizer, cj.gossip(pool, cj.whole(), topology.cycle, specs=of_both), **own)


def _des_loc(
    optimizer: optax.GradientTransformation,
    num_workers: int,
    params: PyTree,
    specs: PyTree,
    *,
    rounds: int,
    wire: str | None,
    seed: int,
    **own: Any,
) -> cj.Algorithm:
    """By gossip, where the paper averages."""
    del params
    mix = cj.repeat(rounds, cj.crossover(num_workers, wire=wire, seed=seed, specs=specs))
    return others.des_loc(optimizer, mix, **own)


# name -> (optimizer, number of workers, one worker's parameters, their specs, the keys of its group) -> Algorithm
ALGORITHMS: dict[str, Callable[..., cj.Algorithm]] = {
    "alone": lambda optimizer, n, params, specs: cj.mix_after(optimizer, cj.chain()),  # nobody hears anybody
    "allreduce": lambda optimizer, n, params, specs: cj.allreduce_sgd(optimizer, specs=specs),
    "local_sgd": lambda optimizer, n, params, specs, **own: cj.local_sgd(optimizer, specs=specs, **own),
    "d_psgd": lambda optimizer, n, params, specs: cj.d_psgd(optimizer, n, specs=specs),
    "sgp": lambda optimizer, n, params, specs, **own: cj.sgp(optimizer, n, specs=specs, **own),
    "crossover": _crossover,
    "crossover_phases": _crossover_phases,
    "crossover_paper": _crossover_paper,
    "outer": _outer,
    "noloco": _noloco,
    "des_loc": _des_loc,
}
