"""Named algorithms: "my optimizer, but gossiping". Each is a composition of a pool, a cut, a table and an order.

`axis` and `specs` are `gossip`'s everywhere: the axis of the workers, and how leaves lie inside a worker.
"""

from typing import Any

import jax
import optax

from crossover_jax.algorithms import (
    Algorithm,
    apply_if_finite,
    mix_after,
    mix_during,
    mix_relative,
    mix_with_momentum,
)
from crossover_jax.cuts import Cut, by_size, whole
from crossover_jax.deprecated import renames, warn
from crossover_jax.leaves import PyTree, is_own_gradient
from crossover_jax.mixing import Mix, TableOrFunction, average, every, gossip, repeat
from crossover_jax.packing import Leaves
from crossover_jax.push_sum import push_sum
from crossover_jax.topology.graphs import exponential, ring
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.random import advised_pool_size, balanced, latin, pull
from crossover_jax.topology.tables import cycle, rotate, sample, shuffle

Optimizer = optax.GradientTransformation


@renames(where="leaves")
def crossover(
    num_workers: int,
    *,
    pool: Pool | None = None,
    cut: Cut | None = None,
    table: TableOrFunction | None = None,
    wire: str | None = None,
    in_flight: int | None = None,
    seed: int = 0,
    axis: str | None = None,
    leaves: Leaves = None,
    specs: PyTree = None,
) -> Mix:
    """The exchange of Crossover-SGD: x_s <- W_s x_s in every segment s, its peers drawn anew at each step.

    By default a pool of `advised_pool_size` distinct shifts (`latin`), as many equal segments (`by_size`), and at each
    step a random assignment of one to the other (`shuffle`): one message of 1/P of the model out and in per worker and
    channel, one model in all. All processes must use one `seed`; the other arguments are `gossip`'s.

    With many workers take `repeat(3, crossover(n, wire="int8"))`, three exchanges in 0.76 of the bytes: with 64 it is
    as accurate as AllReduce, where one exchange in float32 was 0.4 points behind (docs/results.md).

    Raises `ValueError` for a pool of another number of workers, and for a number of segments that no good pool divides,
    naming those near it that work.
    Reference: Crossover-SGD, arXiv:2012.15198.

    >>> import jax, jax.numpy as jnp
    >>> mix, x = crossover(8), jnp.arange(80.0).reshape(8, 10)
    >>> y = jax.vmap(mix, in_axes=(0, None), axis_name="worker")(x, 0)
    >>> bool(jnp.allclose(y.mean(0), x.mean(0)))
    True
    """
    if pool is None:
        segments = cut.num_segments if cut is not None and cut.is_equal else None
        pool = latin(num_workers, advised_pool_size(num_workers, segments), seed)
    if pool.num_workers != num_workers:
        raise ValueError(f"`pool` must be for `num_workers` = {num_workers} workers, got one for {pool.num_workers}.")
    cut = by_size(pool.num_rounds) if cut is None else cut
    table = shuffle(cut.num_segments, pool.num_rounds, seed=seed) if table is None else table
    return gossip(pool, cut, table, axis, leaves=leaves, specs=specs, wire=wire, in_flight=in_flight)


def crossover_sgd(optimizer: Optimizer, num_workers: int, **of_crossover: Any) -> Algorithm:
    """Crossover-SGD: x <- W_s(x + u), `mix_after(optimizer, crossover(num_workers, ...))`, arXiv:2012.15198.

    >>> import jax.numpy as jnp
    >>> algorithm = crossover_sgd(optax.sgd(0.1, momentum=0.9), num_workers=8)
    >>> state = algorithm.init({"w": jnp.zeros(100)})
    """
    old = {key: of_crossover.pop(key) for key in ORDERS if key in of_crossover}
    if old:
        return _in_old_order(optimizer, crossover(num_workers, **of_crossover), **old)
    return mix_after(optimizer, crossover(num_workers, **of_crossover))


ORDERS = ("during", "local_steps", "rounds", "momentum_rounds", "renew")


def _in_old_order(optimizer, once, *, during=False, local_steps=1, rounds=1, momentum_rounds=0, renew=0) -> Algorithm:
    """The arguments of version 0.1, kept for one version."""
    warn(
        f"`crossover_sgd` with any of {', '.join(ORDERS)} is of version 0.1: compose `crossover(n)` with `mix_during`, "
        "`every`, `repeat`, `mix_with_momentum` and `mix_relative`."
    )
    if during + (momentum_rounds > 0) + (renew > 0) > 1:
        raise ValueError(
            f"of `during`, `momentum_rounds` and `renew` one may be set, got {during}, {momentum_rounds}, {renew}."
        )
    mix = every(local_steps, repeat(rounds, once))
    if momentum_rounds:
        return mix_with_momentum(optimizer, mix, every(local_steps, repeat(momentum_rounds, once)))
    if renew:
        return mix_relative(optimizer, mix, renew)
    return (mix_during if during else mix_after)(optimizer, mix)


def crossover_sgd_paper(
    optimizer: Optimizer,
    num_workers: int,
    cut: Cut,
    *,
    pool_size: int = 16,
    load_balanced: bool = True,
    seed: int = 0,
    axis: str | None = None,
    specs: PyTree = None,
) -> Algorithm:
    """Crossover-SGD as the paper ran it: at each step each segment draws its own permutation by Algorithm 2.

    The cut is at layers (`by_module`); drawings come from a pool of `pool_size` permutations, compiled as a switch per
    segment. The ablations: `load_balanced=False` pulls from independent random peers, which loses the mean; a cut of
    `whole()` sends all segments to the same peer. Reference: arXiv:2012.15198, Algorithms 1 and 2.
    """
    pool = (balanced if load_balanced else pull)(num_workers, pool_size, seed)
    table = sample(cut.num_segments, pool.num_rounds, seed=seed)
    return mix_after(optimizer, gossip(pool, cut, table, axis, specs=specs))


