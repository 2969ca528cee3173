"""What travels together: a cut divides a tree of parameters into segments.

The leaves that travel are packed into one vector per dtype; a cut says in which order, and where the vector is cut.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from crossover_jax.leaves import PyTree, flatten, travels


class Packing(NamedTuple):
    """Leaves of one dtype: some packed in one vector, in this order, and cut at `bounds`, others cut as they are.

    `bounds` has one entry more than there are segments; the last one may lie behind the last element, which is padding.
    `split` has a leaf, a dimension and how much of it each segment has.
    """

    leaves: tuple[int, ...]
    bounds: tuple[int, ...]
    split: tuple[tuple[int, int, int], ...] = ()

    def pieces(self) -> list[tuple[int, tuple[int, ...]]]:
        """Of the vector, if there is one, and of each split leaf behind a dimension of one: what is cut, and where."""
        segments = len(self.bounds) - 1
        cut = [(1 + dimension, tuple(range(0, segments * part + 1, part))) for _, dimension, part in self.split]
        return [(0, self.bounds)] * bool(self.leaves) + cut


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a tree is divided into `num_segments` parts; made by `whole`, `by_size` and `by_module`.

    `segment_of_name` gives the segment of a leaf by its name, "layers/0/kernel"; without it the packed vector is cut
    into equal parts, at multiples of `align` elements where that pads it by less than 1/64. `by_rows` leaves large
    leaves out of the vector.
    """

    num_segments: int
    segment_of_name: Callable[[str], int] | None = None
    align: int = 1024
    by_rows: bool = False

    @property
    def is_equal(self) -> bool:
        """All segments of one packed vector have the same length."""
        return self.segment_of_name is None

    def packings(self, names: Sequence[str], leaves: Sequence[Any]) -> list[Packing]:
        """One `Packing` per dtype. Raises `ValueError` if there are more segments than elements."""
        total = sum(_size(leaf) for leaf in leaves)
        if total and self.num_segments > total:
            raise ValueError(
                f"`cut` must make at most as many segments as elements travel (from each device), {total}, but it "
                f"makes {self.num_segments}: pass `cut=by_size(k)` with fewer, or `whole()`."
            )
        groups: dict[Any, list[int]] = {}
        for i, leaf in enumerate(leaves):
            groups.setdefault(leaf.dtype, []).append(i)
        sizes = [_size(leaf) for leaf in leaves]
        if self.segment_of_name is None:
            return [self._pack_equal(group, sizes, leaves) for group in groups.values()]
        segments = [self.segment_of_name(name) for name in names]
        return [self._pack_named(group, segments, sizes) for group in groups.values()]

    def _pack_equal(self, group: list[int], sizes: list[int], leaves: Sequence[Any]) -> Packing:
        split = {i: d for i in group if (d := self._dimension(np.shape(leaves[i]))) is not None}
        group = [i for i in group if i not in split]
        size, count = sum(sizes[i] for i in group), self.num_segments
        align = self.align if size >= 64 * count * self.align else 1
        length = -(-size // (count * align)) * align
        bounds = tuple(range(0, count * length + 1, length)) if length else (0,) * (count + 1)
        parts = tuple((i, d, np.shape(leaves[i])[d] // count) for i, d in split.items())
        return Packing(tuple(group), bounds, parts)

    def _dimension(self, shape: tuple[int, ...]) -> int | None:
        """The first that segments divide, of a leaf of which each has `align` elements."""
        if not self.by_rows or np.prod(shape, dtype=int) < self.num_segments * self.align:
            return None
        return next((d for d, length in enumerate(shape) if length % self.num_segments == 0), None)

    def _pack_named(self, group: list[int], segments: list[int], sizes: list[int]) -> Packing:
        lengths = np.zeros(self.num_segments, int)
        for i in group:
            lengths[segments[i]] += sizes[i]
        return Packing(tuple(sorted(group, key=lambda i: segments[i])), (0, *np.cumsum(lengths).tolist()))

    def segment_of(self, tree: PyTree) -> PyTree:
        """For every element of every leaf, the segment it belongs to; −1 for leaves that do not travel.

        This is what a numpy oracle needs: element e of segment s is mixed by the matrix of round `table[t, s]`.

        >>> by_size(2).segment_of({"w": np.zeros((2, 2)), "b": np.zeros(2)})
        {'b': array([0, 0]), 'w': array([[0, 1], [1, 1]])}
        """
        names, leaves, treedef = flatten(tree)
        segments = [np.full(np.shape(leaf), -1) for leaf in leaves]
        moving = [i for i, leaf in enumerate(leaves) if travels(leaf)]
        for packing in self.packings([names[i] for i in moving], [leaves[i] for i in moving]):
            of_element = np.repeat(np.arange(self.num_segments), np.diff(packing.bounds))
            start = 0
            for i in packing.leaves:
                leaf = segments[moving[i]]
                leaf[...] = of_element[start : start + leaf.size].reshape(leaf.shape)
                start += leaf.size
            for i, d, part in packing.split:
                of_row = np.repeat(np.arange(self.num_segments), part)
                segments[moving[i]][...] = np.expand_dims(of_row, [*range(d), *range(d + 1, segments[moving[i]].ndim)])
        return treedef.unflatten(segments)


def whole() -> Cut:
    """One segment: the whole model goes to the same peer, as in SGP (arXiv:1811.10792).

    >>> whole().segment_of({"w": np.zeros(3)})
    {'w': array([0, 0, 0])}
    """
    return Cut(1)


def by_size(num_segments: int, *, align: int = 1024) -> Cut:
    """`num_segments` equal segments of the packed vector, which lets an exchange compile without conditionals.

    `align` is a number of elements: cuts at multiples of 1024 spare the TPU compiler a copy of every segment. Raises
    `ValueError` for fewer than one segment or element.

    >>> by_size(3).segment_of({"w": np.zeros(6)})
    {'w': array([0, 0, 1, 1, 2, 2])}
    """
    if num_segments < 1:
        raise ValueError(f"`num_segments` must be at least 1, got {num_segments}.")
    if align < 1:
        raise ValueError(f"`align` must be at least 1, got {align}.")
    return Cut(num_segments, align=align)


def by_rows(num_segments: int, *, align: int = 1024) -> Cut:
    """`num_segments` equal segments, each with an equal part of every large leaf: an exchange without packing.

    A leaf of at least `align` elements per segment is cut along its first dimension that `num_segments` divides; all
    others are packed and cut `by_size`. With `in_flight=k` it needs the least memory on TPUs (docs/scaling.md), and
    with 1 the least time on CPUs (docs/performance.md). Raises `ValueError` for fewer than one segment or element.

    >>> cut = by_rows(2, align=2)
    >>> cut.segment_of({"w": np.zeros((4, 2)), "b": np.zeros(3)})["w"].tolist()
    [[0, 0], [0, 0], [1, 1], [1, 1]]
    """
    return dataclasses.replace(by_size(num_segments, align=align), by_rows=True)


def by_module(tree: PyTree, depth: int | Callable[[str], str] = 1) -> Cut:
    """Segments at module boundaries: the parameters below one module, `depth` levels down, travel together.

    `tree` is the tree that will travel (arrays, or their shapes). Instead of a depth, a function of a leaf's name,
    "layer1/0/conv1/kernel", may return the name of its segment; segments are numbered in the order of the leaves.
    Raises `ValueError` for a depth below 1. Reference: Crossover-SGD, arXiv:2012.15198, segment-wise model exchange.

    >>> params = {"stem": {"kernel": np.zeros(3)}, "head": {"kernel": np.zeros(2), "bias": np.zeros(1)}}
    >>> cut = by_module(params)
    >>> cut.num_segments, cut.segment_of(params)["stem"]["kernel"]
    (2, array([1, 1, 1]))
    """
    if isinstance(depth, int) and depth < 1:
        raise ValueError(f"`depth` must be at least 1, got {depth}.")
    module_of = depth if callable(depth) else lambda name: "/".join(name.split("/")[:-1][:depth] or [name])
    names, leaves, _ = flatten(tree)
    modules: dict[str, int] = {}
    for name, leaf in zip(names, leaves, strict=True):
        if travels(leaf):
            modules.setdefault(module_of(name), len(modules))

    def segment_of_name(name: str) -> int:
        if module_of(name) not in modules:
            raise ValueError(
                f"leaf {name!r} is in none of the modules of this cut, {list(modules)}: cut the very tree that travels."
            )
        return modules[module_of(name)]

    return Cut(len(modules), segment_of_name)


def _size(leaf: Any) -> int:
    return int(np.prod(np.shape(leaf)))
