"""One exchange between workers: a `Mix` is called as `mix(tree, step)` on the values of one worker.

It runs wherever the axis of the workers has a name: inside `jax.shard_map` over a mesh, where `gossip` becomes
`ppermute`, or inside `jax.vmap(..., axis_name=...)`, where one device simulates all workers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from crossover_jax.axes import Axis, axis_or_default, check_axis, is_simulated, same_on_all_workers, vary
from crossover_jax.cuts import Cut
from crossover_jax.deprecated import renames
from crossover_jax.leaves import PyTree, widened
from crossover_jax.lowering import (
    Pieces,
    exchange_by_channels,
    exchange_by_index,
    exchange_by_switch,
    row_at,
    static_channels,
    traced_channels,
)
from crossover_jax.packing import Leaves, map_packed, map_parts
from crossover_jax.steps import Step, after_each
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.tables import Table, shuffle
from crossover_jax.wire import Wire, check_wire

# A table, or a function that makes it of the number of segments and the size of the pool.
TableOrFunction = Table | Callable[[int, int], Table]


@dataclasses.dataclass(frozen=True)
class Mix:
    """A function `(tree, step) -> tree` on one worker's values, and what an algorithm must know of it.

    Any function of that signature is a mix too; it is taken to mix all leaves, without a conditional.
    """

    function: Callable[[PyTree, Step], PyTree]
    axis: Axis | None = None  # None: the one that names the workers
    leaves: Leaves = None  # which travel
    specs: PyTree = None  # how leaves lie inside a worker
    can_overlap: bool = True  # compiles without a conditional, which nothing can overlap
    stays: Callable[[PyTree, Step], PyTree] | None = None  # which elements stay at home at a step; None: none ever

    def __call__(self, tree: PyTree, step: Step) -> PyTree:
        return self.function(tree, step)


BUCKET_BYTES = 1 << 22  # of the leaves that `average` sends together
AnyMix = Mix | Callable[[PyTree, Step], PyTree]


def as_mix(mix: AnyMix) -> Mix:
    """What is known of any mix."""
    return mix if isinstance(mix, Mix) else Mix(mix)


@renames(cut_at=1, where="leaves")
def gossip(
    pool: Pool,
    cut: Cut,
    table: TableOrFunction = shuffle,
    axis: str | None = None,
    *,
    leaves: Leaves = None,
    specs: PyTree = None,
    wire: str | None = None,
    in_flight: int | None = None,
) -> Mix:
    """Mix every segment with the peers that `table` names: x_i <- Σ_j W[i, j] x_j, W = pool.matrix(round).

    Args:
      pool: who hears whom; it must keep agreement (see `push_sum` for those that do not).
      cut: which elements travel together.
      table: at step t segment s takes round `table[t % period, s]` of the pool; −1 leaves it at home, bit for bit. Or a
        function `(num_segments, pool_size) -> table`, such as `topology.rotate`.
      axis: the axis along which to exchange; by default the one that names the workers.
      leaves: a predicate on names, "layers/0/kernel": which leaves travel. Those that are not floating-point never do.
      specs: how leaves lie inside a worker of several devices: PartitionSpecs over the inner axes, or a prefix of such
        a tree; None: whole on every device or, with Explicit axes, as their types say. Each device sends its own part,
        `by_size` cuts each device's part, and JAX cannot differentiate through it.
      wire: dtype of the messages, "bfloat16", "float16" or "int8" (0.254 of float32: every 256 values share a scale).
        The sum over workers is exact whatever it is: x_i <- x_i + Σ_j W[i, j] (Q(x_j) − Q(x_i)). Workers agree to the
        rounding of Q. A wire that is not narrower than a leaf changes nothing.
      in_flight: how many channels are under way at once (default: all). Fewer take less memory, and on CPU hosts less
        time; on TPUs only the last group hides behind compute.

    Where every row of the table uses a round equally often and segments are equal (`is_channels`), each round compiles
    to one static permute, and what is random is which segment travels on it. Any other table compiles to a `lax.switch`
    per segment, which cannot overlap with compute. A `step` that is a Python integer picks the rounds while tracing.
    Averages are taken in float32 at least and returned in the leaf's own dtype.

    Raises `ValueError` for what does not fit together, for an axis that is not bound, for a `step` that differs between
    workers, and if `leaves` chooses none.
    Reference: Crossover-SGD, arXiv:2012.15198.

    >>> from crossover_jax import by_size, topology
    >>> mix = gossip(topology.latin(8, 4), by_size(4))
    >>> x = jnp.arange(32.0).reshape(8, 4)
    >>> y = jax.vmap(mix, in_axes=(0, None), axis_name="worker")(x, 0)
    >>> bool(jnp.allclose(y.mean(0), x.mean(0)))
    True
    """
    if not pool.keeps_agreement:
        raise ValueError("`pool` must keep agreement (rows of W sum to 1); this one does not: use `push_sum` with it.")
    return exchange(pool, cut, table, axis, leaves, specs, wire, in_flight)


def exchange(
    pool: Pool, cut: Cut, table: TableOrFunction, axis: str | None, leaves: Leaves, specs: PyTree, wire, in_flight
) -> Mix:
    """`gossip` for pools that may keep only mass; what it mixes then needs `push_weights` and `unbias`."""
    table = make_table(table, pool, cut)
    check_wire(wire)
    if in_flight is not None and in_flight < 1:
        raise ValueError(f"`in_flight` must be None or at least 1, got {in_flight}.")
    # With an own share of ½ or more the nearest Q keeps the sign of x, below it only one between 0 and x does.
    coding = Wire(wire, toward_zero=bool(pool.share[:, 0].min() < 0.5))

    def mix(tree: PyTree, step: Step) -> PyTree:
        along = axis_or_default(axis)
        check_axis(along, pool.num_workers)
        is_static = isinstance(step, int | np.integer)
        # The step enters a nested `shard_map` as an argument: it may not close over what is traced outside.
        traced = () if is_static else (same_on_all_workers(step, along),)

        def mix_packed(arrays: list[Array], pieces: Pieces, *traced: Array) -> list[Array]:
            now = traced[0] if traced else step
            fixed = table[int(step) % len(table) if is_static else 0] if is_static or _is_constant(table) else None
            if is_simulated(along):
                row = row_at(table, now) if fixed is None else jnp.asarray(fixed)
                return exchange_by_index(arrays, pieces, row, pool, along, coding)
            if fixed is not None:
                return exchange_by_channels(arrays, pieces, static_channels(fixed), pool, along, coding, in_flight)
            if is_channels(table, cut):
                channels = traced_channels(table, now)
                return exchange_by_channels(arrays, pieces, channels, pool, along, coding, in_flight)
            return exchange_by_switch(arrays, pieces, row_at(table, now), table, pool, along, coding)

        return map_packed(mix_packed, tree, cut, along, leaves, specs, *traced)

    def stays(tree: PyTree, step: Step) -> PyTree:
        def fill(arrays: list[Array], pieces: Pieces, row: Array) -> list[Array]:
            return [_by_segment(row < 0, x, d, bounds) for x, (d, bounds) in zip(arrays, pieces, strict=True)]

        filled = map_packed(fill, tree, cut, axis_or_default(axis), leaves, specs, row_at(table, jnp.asarray(step)))
        return jax.tree.map(lambda x: x != 0, filled)

    some_stay = bool((table < 0).any())
    return Mix(mix, axis, leaves, specs, can_overlap=is_channels(table, cut), stays=stays if some_stay else None)


def _by_segment(values: Array, like: Array, dimension: int, bounds: tuple[int, ...]) -> Array:
    """An array of the shape of `like` that has in each segment its value."""
    along = jnp.repeat(values.astype(like.dtype), np.diff(bounds), total_repeat_length=bounds[-1])
    other = [d for d in range(like.ndim) if d != dimension]
    return jnp.broadcast_to(jnp.expand_dims(along, other), like.shape)


def is_channels(table: Table, cut: Cut) -> bool:
    """Whether `gossip` compiles without a conditional: every row uses each round as often as the first row does.

    >>> from crossover_jax import by_size
    >>> from crossover_jax.topology import sample, shuffle
    >>> [is_channels(table, by_size(8)) for table in (shuffle(8, 4), shuffle(8, 7), sample(8, 4))]
    [True, False, False]
    """
    if _is_constant(table):
        return True
    rounds = np.arange(table.max() + 1)
    uses = (table[:, :, None] == rounds).sum(1)
    return cut.is_equal and bool((uses == uses[0]).all())


def _is_constant(table: Table) -> bool:
    return bool((table == table[0]).all())


@renames(where="leaves")
def average(axis: Axis | None = None, *, leaves: Leaves = None, specs: PyTree = None) -> Mix:
    """Average over all workers by all-reduce, in float32 at least: x_i <- (1/n) Σ_j x_j.

    `leaves` chooses leaves by name; those that are not floating-point stay as they are. Where a worker has several
    devices each reduces its own part of every leaf, and `specs` tells how they lie, as in `gossip`.

    >>> x = jnp.arange(4.0)
    >>> jax.vmap(average(), in_axes=(0, None), axis_name="worker")(x, 0).tolist()
    [1.5, 1.5, 1.5, 1.5]
    """

    def mix(tree: PyTree, step: Step) -> PyTree:
        del step
        along = axis_or_default(axis)
        check_axis(along)
        return map_parts(lambda names, parts: _means(parts, along), tree, along, leaves, specs)

    return Mix(mix, axis, leaves, specs)


def _means(parts: list[Array], axis: str) -> list[Array]:
    """Each part's mean, of one dtype several together: on CPU hosts an all-reduce takes 2 (n − 1) messages in turn."""
    means = list(parts)
    for first, *others in _buckets(parts, -1 if is_simulated(axis) else BUCKET_BYTES):
        if not others:
            means[first] = _mean(parts[first], axis)
            continue
        at = [first, *others]
        packed = _mean(jnp.concatenate([parts[i].reshape(-1) for i in at]), axis)
        for i, piece in zip(at, jnp.split(packed, np.cumsum([parts[i].size for i in at])[:-1]), strict=True):
            means[i] = piece.reshape(parts[i].shape)
    return means