def crossover_sgd_phases(
    optimizer: Optimizer, num_workers: int, *, axis: str | None = None, specs: PyTree = None
) -> Algorithm:
    """The one-peer exponential graph with every segment in its own phase: exact averages, many peers per step.

    Segment s takes hop 2**((s + t) mod log2 n) at step t: where n is a power of two, each segment is averaged exactly
    every log2 n steps, and at each step a worker hears log2 n different peers.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x = crossover_sgd_phases(optax.sgd(0.0), 4), jnp.arange(8.0).reshape(4, 2)
    >>> for t in range(2):
    ...     x, _ = jax.vmap(lambda x: algorithm.update(x, algorithm.init(x), x, t), axis_name="worker")(x)
    >>> x[3].tolist()
    [3.0, 4.0]
    """
    mix = crossover(num_workers, pool=exponential(num_workers), table=rotate, axis=axis, specs=specs)
    return mix_after(optimizer, mix)


def sgp(
    optimizer: Optimizer,
    num_workers: int,
    *,
    peers: int = 1,
    pool: Pool | None = None,
    axis: str | None = None,
    specs: PyTree = None,
) -> Algorithm:
    """Stochastic gradient push: the whole model goes along the exponential graph, z = x / w is trained.

    On the exponential graph (the default, with one peer or more) every W is doubly stochastic, so all weights w stay 1
    and none is kept; for a `pool` that keeps only mass they are.
    Reference: Assran et al., Stochastic Gradient Push, arXiv:1811.10792.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x = sgp(optax.sgd(0.0), 4), jnp.arange(4.0)
    >>> for t in range(2):
    ...     x, _ = jax.vmap(lambda x: algorithm.update(x, algorithm.init(x), x, t), axis_name="worker")(x)
    >>> x.tolist()
    [1.5, 1.5, 1.5, 1.5]
    """
    pool = exponential(num_workers, peers) if pool is None else pool
    if pool.keeps_agreement:
        return mix_after(optimizer, gossip(pool, whole(), cycle, axis, specs=specs))
    return push_sum(optimizer, pool, whole(), cycle, axis=axis, specs=specs)


def d_psgd(optimizer: Optimizer, num_workers: int, *, axis: str | None = None, specs: PyTree = None) -> Algorithm:
    """Decentralised parallel SGD on a ring: x_i <- W x + u_i with both neighbours and oneself at 1/3.
    Reference: Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?, arXiv:1705.09056.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x = d_psgd(optax.sgd(0.0), 4), jnp.array([3.0, 0.0, 0.0, 0.0])
    >>> jax.vmap(lambda x: algorithm.update(x, algorithm.init(x), x, 0)[0], axis_name="worker")(x).round(3).tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    return mix_during(optimizer, gossip(ring(num_workers), whole(), cycle, axis, specs=specs))


def allreduce_sgd(optimizer: Optimizer, axis: str | None = None, *, specs: PyTree = None) -> Algorithm:
    """Every worker steps with the gradient averaged over all workers, synchronous data parallelism.

    `specs` is `gossip`'s, of gradients. One that is not finite makes the average so, and no worker steps. `init` raises
    `ValueError` for `gossip_adamw`, which wants a worker's own gradient; but not along a given `axis`, a group's.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x, grads = allreduce_sgd(optax.sgd(1.0)), jnp.zeros(4), jnp.arange(4.0)
    >>> jax.vmap(lambda g, x: algorithm.update(g, algorithm.init(x), x, 0)[0], axis_name="worker")(grads, x).tolist()
    [-1.5, -1.5, -1.5, -1.5]
    """
    optimizer, mean = optax.with_extra_args_support(optimizer), average(axis, specs=specs)

    def init(params):
        state = optimizer.init(params)
        if axis is None and any(map(is_own_gradient, jax.tree.leaves(state, is_leaf=is_own_gradient))):
            raise ValueError(
                "`optimizer` must take the average gradient, got `gossip_adamw`, which takes a worker's own: use "
                "`optax.adamw`."
            )
        return state

    def update(grads, state, params, step, **extra):
        updates, new = optimizer.update(mean(grads, step), state, params, **extra)
        return apply_if_finite(params, updates, new, state)

    return Algorithm(init, update)


def local_sgd(
    optimizer: Optimizer, local_steps: int = 1, *, axis: str | None = None, specs: PyTree = None
) -> Algorithm:
    """Local SGD: `local_steps` steps alone, then the parameters are averaged; with 1 it is parameter averaging.
    Reference: Stich, Local SGD Converges Fast and Communicates Little, arXiv:1805.09767.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x, grads = local_sgd(optax.sgd(1.0), 2), jnp.zeros(4), jnp.arange(4.0)
    >>> update = lambda t: jax.vmap(lambda g, x: algorithm.update(g, algorithm.init(x), x, t)[0], axis_name="worker")
    >>> update(0)(grads, x).tolist(), update(1)(grads, x).tolist()
    ([0.0, -1.0, -2.0, -3.0], [-1.5, -1.5, -1.5, -1.5])
    """
    return mix_after(optimizer, every(local_steps, average(axis, specs=specs)))
