"""How fast segments get through on each link, and which links are slow beside the others."""


TRIED = 16  # exchanges after which a link's pace is known; older ones count for less and less
SLOW, FAST = 0.6, 0.8  # of the other links' median: below the first a link is slow, until it is above the second


class Paces:
    """Of each link the mean pace of its last exchanges: time-outs show what is broken, this what is only worse.

    The mean, and not the median: of a link that loses packets a few exchanges are very slow.

    >>> paces = Paces()
    >>> for _ in range(20):
    ...     paces.add("b", 1000, 0.1), paces.add("c", 1000, 0.11), paces.add("d", 1000, 0.2)
    >>> paces.slow
    {'d': '0.04 Mbit/s, 53% of the others'}
    """

    def __init__(self) -> None:
        self.slow: dict[str, str] = {}
        self._sums: dict[str, tuple[float, float, float]] = {}  # exchanges, bytes and seconds

    def add(self, peer: str, num_bytes: int, seconds: float) -> bool:
        """Count an exchange; whether its link has just become slow."""
        keep, old = 1 - 1 / TRIED, self._sums.get(peer, (0.0, 0.0, 0.0))
        self._sums[peer] = tuple(keep * a + b for a, b in zip(old, (1, num_bytes, seconds), strict=True))
        return False

    def mbits(self):
        return {p: 8e-6 * s[1] / s[2] for p, s in self._sums.items()}
