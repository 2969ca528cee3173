"""Named algorithms: "my optimizer, but gossiping". Each is a composition of a pool, a table, a cut and an order.

`axis` and `specs` are `gossip`'s everywhere: the axis of the workers, and how leaves lie inside a worker.
"""

import math
from collections.abc import Callable
from typing import Any

import optax

from crossover_jax.algorithms import Algorithm, average_grads, mix_after, mix_all, mix_during, mix_relative
from crossover_jax.cuts import Cut, by_size, whole
from crossover_jax.mixing import Table, average, every, gossip, repeat
from crossover_jax.push_sum import push_sum
from crossover_jax.topology.graphs import exponential, ring
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.random import balanced, latin, pull
from crossover_jax.topology.tables import cycle, rotate, sample, shuffle

Optimizer = optax.GradientTransformation
PyTree = Any


def crossover_sgd(
    optimizer: Optimizer,
    num_workers: int,
    *,
    pool: Pool | None = None,
    cut: Cut | None = None,
    table: Table | None = None,
    during: bool = False,
    local_steps: int = 1,
    rounds: int = 1,
    momentum_rounds: int = 0,
    wire: str | None = None,
    in_flight: int | None = None,
    renew: int = 0,
    seed: int = 0,
    axis: str = "worker",
    where: Callable[[str], bool] | None = None,
    specs: PyTree = None,
) -> Algorithm:
    """Crossover-SGD as recommended here: x <- W_s(x + u) in every segment s, its peers drawn anew at each step.

    By default a pool of about max(8, 2 log2 n) distinct shifts (`latin`), as many equal segments (`by_size`), and at
    each step a random assignment of one to the other (`shuffle`): one message of 1/P of the model out and in per worker
    and channel, one model in all. With a `cut` into S equal segments the pool has as many rounds as divide S.
    `during=True` mixes while the gradient is taken; `local_steps=k` exchanges after each k steps, `rounds=k` k times at
    each; `momentum_rounds=k` exchanges the optimizer's momentum too (`mix_all`), k times; `where`, `specs`, `wire` and
    `in_flight` are `gossip`'s; `renew=k` mixes differences to a reference that is renewed every k steps
    (`mix_relative`). All processes must use one `seed`. Raises `ValueError` for fewer than one worker, for a pool of
    another number and for two of `during`, `momentum_rounds` and `renew` together.

    With many workers take `rounds=3, wire="int8"`: 0.76 of the bytes, and with 64 workers as accurate as AllReduce,
    where one round in float32 was 0.4 points behind (experiments/README.md).

    Reference: Crossover-SGD, arXiv:2012.15198.

    >>> import jax.numpy as jnp
    >>> algorithm = crossover_sgd(optax.sgd(0.1, momentum=0.9), num_workers=8)
    >>> state = algorithm.init({"w": jnp.zeros(100)})
    """
    pool = latin(num_workers, pool_size(num_workers, cut), seed) if pool is None else pool
    if pool.num_workers != num_workers:
        raise ValueError(f"`pool` must be for `num_workers` = {num_workers} workers, got one for {pool.num_workers}.")
    cut = by_size(pool.num_rounds) if cut is None else cut
    table = shuffle(cut.num_segments, pool.num_rounds, seed=seed) if table is None else table
    if during + (momentum_rounds > 0) + (renew > 0) > 1:
        raise ValueError(
            f"of `during`, `momentum_rounds` and `renew` at most one must be set, got {during}, {momentum_rounds} and "
            f"{renew}: they are three orders of step and exchange."
        )
    once = gossip(pool, table, cut, axis, where=where, specs=specs, wire=wire, in_flight=in_flight)
    mix = every(local_steps, repeat(rounds, once), axis)
    if momentum_rounds:
        return mix_all(optimizer, mix, every(local_steps, repeat(momentum_rounds, once), axis))
    if renew:
        return mix_relative(optimizer, mix, renew, axis, specs=specs)
    return (mix_during if during else mix_after)(optimizer, mix)


