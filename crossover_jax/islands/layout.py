"""What islands must have in common, and how the bits of a segment lie in a message."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Segment = tuple[Any, ...]  # what a wire says of it: one vector of bits for each dtype
# (segment, offered, mine, theirs) -> offered + ½ (theirs − mine), as the wire says it
Mixed = Callable[[int, Segment, Segment, Segment], Segment]


class Layout(NamedTuple):
    """What islands must have in common, and how the bits of each segment lie."""

    model: str  # stands for names, shapes and dtypes
    fingerprint: str  # and for cut, wire and protocol
    segments: Sequence[Sequence[tuple[np.dtype, int]]]  # of each vector of a segment, dtype and length
    mixed: Mixed
    largest: Callable[[int, Segment], float]  # magnitude of what a segment says; NaN or infinite if one number is

    def size(self, segment: int) -> int:
        """Bytes of a segment."""
        return sum(dtype.itemsize * length for dtype, length in self.segments[segment])

    def split(self, segment: int, body: bytearray) -> Segment:
        """The vectors of a segment that lie in a message one behind the other."""
        parts, start = [], 0
        for dtype, length in self.segments[segment]:
            parts.append(np.frombuffer(body, dtype, length, start))
            start += dtype.itemsize * length
        return tuple(parts)

    def scale(self, segments: Sequence[Segment]) -> float:
        """The largest magnitude in all segments."""
        return max(self.largest(k, bits) for k, bits in enumerate(segments))

    def problem(self, segment: int, theirs: Segment, scale: float, limit: float) -> str:
        """What is wrong with a segment that has come: nothing, or one half of a sentence."""
        largest = self.largest(segment, theirs)
        # Measured by our whole model: of a segment that is still zero all may change.
        if np.isfinite(largest) and largest <= limit * scale:
            return ""
        return (
            f"must be finite and at most {limit:g} times as large as our parameters, {scale:.3g}, and has {largest:g}"
        )
