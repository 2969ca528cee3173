"""From parameters to what islands send of them, and from what has arrived to parameters: two compiled functions."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from crossover_jax.cuts import Cut, Packing
from crossover_jax.islands.hosts import Hosts
from crossover_jax.islands.layout import Layout, Segment
from crossover_jax.islands.ledger import Arrival
from crossover_jax.leaves import PyTree, flatten, travels, widened
from crossover_jax.wire import BLOCK, LARGEST, Wire, check_wire

PROTOCOL = 1


class Payload:
    """How one tree of parameters, cut and worded, travels between islands.

    A segment is one vector of bits for each dtype of the leaves that travel; of an island of several hosts one for
    each row of `hosts`, and each host sends those of its own rows. `pack` and `add` are compiled once. What is sent is
    a copy, so the parameters may be donated to the next step.
    """

    def __init__(self, like: PyTree, cut: Cut, wire: str | None):
        self.hosts = hosts = Hosts(like)
        names, leaves, self._tree = flatten(like)
        self._moving = [i for i, leaf in enumerate(leaves) if travels(leaf)]
        if not self._moving:
            raise ValueError("`like` must have a leaf of floating-point numbers, or nothing would travel; it has none.")
        check_wire(wire)
        self._wire = Wire(wire)
        shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        self._leaves = [shapes[i] for i in self._moving]
        self._packings = cut.packings([names[i] for i in self._moving], self._leaves)
        # Of each packing and segment, the whole vector, and one row of it.
        self._wholes = [_shape_of(packing, self._leaves) for packing in self._packings]
        self._says: list[list[Any]] = [
            [jax.ShapeDtypeStruct((-(-x.size // hosts.rows),), x.dtype) for x in wholes] for wholes in self._wholes
        ]
        bits = jax.eval_shape(self._pack, self._leaves)
        own = len(hosts.own)
        self._zeros = [tuple(np.zeros(own * x.shape[-1], x.dtype) for x in segment) for segment in bits]
        model = digest([[name, list(x.shape), str(x.dtype)] for name, x in zip(names, shapes, strict=True)])
        vectors = [[(x.dtype, x.size) for x in segment] for segment in self._zeros]
        order = [[packing.leaves, packing.bounds, packing.split] for packing in self._packings]
        said = [PROTOCOL, model, wire, order, *([hosts.rows, hosts.own] if hosts.count > 1 else [])]
        self.layout = Layout(model, digest(said), vectors, self.mixed, self.largest)
        self.num_params = sum(x.size for x in self._leaves)
        self.num_bytes = sum(x.size * x.dtype.itemsize for x in self._leaves)
        self._mixes: dict[Any, Callable] = {}  # compiled, by what the wire speaks of
        self._packed = hosts.jit_rows(self._pack)
        self._adds: dict[Any, Callable] = {}  # compiled, by where the leaves lie, for there they stay

    def pack(self, params: PyTree) -> list[Segment]:
        """What is sent of each segment, still on the devices."""
        return self.hosts.in_order(self._packed(self._of(params)))

    def add(self, params: PyTree, arrived: Sequence[Arrival], rounds: int = 1) -> tuple[PyTree, Array]:
        """The parameters with ½ (theirs − mine) added for all that came; ‖theirs − mine‖² of each segment's first.

        Of a segment there are at most `rounds`; several hosts add so many, whatever came, and so stay in step.
        """
        moved, squares, left = self._of(params), [], list(arrived)
        added = self._add_at([getattr(leaf, "sharding", None) for leaf in moved])
        while left or len(squares) < (1 if self.hosts.count == 1 else rounds):
            mine, theirs, later = list(self._zeros), list(self._zeros), []
            taken: set[int] = set()
            for arrival in left:  # of each segment one at a time: the program has room for one
                if arrival.segment in taken:
                    later.append(arrival)
                    continue
                taken.add(arrival.segment)
                mine[arrival.segment], theirs[arrival.segment] = arrival.mine, arrival.theirs
            rows = [[tuple(map(self.hosts.with_rows, segment)) for segment in side] for side in (mine, theirs)]
            moved, of_these = self.hosts.in_order(added(moved, *rows))
            squares, left = [*squares, of_these], later
        return self._with(params, moved), squares[0]

    def _add_at(self, shardings: list[Any]) -> Callable:
        places = tuple(sharding if isinstance(sharding, NamedSharding) else None for sharding in shardings)
        if places not in self._adds:
            self._adds[places] = jax.jit(self._add, out_shardings=(list(places), None))
        return self._adds[places]

    def copied(self, params: PyTree) -> list[Array]:
        """Copies of the leaves that travel, on the devices."""
        return self.hosts.replicated([jnp.copy(leaf) for leaf in self._of(params)])

    def mean(self, like: PyTree, bodies: Sequence[bytearray]) -> PyTree:
        """The mean of several islands' `copied` leaves, and what does not travel from `like`."""
        means, start = [], 0
        for x in self._leaves:
            of_each = [np.frombuffer(body, x.dtype, x.size, start).astype(widened(x.dtype)) for body in bodies]
            means.append(np.mean(of_each, axis=0).reshape(x.shape).astype(x.dtype))
            start += x.size * x.dtype.itemsize
        return self._with(like, means)

    def _with(self, tree: PyTree, moved: Sequence[Any]) -> PyTree:
        leaves = jax.tree.leaves(tree)
        for i, leaf in zip(self._moving, moved, strict=True):
            leaves[i] = leaf
        return self._tree.unflatten(leaves)

    def mixed(self, k: int, offered: Segment, mine: Segment, theirs: Segment) -> Segment:
        """What the wire says of offered + ½ (theirs − mine), on the host: what is offered to the next peer."""
        return tuple(
            np.concatenate([self._mix(x, a, b, says[k]) for x, a, b in zip(*map(self._rows, bits), strict=True)])
            for *bits, says in zip(offered, mine, theirs, self._says, strict=True)
        )

    def _rows(self, bits: np.ndarray) -> np.ndarray:
        return bits.reshape(len(self.hosts.own), -1)

    def _mix(self, offered: np.ndarray, mine: np.ndarray, theirs: np.ndarray, said: Any) -> Any:
        if not self._wire.is_narrower(said):
            wide = np.promote_types(said.dtype, widened(said.dtype))
            return (offered + (theirs.astype(wide) - mine.astype(wide)) / 2).astype(mine.dtype)
        if said not in self._mixes:

            def mix(offered: Array, mine: Array, theirs: Array) -> Array:
                x, a, b = (self._wire.decode(bits, said) for bits in (offered, mine, theirs))
                return self._wire.encode((x + (b - a) / 2).astype(said.dtype))

            self._mixes[said] = jax.jit(mix)
        return self._mixes[said](offered, mine, theirs)

    def largest(self, k: int, segment: Segment) -> float:
        """The largest magnitude of what the bits of segment `k` say; NaN or infinite if one of the numbers is."""
        found = [
            self._largest(row, says[k])
            for bits, says in zip(segment, self._says, strict=True)
            for row in self._rows(bits)
        ]
        return float(np.max(found))  # NaN if one is

    def _largest(self, bits: np.ndarray, said: Any) -> float:
        if bits.size == 0:
            return 0.0
        dtype, most = np.dtype(said.dtype), 1
        if not self._wire.is_narrower(said):
            dtype = np.zeros(0, dtype).real.dtype
        elif self._wire.name in LARGEST:
            scales = bits[-4 * -(-said.size // BLOCK) :]
            bits, dtype, most = scales, np.dtype(np.float32), LARGEST[self._wire.name]
        else:
            dtype = np.dtype(jnp.dtype(self._wire.name))
        # Magnitudes are ordered as the integers that their bits are without the sign, and so are infinities and NaN.
        whole = bits.view(f"uint{8 * dtype.itemsize}")
        largest = (whole & ~whole.dtype.type(1 << 8 * dtype.itemsize - 1)).max()
        return float(largest.view(dtype)) * most

    def _of(self, params: PyTree) -> list[Any]:
        leaves = jax.tree.leaves(params)
        return [leaves[i] for i in self._moving]

    def _pack(self, leaves: list[Array]) -> list[Segment]:
        found = []
        for packing, wholes in zip(self._packings, self._wholes, strict=True):
            arrays = _arrays(packing, leaves)
            for k, whole in enumerate(wholes):
                parts = [
                    lax.slice_in_dim(array, bounds[k], bounds[k + 1], axis=dimension).reshape(-1)
                    for array, (dimension, bounds) in zip(arrays, packing.pieces(), strict=True)
                ]
                found.append((k, self._encode(_concatenated(parts, 0, whole.dtype))))
        return [tuple(bits for k, bits in found if k == segment) for segment in range(len(self._wholes[0]))]

    def _encode(self, vector: Array) -> Array:
        if self.hosts.rows == 1:
            return self._wire.encode(vector)
        rows = jnp.pad(vector, (0, -vector.size % self.hosts.rows)).reshape(self.hosts.rows, -1)
        return jax.vmap(self._wire.encode)(rows) if rows.size else rows

    def _decode(self, bits: Array, row: jax.ShapeDtypeStruct, whole: jax.ShapeDtypeStruct) -> Array:
        if self.hosts.rows == 1:
            return self._wire.decode(bits, whole)
        return jax.vmap(lambda bits: self._wire.decode(bits, row))(bits).reshape(-1)[: whole.size]

    def _add(self, leaves: list[Array], mine: list[Segment], theirs: list[Segment]) -> tuple[list[Array], Array]:
        leaves, squares = list(leaves), jnp.zeros(len(mine))
        for p, (packing, rows, wholes) in enumerate(zip(self._packings, self._says, self._wholes, strict=True)):
            differences = []
            for k, (row, whole) in enumerate(zip(rows, wholes, strict=True)):
                wide = widened(whole.dtype)
                if not whole.size:
                    differences.append(jnp.zeros(0, wide))
                    continue
                a, b = (self._decode(of[k][p], row, whole).astype(wide) for of in (mine, theirs))
                differences.append((b - a) / 2)
                squares = squares.at[k].add(jnp.sum(jnp.abs(b - a) ** 2).astype(jnp.float32))
            for i, difference in _leaves_of(packing, differences, leaves):
                leaves[i] = (leaves[i].astype(difference.dtype) + difference).astype(leaves[i].dtype)
        return leaves, squares


def _arrays(packing: Packing, leaves: list[Array]) -> list[Array]:
    """What a packing cuts: the vector of the packed leaves, if there is one, and those that are cut as they are."""
    vector = [leaves[i].reshape(-1) for i in packing.leaves]
    if vector:
        padding = packing.bounds[-1] - sum(x.size for x in vector)
        vector = [jnp.concatenate([*vector, jnp.zeros(padding, vector[0].dtype)])]
    return vector + [leaves[i][None] for i, *_ in packing.split]


def _leaves_of(packing: Packing, segments: list[Array], leaves: list[Array]) -> Iterator[tuple[int, Array]]:
    """Of one vector for each segment, the part of each leaf: `_arrays` and cutting, backwards."""
    shapes = [x.shape for x in jax.eval_shape(partial(_arrays, packing), leaves)]
    starts, whole = [0] * len(segments), []
    for shape, (dimension, bounds) in zip(shapes, packing.pieces(), strict=True):
        parts = []
        for k, segment in enumerate(segments):
            own = (*shape[:dimension], bounds[k + 1] - bounds[k], *shape[dimension + 1 :])
            size = math.prod(own)
            parts.append(segment[starts[k] : starts[k] + size].reshape(own))
            starts[k] += size
        whole.append(_concatenated(parts, dimension, segments[0].dtype))
    at = 0
    for i in packing.leaves:
        yield i, whole[0][at : at + leaves[i].size].reshape(leaves[i].shape)
        at += leaves[i].size
    for (i, *_), array in zip(packing.split, whole[bool(packing.leaves) :], strict=True):
        yield i, array[0]


def _concatenated(parts: list[Array], dimension: int, dtype: Any) -> Array:
    parts = [part for part in parts if part.size]  # at an empty one XLA:CPU may end the process
    return jnp.concatenate(parts, axis=dimension) if parts else jnp.zeros(0, dtype)


def _shape_of(packing: Packing, leaves: list[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    """Of each segment, the shape of its vector of this packing's dtype."""
    shapes = [x.shape for x in jax.eval_shape(partial(_arrays, packing), leaves)]
    sizes = [0] * (len(packing.bounds) - 1)
    for shape, (dimension, bounds) in zip(shapes, packing.pieces(), strict=True):
        rest = math.prod(shape[:dimension] + shape[dimension + 1 :])
        sizes = [size + rest * (end - start) for size, start, end in zip(sizes, bounds, bounds[1:], strict=False)]
    first, *_ = [*packing.leaves, *(i for i, *_ in packing.split)]
    return [jax.ShapeDtypeStruct((size,), leaves[first].dtype) for size in sizes]


def digest(said: Any) -> str:
    """What stands for something that must be the same on two sides."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
