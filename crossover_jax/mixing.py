"""One exchange between workers: functions `(tree, step) -> tree` on the values of one worker.

They run wherever the axis of the workers has a name: inside `jax.shard_map` over a mesh, where `gossip` becomes
`ppermute`, or inside `jax.vmap(..., axis_name=...)`, where one device simulates all workers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Integer

from crossover_jax.cuts import Cut, flatten, travels, widened
from crossover_jax.forms import (
    Pieces,
    by_channels,
    by_index,
    by_switch,
    is_simulated,
    row_at,
    static_channels,
    traced_channels,
)
from crossover_jax.inner import on_parts
from crossover_jax.topology.pool import Pool
from crossover_jax.topology.tables import Table
from crossover_jax.wire import check_wire

PyTree = Any
Step = Integer[Array, ""] | int | np.integer
Mix = Callable[[PyTree, Step], PyTree]


def gossip(
    pool: Pool,
    table: Table,
    cut: Cut,
    axis: str = "worker",
    *,
    where: Callable[[str], bool] | None = None,
    specs: PyTree = None,
    wire: str | None = None,
    in_flight: int | None = None,
) -> Mix:
    """Mix every segment of a tree with the peers that `table` names: x_i <- Σ_j W[i, j] x_j, W = pool.matrix(round).

    At step t segment s takes round `table[t % period, s]` of the pool; −1 leaves it at home, bit for bit. `where`
    chooses by name ("layers/0/kernel") which leaves travel; those that are not floating-point never do. Leaves of one
    dtype travel packed in one vector; averages are taken in float32 at least and returned in the leaf's own dtype.

    A permutation must be static in a compiled program, so a random topology is a compiled pool and a traced choice.
    Where all rows of the table use a round equally often (`shuffle`, when the pool's size divides the segments) and
    segments are equal (`by_size`), each round is one channel and what is random is which segment travels on it: no
    conditional, so the exchange can overlap with compute. Any other table compiles to a `lax.switch` per segment, which
    cannot; `is_channels` tells which. A `step` that is a Python integer picks the rounds while tracing.

    Where a worker has several devices, each sends its own part of every leaf. `specs` tells how leaves lie inside a
    worker: PartitionSpecs over the inner axes, or a prefix of such a tree; None means whole on every device or, with
    Explicit axes, as their types say. `by_size` then cuts each device's part, and JAX cannot differentiate through.

    `wire="bfloat16"` sends half the bytes of float32 and keeps the sum over workers all the same: everybody takes out
    what he sent, x_i <- x_i + Σ_j W[i, j] (Q(x_j) − Q(x_i)), with Q(x) what the message says of x. Workers then agree
    to the rounding of Q. "int8" sends 0.254 of float32: every 256 values of a message share a scale, their largest
    magnitude / 127, that travels behind them. A wire that is not narrower than a leaf changes nothing.

    Channels leave together; with `in_flight=k` k of them, then, when those have arrived, the next k: less memory
    (docs/scaling.md), and on CPU hosts, where they go one after another anyway, less time (docs/performance.md). On
    TPUs only the last k then hide behind compute. A switch takes one at a time.

    Raises `ValueError` if the pool does not keep agreement (see `push_sum`), if it is for another number of workers
    than the axis has, if the table names rounds that the pool lacks or has another number of segments than the cut, if
    the axis is not bound, if `step` differs between workers where that could hang, for an unknown `wire`, and for
    `in_flight` below 1.

    Reference: Crossover-SGD, arXiv:2012.15198.

    >>> from crossover_jax import by_size, gossip, latin, shuffle
    >>> mix = gossip(latin(8, 4), shuffle(4, 4), by_size(4))
    >>> x = jnp.arange(32.0).reshape(8, 4)
    >>> y = jax.vmap(mix, in_axes=(0, None), axis_name="worker")(x, 0)
    >>> bool(jnp.allclose(y.mean(0), x.mean(0)))
    True
    """
    if not pool.keeps_agreement:
        raise ValueError("`pool` must keep agreement (rows of W sum to 1); this one does not: use `push_sum` with it.")
    return exchange(pool, table, cut, axis, where=where, specs=specs, wire=wire, in_flight=in_flight)


def exchange(
    pool: Pool,
    table: Table,
    cut: Cut,
    axis: str,
    *,
    where: Callable[[str], bool] | None = None,
    specs: PyTree = None,
    wire: str | None = None,
    in_flight: int | None = None,
) -> Mix:
    """`gossip` for pools that may keep only mass; what it mixes then needs `push_weights` and `unbias`."""
    table = _checked(table, pool, cut)
    check_wire(wire)
    if in_flight is not None and in_flight < 1:
        raise ValueError(f"`in_flight` must be None or at least 1, got {in_flight}.")

    def mix(tree: PyTree, step: Step) -> PyTree:
        check_axis(axis, pool.num_workers)
        traced = () if isinstance(step, int | np.integer) else (step,)

        def mix_packed(arrays: list[Array], pieces: Pieces, *traced: Array) -> list[Array]:
            now = traced[0] if traced else step
            fixed = table[0 if traced else int(step) % len(table)] if not traced or _is_constant(table) else None
            if fixed is None and not is_channels(table, cut):
                _check_same_step(now, axis)
            if is_simulated(axis):
                row = row_at(table, now) if fixed is None else jnp.asarray(fixed)
                return by_index(arrays, pieces, row, pool, axis, wire)
            if fixed is not None:
                return by_channels(arrays, pieces, static_channels(fixed), pool, axis, wire, in_flight)
            if is_channels(table, cut):
                return by_channels(arrays, pieces, traced_channels(table, now), pool, axis, wire, in_flight)
            return by_switch(arrays, pieces, row_at(table, now), table, pool, axis, wire)

        return map_packed(mix_packed, tree, cut, axis, where, specs, *traced)

    return mix


def is_channels(table: Table, cut: Cut) -> bool:
    """Whether `gossip` compiles without a conditional: every row uses each round as often as the first row does.

    >>> from crossover_jax import by_size, sample, shuffle
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


def average(axis: str = "worker", *, where: Callable[[str], bool] | None = None, specs: PyTree = None) -> Mix:
    """Average over all workers by all-reduce, in float32 at least: x_i <- (1/n) Σ_j x_j.

    `where` chooses leaves by name; those that are not floating-point stay as they are. Where a worker has several
    devices each reduces its own part of every leaf, and `specs` tells how they lie, as in `gossip`.

    >>> x = jnp.arange(4.0)
    >>> jax.vmap(average(), in_axes=(0, None), axis_name="worker")(x, 0).tolist()
    [1.5, 1.5, 1.5, 1.5]
    """

    def mix(tree: PyTree, step: Step) -> PyTree:
        del step
        check_axis(axis)
        return _map_parts(lambda names, parts: [_mean(part, axis) for part in parts], tree, axis, where, specs)

    return mix


def _mean(leaf: Array, axis: str) -> Array:
    wide = leaf.astype(widened(leaf.dtype))
    if is_simulated(axis):
        everyone = lax.all_gather(wide, axis)
        # `pmean` makes the same sum, but XLA:CPU takes 8 times as long: it adds the workers up number by number.
        total = lax.platform_dependent(everyone, cpu=_added_in_turn, default=lambda x: x.sum(0))
        return (total / lax.axis_size(axis)).astype(leaf.dtype)
    return vary(lax.pmean(wide, axis).astype(leaf.dtype), axis)


def _added_in_turn(x: Array) -> Array:
    return lax.fori_loop(1, len(x), lambda i, total: total + x[i], x[0])


def every(k: int, mix: Mix, axis: str = "worker") -> Mix:
    """Apply `mix` after each `k` steps, with the number of exchanges so far as its step; in between nothing travels.

    `every(k, average())` after an optimizer's update is Local SGD (arXiv:1805.09767). The step must be shared by all
    workers. Raises `ValueError` for k < 1.

    >>> x, mix = jnp.arange(4.0), jax.vmap(every(2, average()), in_axes=(0, None), axis_name="worker")
    >>> mix(x, jnp.int32(0)).tolist(), mix(x, jnp.int32(1)).tolist()
    ([0.0, 1.0, 2.0, 3.0], [1.5, 1.5, 1.5, 1.5])
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")

    def mix_sometimes(tree: PyTree, step: Step) -> PyTree:
        check_axis(axis)
        if isinstance(step, int | np.integer):
            return mix(tree, int(step) // k) if step % k == k - 1 else tree
        _check_same_step(step, axis)
        # Both branches must have one type, and what an exchange returns varies between workers.
        tree = jax.tree.map(lambda x: vary(x, axis), tree)
        return lax.cond(step % k == k - 1, lambda tree: mix(tree, step // k), lambda tree: tree, tree)

    return mix if k == 1 else mix_sometimes


def repeat(k: int, mix: Mix) -> Mix:
    """Apply `mix` `k` times at each step, as its steps k·step to k·step + k − 1: the next rounds of its table.

    Raises `ValueError` for k < 1.

    >>> from crossover_jax import cycle, exponential, gossip, whole
    >>> mix = repeat(2, gossip(exponential(4), cycle(1, 2), whole()))
    >>> jax.vmap(mix, in_axes=(0, None), axis_name="worker")(jnp.arange(4.0), 0).tolist()
    [1.5, 1.5, 1.5, 1.5]
    """
    if k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")

    def mix_again(tree: PyTree, step: Step) -> PyTree:
        for i in range(k):
            tree = mix(tree, k * step + i)
        return tree

    return mix if k == 1 else mix_again


def chain(*mixes: Mix) -> Mix:
    """Apply several mixes in their order, each with the same step.

    >>> x, mix = jnp.arange(4.0), chain(average(), lambda x, step: x + step)
    >>> jax.vmap(mix, in_axes=(0, None), axis_name="worker")(x, 10).tolist()
    [11.5, 11.5, 11.5, 11.5]
    """

    def mix(tree: PyTree, step: Step) -> PyTree:
        for one in mixes:
            tree = one(tree, step)
        return tree

    return mix


def map_packed(
    function: Callable[..., list[Array]],
    tree: PyTree,
    cut: Cut,
    axis: str,
    where: Callable[[str], bool] | None,
    specs: PyTree,
    *shared: Array,
) -> PyTree:
    """Apply `function(arrays, pieces, *shared)` to what travels: a packed vector, and leaves cut as they are."""

    def on_packed(names: list[str], parts: list[Array], *shared: Array) -> list[Array]:
        parts = [vary(part, axis) for part in parts]
        for packing in cut.packings(names, parts):
            as_they_are = [i for i, *_ in packing.split]
            packed = [_packed([parts[i] for i in packing.leaves], packing.bounds[-1])] if packing.leaves else []
            # Behind a dimension of one, as `per_worker`'s parameters are, XLA:CPU writes into a leaf where it lies;
            # where the last write also changes its shape it copies the leaf up to four times.
            arrays = function(packed + [parts[i][None] for i in as_they_are], packing.pieces(), *shared)
            flat, start = arrays[0], 0
            for i in packing.leaves:
                size, shape = parts[i].size, parts[i].shape
                parts[i] = flat[start : start + size].reshape(shape)
                start += size
            for i, array in zip(as_they_are, arrays[len(packed) :], strict=True):
                parts[i] = array[0]
        return parts

    return _map_parts(on_packed, tree, axis, where, specs, *shared)


def _packed(leaves: list[Array], length: int) -> Array:
    pieces = [x.reshape(-1) for x in leaves]
    pieces.append(jnp.zeros(length - sum(x.size for x in pieces), pieces[0].dtype))
    return jnp.concatenate([x for x in pieces if x.size] or pieces[:1])  # at an empty one XLA:CPU may end the process


def _map_parts(
    function: Callable[..., list[Array]],
    tree: PyTree,
    axis: str,
    where: Callable[[str], bool] | None,
    specs: PyTree,
    *shared: Array,
) -> PyTree:
    """Apply `function(names, parts, *shared)` to each device's parts of the leaves that travel."""
    names, leaves, treedef = flatten(tree)
    moving = [i for i, leaf in enumerate(leaves) if travels(leaf) and (where is None or where(names[i]))]
    of_leaves = _spec_of_each_leaf(specs, tree)
    apply = partial(function, [names[i] for i in moving])
    mixed = on_parts(apply, [leaves[i] for i in moving], [of_leaves[i] for i in moving], axis, *shared)
    for i, leaf in zip(moving, mixed, strict=True):
        leaves[i] = leaf
    return treedef.unflatten(leaves)


def _spec_of_each_leaf(specs: PyTree, tree: PyTree) -> list[PartitionSpec | None]:
    """`specs` may be a prefix of the tree: one spec for all leaves below."""
    spread = jax.tree.map(lambda spec, below: jax.tree.map(lambda _: spec, below), specs, tree, is_leaf=_is_spec)
    return jax.tree.leaves(spread, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)


def vary(x: Array, axis: str) -> Array:
    """Give a value that `shard_map` knows to be equal on all workers the type of one that varies over `axis`."""
    if _varies(lax.axis_index(axis), axis) and not _varies(x, axis):
        return lax.pcast(x, axis, to="varying")
    return x


def _varies(x: Any, axis: str) -> bool:
    return axis in _varying(x)


def _varying(x: Any) -> frozenset[str]:
    """The manual axes along which `x` may differ."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # the first until JAX 0.10.1


def _checked(table: Table, pool: Pool, cut: Cut) -> Table:
    """A copy of the table, so that later changes to the caller's do not reach the compiled program."""
    table = np.array(table)
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


def check_axis(axis: Any, num_workers: int | None = None) -> None:
    if not isinstance(axis, str):
        raise ValueError(
            f"`axis` must be one name, got {axis!r}: exchange along one axis, then along the other (`chain`)."
        )
    try:
        size = lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"axis {axis!r} is not bound: call the step through `per_worker`, or inside `jax.shard_map` or "
            f"`jax.vmap(..., axis_name={axis!r})`."
        ) from None
    if num_workers is not None and size != num_workers:
        raise ValueError(f"`pool` is for {num_workers} workers, but axis {axis!r} has {size}.")


def _check_same_step(step: Any, axis: str) -> None:
    """A choice of round that differs between workers compiles, and hangs on real links: refuse it while tracing.

    Along any axis: a conditional that some devices do not enter hangs the others, whatever they exchange in it.
    """
    if _varying(step) or type(step).__name__ == "BatchTracer":
        axes = ", ".join(sorted(_varying(step))) or axis
        raise ValueError(
            f"`step` must be the same on all workers, but it varies over axis {axes!r}: pass one replicated step "
            "(`per_worker(..., replicated=...)`); within `as_optax`, which counts in each worker's own state, only "
            "exchanges at every step over channels work (`by_size`, and a pool whose size divides the segments)."
        )
