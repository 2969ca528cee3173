"""Which segments of an island are on offer or reserved, and what has arrived: what keeps the sum over islands."""

import collections
import threading
from collections.abc import Callable
from typing import NamedTuple

from crossover_jax.islands.layout import Segment

COMMITTED, ABORTED = "committed", "aborted"
KEPT = 4096  # outcomes that are remembered
Mixed = Callable[[int, Segment, Segment], Segment]  # (segment, mine, theirs) -> what both are after their exchange


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

    An exchange has an id, and a segment takes part in one exchange at a time. It is on offer only in a publication
    that was packed after the last difference to it was added: exchanges of older ones diverge, even one at a time.
    A publication's segment may go through several `rounds`: it is then offered as `mixed` has made it, differences
    included that are still to be added. What an id came to is decided once. Called by the network's thread and, for
    `take`, by the training loop's.
    """

    def __init__(self, num_segments: int, rounds: int = 1, mixed: Mixed | None = None):
        self.rounds, self._mixed = rounds, mixed
        self.now: Publication | None = None
        self._packed_from = [0] * num_segments  # the first publication that has the last difference in it
        self._reserved: dict[str, tuple[int, Publication]] = {}  # by the exchange's id
        self._busy: set[int] = set()  # segments that are reserved
        self._rounds: dict[int, tuple[int, int]] = {}  # of segments with differences to add: publication, how many
        self._arrived: list[Arrival] = []
        self._outcomes: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._lock = threading.Lock()

    def publish(self, publication: Publication) -> None:
        """Offer this publication instead of the last one; what is reserved of that one stays so."""
        self.now = publication

    def is_offered(self, segment: int) -> bool:
        """Whether `reserve` would succeed."""
        now = self.now
        if now is None or segment in self._busy or now.number < self._packed_from[segment]:
            return False
        number, done = self._rounds.get(segment, (now.number, 0))
        return number == now.number and done < self.rounds

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
        with self._lock:
            if id not in self._reserved:
                return self._outcomes.get(id) == COMMITTED
            segment, publication = self._reserved.pop(id)
            mine, done = publication.segments[segment], self._rounds.get(segment, (0, 0))[1]
            self._arrived.append(Arrival(segment, mine, theirs))
            self._rounds[segment] = publication.number, done + 1
            if self._mixed and self.rounds > 1:
                publication.segments[segment] = self._mixed(segment, mine, theirs)
            self._busy.discard(segment)
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
                self._rounds.pop(arrival.segment, None)
            return arrived
