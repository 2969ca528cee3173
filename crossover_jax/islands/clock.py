"""How far a run is, whoever lives and dies: examples delivered by each life of each island, which only grow."""

from collections.abc import Mapping


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
        """Hear another island's counts."""
        for life, count in counts.items():
            self.counts[life] = max(count, self.counts.get(life, 0.0))
