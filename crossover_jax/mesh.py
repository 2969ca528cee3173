"""The mesh: one axis of workers outside, any axes inside a worker."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax.axes import Axis
from crossover_jax.leaves import PyTree

Workers = Mesh | int | tuple[int, ...]  # a mesh of them, or how many one device simulates


def make_mesh(
    num_workers: int,
    inner: Mapping[str, int] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    axis: str = "worker",
) -> Mesh:
    """A mesh of `num_workers` workers, each of `inner` devices: axes (`axis`, *inner), all automatic.

    `inner` maps axis names to sizes, {"device": 4}; without it a worker is one device. Workers vary slowest, over
    slices and then over hosts, so the devices of one worker are neighbours and what crosses slow links is gossip. A
    worker is a part of a host, or whole hosts of one slice, or whole slices.

    Raises `ValueError` if workers × inner devices are not the number of `devices` (default: all of them), or if a
    worker would hold a part of a host or slice with a part of the next, naming the worker counts that work.

    >>> make_mesh(2, devices=jax.devices()[:2]).axis_names
    ('worker',)
    """
    devices = jax.devices() if devices is None else devices
    inner = dict(inner or {})
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    if axis in inner or min(inner.values(), default=1) < 1:
        raise ValueError(f"`inner` must map names other than {axis!r} to sizes of at least 1, got {inner}.")
    each = math.prod(inner.values())
    _check_count(num_workers, each, len(devices))
    devices = sorted(devices, key=lambda d: (_slice(d), d.process_index, d.id))
    _check_cuts(num_workers, each, devices)
    shape = (num_workers, *inner.values())
    return Mesh(np.asarray(devices).reshape(shape), (axis, *inner), axis_types=(AxisType.Auto,) * len(shape))


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0) or 0  # the devices of a single slice have none


def _check_count(num_workers: int, each: int, found: int) -> None:
    needed = num_workers * each
    if needed > found:
        raise ValueError(
            f"`num_workers` = {num_workers} with {each} device(s) each needs {needed} devices, got {found}: simulate "
            f"them on one device, or on CPU set `jax.config.update('jax_num_cpu_devices', {needed})` before the first "
            "use of JAX."
        )
    if needed < found:
        raise ValueError(
            f"`num_workers` = {num_workers} with {each} device(s) each leaves {found - needed} of {found} devices "
            "idle: pass `inner`, or the `devices` to use."
        )


def _check_cuts(num_workers: int, each: int, devices: list[jax.Device]) -> None:
    per_host = set(collections.Counter((_slice(d), d.process_index) for d in devices).values())
    per_slice = set(collections.Counter(map(_slice, devices)).values())
    if len(per_host) > 1 or len(per_slice) > 1:
        raise ValueError(
            f"`devices` must be equally many on every host and slice, got {sorted(per_host)} per host and "
            f"{sorted(per_slice)} per slice."
        )
    (host,), (slice_,) = per_host, per_slice

    def fits(each: int) -> bool:
        return host % each == 0 or (each % host == 0 and (slice_ % each == 0 or each % slice_ == 0))

    if not fits(each):
        counts = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0 and fits(len(devices) // n)]
        raise ValueError(
            f"`num_workers` must not cut hosts of {host} or slices of {slice_} devices unevenly, got {num_workers} "
            f"workers of {each}; these counts work: {', '.join(map(str, counts))}."
        )


def axis_names(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else axis


def axis_sizes(workers: Workers, axis: Axis) -> tuple[int, ...]:
    """How many workers there are along each axis."""
    names = axis_names(axis)
    if isinstance(workers, Mesh):
        if missing := [name for name in names if name not in workers.shape]:
            raise ValueError(
                f"`workers` must have an axis {missing[0]!r}, got a mesh with axes {tuple(workers.shape)}: name its "
                "axis of workers, `axis=...`."
            )
        return tuple(workers.shape[name] for name in names)
    sizes = (workers,) if isinstance(workers, int) else workers
    if min(sizes) < 1 or len(sizes) != len(names):
        raise ValueError(
            f"`workers` must be a mesh or a number of workers of at least 1 for each axis of {names}, got {workers}."
        )
    return sizes


def is_spec(x: Any) -> bool:
    return x is None or isinstance(x, P)


def shardings_of(mesh: Mesh, specs: PyTree, axis: Axis) -> PyTree:
    return jax.tree.map(lambda spec: NamedSharding(mesh, P(axis, *(spec or ()))), specs, is_leaf=is_spec)
