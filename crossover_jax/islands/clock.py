"""How far a run is, whoever lives and dies: examples delivered by each life of each island, which only grow."""

from collections.abc import Mapping

MOST = 1e18  # examples of one life
LONGEST = 100  # characters of an island's name and incarnation


class Clock:
    """Delivered examples (or tokens, or steps) of all islands, as far as one island has heard.

    Each life of an island counts its own; two clocks are merged by the larger count of each life. So a count is never
    lost with who told it, and nothing is counted twice.

    >>> a, b = Clock({"a@1": 64.0}), Clock({"b@7": 32.0, "a@1": 48.0})
    >>> a.merge(b.counts)
    >>> a.total
    96.0
    """

    def __init__(self, counts: Mapping[str, float] | None = None):
        self.counts: dict[str, float] = dict(counts or {})

    @property
    def total(self) -> float:
        """Examples that all islands have delivered in all their lives."""
        return sum(self.counts.values())

    def add(self, life: str, delivered: float | int) -> None:
        """Count what this life has delivered since the last call."""
        self.counts[life] = self.counts.get(life, 0.0) + delivered

    def merge(self, counts: Mapping[str, float]) -> None:
        """Hear another island's counts; what cannot be one is left out."""
        for life, count in counts.items():
            # Of a larger integer the sum would raise, and of a longer name no message would have room.
            if isinstance(count, int | float) and 0 <= count < MOST and len(life) < LONGEST:
                self.counts[life] = max(float(count), self.counts.get(life, 0.0))