def crossover_sgd_paper(
    optimizer: Optimizer,
    num_workers: int,
    cut: Cut,
    *,
    pool_size: int = 16,
    load_balanced: bool = True,
    seed: int = 0,
    axis: str = "worker",
    specs: PyTree = None,
) -> Algorithm:
    """Crossover-SGD as the paper ran it: at each step each segment draws its own permutation by Algorithm 2.

    The cut is at layers (`by_module`); drawings come from a pool of `pool_size` permutations, compiled as a switch per
    segment. The ablations: `load_balanced=False` pulls from independent random peers, which loses the mean; a cut of
    `whole()` sends all segments to the same peer.

    Reference: Crossover-SGD, arXiv:2012.15198, Algorithms 1 and 2.
    """
    pool = (balanced if load_balanced else pull)(num_workers, pool_size, seed)
    table = sample(cut.num_segments, pool.num_rounds, seed=seed)
    return mix_after(optimizer, gossip(pool, table, cut, axis, specs=specs))


def crossover_sgd_phases(
    optimizer: Optimizer, num_workers: int, *, during: bool = False, axis: str = "worker", specs: PyTree = None
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
    pool = exponential(num_workers)
    table = rotate(pool.num_rounds, pool.num_rounds)
    cut = by_size(pool.num_rounds)
    return crossover_sgd(optimizer, num_workers, pool=pool, cut=cut, table=table, during=during, axis=axis, specs=specs)


def sgp(
    optimizer: Optimizer,
    num_workers: int,
    *,
    peers: int = 1,
    pool: Pool | None = None,
    axis: str = "worker",
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
    table, cut = cycle(1, pool.num_rounds), whole()
    if pool.keeps_agreement:
        return mix_after(optimizer, gossip(pool, table, cut, axis, specs=specs))
    return push_sum(optimizer, pool, table, cut, axis=axis, specs=specs)


def d_psgd(optimizer: Optimizer, num_workers: int, *, axis: str = "worker", specs: PyTree = None) -> Algorithm:
    """Decentralised parallel SGD on a ring: x_i <- W x + u_i with both neighbours and oneself at 1/3.

    Reference: Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?, arXiv:1705.09056.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x = d_psgd(optax.sgd(0.0), 4), jnp.array([3.0, 0.0, 0.0, 0.0])
    >>> jax.vmap(lambda x: algorithm.update(x, algorithm.init(x), x, 0)[0], axis_name="worker")(x).round(3).tolist()
    [1.0, 1.0, 0.0, 1.0]
    """
    return mix_during(optimizer, gossip(ring(num_workers), cycle(1, 1), whole(), axis, specs=specs))


def allreduce_sgd(optimizer: Optimizer, *, axis: str = "worker", specs: PyTree = None) -> Algorithm:
    """AllReduce-SGD: each worker steps with the gradient averaged over all workers; `average_grads` by its known name.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x, grads = allreduce_sgd(optax.sgd(1.0)), jnp.zeros(4), jnp.arange(4.0)
    >>> jax.vmap(lambda g, x: algorithm.update(g, algorithm.init(x), x, 0)[0], axis_name="worker")(grads, x).tolist()
    [-1.5, -1.5, -1.5, -1.5]
    """
    return average_grads(optimizer, axis, specs=specs)


def local_sgd(optimizer: Optimizer, local_steps: int = 1, *, axis: str = "worker", specs: PyTree = None) -> Algorithm:
    """Local SGD: `local_steps` steps alone, then the parameters are averaged; with 1 it is parameter averaging.

    Reference: Stich, Local SGD Converges Fast and Communicates Little, arXiv:1805.09767.

    >>> import jax, jax.numpy as jnp
    >>> algorithm, x, grads = local_sgd(optax.sgd(1.0), 2), jnp.zeros(4), jnp.arange(4.0)
    >>> update = lambda t: jax.vmap(lambda g, x: algorithm.update(g, algorithm.init(x), x, t)[0], axis_name="worker")
    >>> update(0)(grads, x).tolist(), update(1)(grads, x).tolist()
    ([0.0, -1.0, -2.0, -3.0], [-1.5, -1.5, -1.5, -1.5])
    """
    return mix_after(optimizer, every(local_steps, average(axis, specs=specs), axis))


def pool_size(num_workers: int, cut: Cut | None = None) -> int:
    """P >= 2 log2 n, where one more shift hardly contracts faster, and no more shifts than there are.

    Of a given cut into equal segments, P is a divisor: otherwise the table would not compile to channels.
    """
    wanted = max(1, min(num_workers - 1, max(8, math.ceil(2 * math.log2(max(1, num_workers))))))
    if cut is None or not cut.is_equal:
        return wanted
    return max(p for p in range(1, wanted + 1) if cut.num_segments % p == 0)
