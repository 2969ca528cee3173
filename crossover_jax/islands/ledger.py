"""Which segments of an island are on offer or reserved, and what has arrived: what keeps the sum over islands."""

import collections
import threading
from typing import NamedTuple

from crossover_jax.islands.layout import Mixed, Segment

COMMITTED, ABORTED = "committed", "aborted"
KEPT = 4096  # outcomes that are remembered


class Publication(NamedTuple):
    """An island's parameters at one moment, as a wire says them. `number` counts an incarnation's publications."""

    number: int
    segments: list[Segment]
    scale: float  # the largest magnitude in all of them


class Arrival(NamedTuple):
    """An exchange that both sides have agreed on: this one adds ½ (theirs − mine) to its segment."""

    segment: int
    mine: Segment
    theirs: Segment


class Ledger:
    """One island's side of all exchanges.

    An exchange has an id, and a segment takes part in one exchange at a time. What is offered has every difference in
    it: those that were added before it was packed and, by `mixed`, those that are still to be added. Exchanges of
    anything older diverge, even one at a time. Between two calls of `take` a segment goes through at most `rounds`
    exchanges. What an id came to is decided once. Called by the network's thread and, for `take`, by the training
    loop's.
    """

    def __init__(self, num_segments: int, rounds: int, mixed: Mixed):
        self.rounds, self._mixed = rounds, mixed
        self.now: Publication | None = None
        self._packed_from = [0] * num_segments  # the first publication that has the last difference in it
        self._reserved: dict[str, tuple[int, Publication]] = {}  # by the exchange's id
        self._busy: set[int] = set()  # segments that are reserved
        self._done = [0] * num_segments  # exchanges since `take`
        self._arrived: list[Arrival] = []
        self._outcomes: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._lock = threading.Lock()

    def publish(self, publication: Publication) -> None:
        """Offer this publication instead of the last one; what is reserved of that one stays so."""
        for segment, mine, theirs in self._arrived:
            if self._done[segment] < self.rounds:
                publication.segments[segment] = self._mixed(segment, publication.segments[segment], mine, theirs)
        self.now = publication

    def is_offered(self, segment: int) -> bool:
        """Whether `reserve` would succeed."""
        if self.now is None or segment in self._busy or self.now.number < self._packed_from[segment]:
            return False
        return self._done[segment] < self.rounds

    def reserve(self, segment: int, id: str) -> Publication | None:
        """Keep a segment for this exchange; None if it is not on offer, or the id is known already."""
        with self._lock:
            if not self.is_offered(segment) or id in self._reserved or id in self._outcomes:
                return None
            assert self.now is not None
            self._busy.add(segment)
            self._reserved[id] = segment, self.now
            return self.now

    def commit(self, id: str, theirs: Segment) -> bool:
        """Decide that the exchange takes place, once; False if it has been aborted."""
        if id not in self._reserved:
            return self._outcomes.get(id) == COMMITTED
        segment, publication = self._reserved[id]
        mine, now = publication.segments[segment], self.now
        assert now is not None
        if self._done[segment] + 1 < self.rounds:  # else it is not offered before it is packed anew
            now.segments[segment] = self._mixed(segment, now.segments[segment], mine, theirs)
        with self._lock:
            self._arrived.append(Arrival(segment, mine, theirs))
            self._done[segment] += 1
            self._busy.discard(segment)
            del self._reserved[id]
            self._decide(id, COMMITTED)
        return True

    def abort(self, id: str) -> str:
        """Decide that the exchange does not take place, if nothing is decided yet; what it came to.

        An id that was never heard of is aborted too: should it be asked for later, it is refused.
        """
        with self._lock:
            if id in self._reserved:
                segment, _ = self._reserved.pop(id)
                self._busy.discard(segment)
            if id not in self._outcomes:
                self._decide(id, ABORTED)
            return self._outcomes[id]

    def _decide(self, id: str, outcome: str) -> None:
        self._outcomes[id] = outcome
        if len(self._outcomes) > KEPT:
            self._outcomes.popitem(last=False)

    def take(self, next_number: int) -> list[Arrival]:
        """What has arrived, to be added now, before publication `next_number` is packed."""
        with self._lock:
            arrived, self._arrived = self._arrived, []
            for arrival in arrived:
                self._packed_from[arrival.segment] = next_number
                self._done[arrival.segment] = 0
            return arrived