def _buckets(parts: list[Array], limit: int) -> list[list[int]]:
    """Small ones: in one of all parts the first would wait for the last, and a gradient's could not hide behind it."""
    found: list[list[int]] = []
    for i, part in enumerate(parts):
        for at in reversed(found):
            if parts[at[0]].dtype == part.dtype and sum(parts[j].nbytes for j in at) + part.nbytes <= limit:
                at.append(i)
                break
        else:
            found.append([i])
    return found


def _mean(leaf: Array, axis: str) -> Array:
    wide = leaf.astype(widened(leaf.dtype))
    if is_simulated(axis):
        everyone = lax.all_gather(wide, axis)
        # `pmean` makes the same sum, but XLA:CPU takes 8 times as long: it adds the workers up number by number.
        total = lax.platform_dependent(everyone, cpu=_add_in_turn, default=lambda x: x.sum(0))
        return (total / lax.axis_size(axis)).astype(leaf.dtype)
    return vary(lax.pmean(wide, axis).astype(leaf.dtype), axis)


def _add_in_turn(x: Array) -> Array:
    return lax.fori_loop(1, len(x), lambda i, total: total + x[i], x[0])


@renames(axis=None)
def every(k: int, mix: AnyMix) -> Mix:
    """Apply `mix` after each `k` steps, with the number of exchanges so far as its step; in between nothing travels.

    `every(k, average())` after an optimizer's update is Local SGD (arXiv:1805.09767). The step must be shared by all
    workers. Raises `ValueError` for k < 1.

    >>> x, mix = jnp.arange(4.0), jax.vmap(every(2, average()), in_axes=(0, None), axis_name="worker")
    >>> mix(x, jnp.int32(0)).tolist(), mix(x, jnp.int32(1)).tolist()
    ([0.0, 1.0, 2.0, 3.0], [1.5, 1.5, 1.5, 1.5])
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    mix = as_mix(mix)

    def mix_sometimes(tree: PyTree, step: Step) -> PyTree:
        return after_each(k, step, mix, tree, axis_or_default(mix.axis))

    return mix if k == 1 else dataclasses.replace(mix, function=mix_sometimes, can_overlap=False)


def repeat(k: int, mix: AnyMix) -> Mix:
    """Apply `mix` `k` times at each step, as its steps k·step to k·step + k − 1: the next rounds of its table.

    Raises `ValueError` for k < 1.

    >>> from crossover_jax import topology, whole
    >>> mix = repeat(2, gossip(topology.exponential(4), whole(), table=topology.cycle))
    >>> jax.vmap(mix, in_axes=(0, None), axis_name="worker")(jnp.arange(4.0), 0).tolist()
    [1.5, 1.5, 1.5, 1.5]
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")
    mix = as_mix(mix)

    def mix_again(tree: PyTree, step: Step) -> PyTree:
        for i in range(k):
            tree = mix(tree, k * step + i)
        return tree

    once = mix.stays

    def stays(tree: PyTree, step: Step) -> PyTree:
        return _all([once(tree, k * step + i) for i in range(k)] if once else [])

    return mix if k == 1 else dataclasses.replace(mix, function=mix_again, stays=once and stays)


