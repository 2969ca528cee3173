"""What an island knows of its links: what failed last on each, how long it is left alone, and which are impaired."""

import collections
import logging
import statistics
from typing import Any

from crossover_jax.islands.heads import OTHERS

log = logging.getLogger("crossover_jax.islands")
TRIED = 64  # exchanges after which a link is judged; older ones count for less and less
KNOWN = 0.63 * TRIED  # what they add up to by then
SLOW, FAST = 0.55, 0.75  # of the others' median pace: a link is slow from below the first to above the second
LOSSY, CLEAN = 0.005, 0.0025  # of packets sent again: likewise


class Links:
    """The links of the island `name`, by the name of the peer. Time-outs show what is broken; paces what is worse.

    `impaired` says why of each link that is slow beside the others of this island, or loses packets. A link's pace is
    bytes over seconds of its last exchanges, and not a median: the few that wait for a lost packet must show.

    >>> links = Links("a")
    >>> links.members = {"b": "host:1", "c": "host:2", "d": "host:3"}
    >>> for _ in range(TRIED):
    ...     for peer, seconds in ("b", 0.1), ("c", 0.11), ("d", 0.2):
    ...         links.count(peer, 1000, seconds, packets=(4, 0))
    >>> links.impaired
    {'d': '0.04 Mbit/s, 52% of the other links'}
    """

    def __init__(self, name: str):
        self.name = name
        self.members: dict[str, str] = {}  # addresses of the others, by name or, where that is unknown, by themselves
        self.errors: dict[str, str] = {}  # the last of each link, until it works again
        self.impaired: dict[str, str] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        self._not_before: dict[str, tuple[float, float]] = {}  # of peers that failed: when, and then how long
        self._sums: dict[str, tuple[float, ...]] = {}  # exchanges, bytes, seconds, packets, packets sent again

    def living(self, now: float) -> list[str]:
        """Who is not known to be away."""
        return [peer for peer in self.members if self._not_before.get(peer, (0.0, 0.0))[0] <= now]

    def works(self, peer: str) -> None:
        """It has answered."""
        self._not_before.pop(peer, None)
        self.errors.pop(peer, None)

    def leave_alone(self, peer: str, now: float) -> None:
        """Ask it for nothing for a while, longer each time."""
        wait = self._not_before.get(peer, (0.0, 1.0))[1]
        self._not_before[peer] = now + wait, min(2 * wait, 30.0)

    def keep_error(self, peer: str, why: str, count: str) -> None:
        """Show it, and log it if it is another one than the last; of peers that nobody knows there may be many."""
        self.counts[count] += 1
        if self.errors.pop(peer, None) != why:
            log.warning("%s, exchange with %s: %s", self.name, peer, why)
        self.errors[peer] = why
        self._forget_the_oldest(self.errors)

    def count(self, peer: str, num_bytes: int, seconds: float, packets: tuple[int, int]) -> None:
        """Judge a link by one more exchange: bytes each way, and how many packets were sent, and sent again."""
        keep, old = 1 - 1 / TRIED, self._sums.pop(peer, (0.0,) * 5)
        new = 1.0, num_bytes, max(seconds, 1e-9), *packets
        self._sums[peer] = tuple(keep * a + b for a, b in zip(old, new, strict=True))
        self._forget_the_oldest(self._sums)
        why, was = self._impairment(peer), self.impaired.pop(peer, "")
        if why:
            self.impaired[peer] = why
        if bool(why) != bool(was):
            log.warning("%s, link to %s: %s", self.name, peer, why or "it is as good as others again")

    def _forget_the_oldest(self, of_peers: dict[str, Any]) -> None:
        if len(of_peers) > OTHERS + len(self.members):
            del of_peers[next(iter(of_peers))]

    def _impairment(self, peer: str) -> str:
        number, num_bytes, seconds, sent, again = self._sums[peer]
        if number <= KNOWN or peer not in self.members:
            return ""
        known = (self._sums[other] for other in self.members if other != peer and other in self._sums)
        others = [sums[1] / sums[2] for sums in known if sums[0] > KNOWN]
        was, pace = self.impaired.get(peer, ""), num_bytes / seconds
        found = []
        if others and pace < (FAST if "Mbit" in was else SLOW) * (median := statistics.median(others)):
            found.append(f"{8e-6 * pace:.3g} Mbit/s, {pace / median:.0%} of the other links")
        if sent and again / sent > (CLEAN if "packets" in was else LOSSY):
            found.append(f"{again / sent:.1%} of packets are sent again")
        return "; ".join(found)
