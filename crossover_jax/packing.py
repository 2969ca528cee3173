"""From a tree to what an exchange sees: the leaves that travel, each device's part of them, packed as the cut says."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from crossover_jax.axes import around, vary
from crossover_jax.cuts import Cut
from crossover_jax.devices import OnParts, has_inner_axes, on_parts
from crossover_jax.leaves import PyTree, flatten, travels

Leaves = Callable[[str], bool] | None  # which leaves travel, by name; None: all that can


def map_packed(
    function: OnParts, tree: PyTree, cut: Cut, axis: str, leaves: Leaves, specs: PyTree, *replicated: Array
) -> PyTree:
    """Apply `function(arrays, pieces, *replicated)` to what travels: a packed vector, and leaves cut as they are."""

    def on_packed(names: list[str], parts: list[Array], *replicated: Array) -> list[Array]:
        parts = [vary(part, axis) for part in parts]
        for packing in cut.packings(names, parts):
            as_they_are = [i for i, *_ in packing.split]
            packed = [_pack([parts[i] for i in packing.leaves], packing.bounds[-1])] if packing.leaves else []
            # Behind a dimension of one, as `per_worker`'s parameters are, XLA:CPU writes into a leaf where it lies;
            # where the last write also changes its shape it copies the leaf up to four times.
            arrays = function(packed + [parts[i][None] for i in as_they_are], packing.pieces(), *replicated)
            flat, start = arrays[0], 0
            for i in packing.leaves:
                size, shape = parts[i].size, parts[i].shape
                parts[i] = flat[start : start + size].reshape(shape)
                start += size
            for i, array in zip(as_they_are, arrays[len(packed) :], strict=True):
                parts[i] = array[0]
        return parts

    return map_parts(on_packed, tree, axis, leaves, specs, *replicated)


def _pack(leaves: list[Array], length: int) -> Array:
    pieces = [x.reshape(-1) for x in leaves]
    pieces.append(jnp.zeros(length - sum(x.size for x in pieces), pieces[0].dtype))
    return jnp.concatenate([x for x in pieces if x.size] or pieces[:1])  # at an empty one XLA:CPU may end the process


def map_parts(function: OnParts, tree: PyTree, axis: str, leaves: Leaves, specs: PyTree, *replicated: Array) -> PyTree:
    """Apply `function(names, parts, *replicated)` to each device's parts of the leaves that travel.

    Raises `ValueError` where `leaves` chooses none, and where `specs` are missing.
    """
    names, values, treedef = flatten(tree)
    can_travel = [i for i, leaf in enumerate(values) if travels(leaf)]
    moving = [i for i in can_travel if leaves is None or leaves(names[i])]
    if can_travel and not moving:
        near = ", ".join(repr(names[i]) for i in can_travel[:4])
        raise ValueError(
            f"`leaves` must choose at least one leaf by its name, but it chooses none of {len(can_travel)}: nothing "
            f"would travel. The names are {near}{', …' if len(can_travel) > 4 else '.'}"
        )
    if specs is None and around().is_sharded and has_inner_axes(axis):
        raise ValueError(
            "`specs` must tell how leaves lie inside a worker, whose state `per_worker(out_specs=...)` says is sharded "
            "there, got None: pass the same specs as to `copies`, or `PartitionSpec()` if these leaves lie whole."
        )
    of_leaves = _spec_of_each_leaf(specs, tree)
    apply = partial(function, [names[i] for i in moving])
    mixed = on_parts(apply, [values[i] for i in moving], [of_leaves[i] for i in moving], axis, *replicated)
    for i, leaf in zip(moving, mixed, strict=True):
        values[i] = leaf
    return treedef.unflatten(values)


def _spec_of_each_leaf(specs: PyTree, tree: PyTree) -> list[PartitionSpec | None]:
    """`specs` may be a prefix of the tree, one spec for all leaves below, and may have more leaves than the tree."""
    of_paths = dict(jax.tree.leaves_with_path(specs, is_leaf=_is_spec))
    return [_nearest(of_paths, path) for path, _ in jax.tree.leaves_with_path(tree)]


def _nearest(of_paths: dict[Any, PartitionSpec | None], path: tuple[Any, ...]) -> PartitionSpec | None:
    above = [path[:k] for k in range(len(path), -1, -1) if path[:k] in of_paths]
    if not above:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(f"`specs` must have a PartitionSpec or None for every leaf, got none for {name!r}.")
    return of_paths[above[0]]


def _is_spec(x: Any) -> bool:
    return x is None or isinstance(x, PartitionSpec)
