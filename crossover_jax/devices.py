"""The devices of one worker: each sends its own part of every leaf, so that one worker sends one model in all."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from crossover_jax.axes import checks_types

OnParts = Callable[..., list[jax.Array]]


def inner_axes(axis: str) -> dict[str, int]:
    """Names and sizes of the axes inside a worker; none where one device is a worker, or simulates all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.manual_axes:
        return {}
    return {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes and size > 1}


def has_inner_axes(axis: str) -> bool:
    """Whether how leaves lie inside a worker must be told: its devices are several, and types do not say it."""
    return bool(inner_axes(axis)) and AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types


def on_parts(function: OnParts, leaves: list[jax.Array], specs: Sequence[P | None], axis: str, *replicated: Any):
    """`function(parts, *replicated)`, each device with its own part of each leaf; returns leaves as they lay.

    Inside the `shard_map` over `axis` a nested one takes the inner axes too. A leaf whose spec names all of them enters
    as it lies. One that lies whole on every device enters flat, 1/n per device, and is gathered inside the worker
    afterwards; one in between is split further. Without inner axes, and under `vmap`, the leaves are the parts.

    `specs` are over inner axes; None means as the type says (Explicit axes), or whole on every device.
    """
    mesh, inner = jax.sharding.get_abstract_mesh(), inner_axes(axis)
    if not inner:
        return function(leaves, *replicated)
    own = [_own_spec(leaf, spec, mesh) for leaf, spec in zip(leaves, specs, strict=True)]
    split = [_split_spec(leaf.shape, spec, inner) for leaf, spec in zip(leaves, own, strict=True)]
    parts = [_enter(leaf, o, s, inner, mesh) for leaf, o, s in zip(leaves, own, split, strict=True)]
    lying = {i: s for i, s in enumerate(split) if s is not None}
    flat: dict[Any, list[int]] = {}  # by dtype
    for i, leaf in enumerate(leaves):
        if i not in lying:
            flat.setdefault(leaf.dtype, []).append(i)

    def on_device(parts: list[jax.Array], *replicated: Any):
        """Flat leaves leave packed, one vector per dtype: leaf by leaf they would be hundreds of messages."""
        parts = function(parts, *replicated)
        packed = [_aligned(jnp.concatenate([parts[i] for i in group])) for group in flat.values()]
        return {i: parts[i] for i in lying}, packed

    every = P(tuple(inner))
    in_specs = ([every if s is None else s for s in split], *[P()] * len(replicated))
    out_specs = (lying, [every] * len(flat))
    # As the `shard_map` around it: with types checked only here, what it closes over would have none.
    parts, packed = jax.shard_map(
        on_device, in_specs=in_specs, out_specs=out_specs, axis_names=set(inner), check_vma=checks_types(axis)
    )(parts, *replicated)
    for group, vector in zip(flat.values(), packed, strict=True):
        rows = _place(vector, P(), mesh).reshape(math.prod(inner.values()), -1)
        parts |= dict(zip(group, _leaves_of(rows, [leaves[i] for i in group]), strict=True))
    return [_place(parts[i], o, mesh) for i, o in enumerate(own)]


def _leaves_of(rows: jax.Array, like: list[jax.Array]) -> list[jax.Array]:
    """Row j of a gathered vector is what device j held: its part of each leaf, one after the other."""
    leaves, start = [], 0
    for leaf in like:
        length = -(-leaf.size // len(rows))
        leaves.append(rows[:, start : start + length].reshape(-1)[: leaf.size].reshape(leaf.shape))
        start += length
    return leaves


def _enter(leaf: jax.Array, own: P, split: P | None, inner: dict[str, int], mesh: AbstractMesh) -> jax.Array:
    leaf = _place(leaf, own, mesh)  # without this the split leaks into the compute before the exchange
    if split is not None:
        return _place(leaf, split, mesh)
    flat = _place(leaf, P(), mesh).reshape(-1)
    return _place(jnp.pad(flat, (0, -flat.size % math.prod(inner.values()))), P(tuple(inner)), mesh)


def _aligned(x: jax.Array) -> jax.Array:
    """Parts that are no multiple of 1024 elements are not gathered on a TPU but reduced, at twice the bytes."""
    return jnp.pad(x, (0, -x.size % 1024))


def _own_spec(leaf: jax.Array, spec: P | None, mesh: AbstractMesh) -> P:
    if spec is not None:
        return spec
    return jax.typeof(leaf).sharding.spec if AxisType.Explicit in mesh.axis_types else P()


def _split_spec(shape: tuple[int, ...], own: P, inner: dict[str, int]) -> P | None:
    """The leaf's spec with the missing inner axes added to its largest dimension that they divide; None: flat."""
    used = {name for part in own if part is not None for name in (part if isinstance(part, tuple) else (part,))}
    missing = tuple(name for name in inner if name not in used)
    if not missing:
        return own
    if not used:
        return None
    entries = [*own, *[None] * (len(shape) - len(own))]
    ways = math.prod(inner[name] for name in missing)
    fits = [d for d, entry in enumerate(entries) if entry is None and shape[d] % ways == 0]
    if not fits:
        return None
    entries[max(fits, key=lambda d: shape[d])] = missing
    return P(*entries)


def _place(x: jax.Array, spec: P, mesh: AbstractMesh) -> jax.Array:
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, spec)
    return lax.with_sharding_constraint(x, spec)