def _all(masks: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *each: jnp.stack(each).all(0), *masks)


def chain(*mixes: AnyMix) -> Mix:
    """Apply several mixes in their order, each with the same step; none at all leaves every worker alone.

    >>> x, mix = jnp.arange(4.0), chain(average(), lambda x, step: x + step)
    >>> jax.vmap(mix, in_axes=(0, None), axis_name="worker")(x, 10).tolist()
    [11.5, 11.5, 11.5, 11.5]
    """
    known = [as_mix(mix) for mix in mixes]

    def mix(tree: PyTree, step: Step) -> PyTree:
        for one in known:
            tree = one(tree, step)
        return tree

    choices = [one.leaves for one in known if one.leaves is not None]
    is_filtered = bool(known) and len(choices) == len(known)
    chosen = (lambda name: any(choose(name) for choose in choices)) if is_filtered else None
    like, some_stay = known[0] if known else Mix(mix), bool(known) and all(one.stays for one in known)

    def stays(tree: PyTree, step: Step) -> PyTree:
        return _all([one.stays(tree, step) for one in known if one.stays])

    can_overlap = all(one.can_overlap for one in known)
    return Mix(mix, like.axis, chosen, like.specs, can_overlap, stays if some_stay else None)


def make_table(table: TableOrFunction, pool: Pool, cut: Cut) -> Table:
    """A table of one's own, so that later changes to the caller's do not reach the compiled program."""
    table = np.array(table(cut.num_segments, pool.num_rounds) if callable(table) else table)
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"`table` must hold integers [period, segments], got {table.dtype} of shape {table.shape}.")
    if table.shape[1] != cut.num_segments:
        raise ValueError(f"`table` is for {table.shape[1]} segments, but the cut makes {cut.num_segments}.")
    if table.min() < -1 or table.max() >= pool.num_rounds:
        raise ValueError(
            f"`table` must hold rounds 0..{pool.num_rounds - 1} of the pool or -1, "
            f"got values from {table.min()} to {table.max()}."
        )
    return table
