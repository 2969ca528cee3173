"""What happens to islands in a storm: a seeded schedule of faults, each with its victims and its window."""

import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.islands.fleet import Fleet
from experiments.islands.hooks import FIRST, WINDOWS
from experiments.islands.links import Links

KILLED, STOPPED, SLOW, LATE, OLD, EMPTY, ALL_BUT_ONE, DOWN, HALF, LOSS, PARTITION = FAULTS = (
    "killed",
    "stopped",
    "slow",
    "late",  # an island that was not there before
    "old state",  # killed, and back with an old checkpoint
    "empty",  # killed, and back without one
    "all but one",  # are killed
    "link down",
    "half bandwidth",
    "packet loss",
    "partition",
)
OF_LINKS = (DOWN, HALF, LOSS, PARTITION)
AIMED = (KILLED, STOPPED)  # in each of the windows; other faults come at any time
ANY = "any time"
STOP_S, CUT_S, AWAY_S = 10.0, 20.0, 5.0  # seconds: how long islands are stopped, links cut, and who comes back is away
AIM_S = 15.0  # seconds that an island has to come into a window; then it is hit from outside
PATIENCE_S = 600.0  # seconds that a victim has to return
TIMES_SLOWER, LOST = 5.0, 0.01


class Planned(NamedTuple):
    """A fault, and the window that it is aimed at."""

    fault: str
    window: str = ANY

    @classmethod
    def of(cls, text: str) -> "Planned":
        """From "fault" or "fault:window". Raises `ValueError`."""
        fault, _, window = text.partition(":")
        if fault not in FAULTS or window not in ("", *WINDOWS) or (window and fault not in AIMED):
            raise ValueError(
                f"a fault must be one of {', '.join(FAULTS)}, and behind {' or '.join(AIMED)} there may be a colon and "
                f"one of {', '.join(WINDOWS)}, got {text!r}."
            )
        return cls(fault, window or ANY)


class Event(NamedTuple):
    """What has happened, in seconds since the epoch."""

    fault: str
    window: str  # in which the victim was hit, as far as is known
    victims: tuple[str, ...]
    at: float
    until: float  # from then on the fault is over: a victim is started again, goes on, or has its link back
    is_new_life: bool = False  # whether `until` is when the victims' processes were started


def schedule(seed: int, with_links: bool) -> list[Planned]:
    """All faults in an order of this seed, those that can be aimed once in each window."""
    planned = [Planned(fault, window) for fault in AIMED for window in WINDOWS]
    planned += [Planned(fault) for fault in FAULTS if fault not in AIMED and (with_links or fault not in OF_LINKS)]
    random.Random(f"faults {seed}").shuffle(planned)
    return planned


class Hitter:
    """Brings faults about, each with victims of its own choice among those that live."""

    def __init__(self, fleet: Fleet, links: Links | None, names: Sequence[str], pace_ms: float, seed: int):
        self.fleet, self.links, self.pace_ms = fleet, links, pace_ms
        self.later = list(names)  # names of islands that may come late
        self.slow: list[str] = []
        self._rng = random.Random(f"victims {seed}")
        self._last: str | None = None

    def bring(self, planned: Planned) -> Event:
        """Have it happen; returns when the fault itself is over, and its victims perhaps on their way back."""
        do: dict[str, Callable[[str], Event]] = {
            KILLED: self._killed,
            STOPPED: self._stopped,
            SLOW: self._slow,
            LATE: self._late,
            OLD: lambda window: self._comes_back(OLD, self.fleet.make_old),
            EMPTY: lambda window: self._comes_back(EMPTY, self.fleet.make_empty),
            ALL_BUT_ONE: self._all_but_one,
            PARTITION: self._partition,
            DOWN: lambda window: self._link(DOWN),
            HALF: lambda window: self._link(HALF),
            LOSS: lambda window: self._link(LOSS),
        }
        return do[planned.fault](planned.window)

    def _victim(self) -> str:
        """One that lives, not the last one again."""
        self._last = self._rng.choice([name for name in self.fleet.alive() if name != self._last])
        return self._last

    def _hit(self, victim: str, window: str, number: signal.Signals) -> tuple[float, str]:
        """When the victim was hit, and in which window."""
        if window == FIRST:  # of a life that begins for this
            self.fleet.send(victim, signal.SIGKILL)
            self.fleet.wait_for_end(victim)
            self.fleet.aim(victim, FIRST, number)
            self.fleet.start(victim)
            at = self.fleet.hit(victim, PATIENCE_S)
        elif window == ANY:
            time.sleep(self._rng.uniform(0, 1))
            at = None
        else:
            self.fleet.aim(victim, window, number)
            at = self.fleet.hit(victim, AIM_S)
        return (self.fleet.send(victim, number), ANY) if at is None else (at, window)

    def _killed(self, window: str) -> Event:
        victim = self._victim()
        at, window = self._hit(victim, window, signal.SIGKILL)
        self.fleet.wait_for_end(victim)
        return Event(KILLED, window, (victim,), at, self.fleet.start(victim), True)

    def _stopped(self, window: str) -> Event:
        victim = self._victim()
        at, window = self._hit(victim, window, signal.SIGSTOP)
        time.sleep(max(0.0, at + STOP_S - time.time()))
        return Event(STOPPED, window, (victim,), at, self.fleet.send(victim, signal.SIGCONT))

    def _slow(self, window: str) -> Event:
        victim = self._victim()
        self.slow.append(victim)
        at = self.fleet.slow_down(victim, TIMES_SLOWER * self.pace_ms)
        return Event(SLOW, window, (victim,), at, at)

    def _late(self, window: str) -> Event:
        name = self.later.pop(0)
        at = self.fleet.start(name)
        return Event(LATE, window, (name,), at, at, True)

    def _comes_back(self, fault: str, change: Callable[[str], None]) -> Event:
        victim = self._victim()
        at = self._kill(victim)
        time.sleep(AWAY_S)
        change(victim)
        return Event(fault, ANY, (victim,), at, self.fleet.start(victim), True)

    def _kill(self, *victims: str) -> float:
        at = min([self.fleet.send(victim, signal.SIGKILL) for victim in victims])
        for victim in victims:
            self.fleet.wait_for_end(victim)
        return at

    def _all_but_one(self, window: str) -> Event:
        alive = self.fleet.alive()
        # The one that is left must be as fast as before, or there is nobody whose steps could be looked at.
        left = self._rng.choice([name for name in alive if name not in self.slow])
        victims = tuple(name for name in alive if name != left)
        at = self._kill(*victims)
        time.sleep(AWAY_S)
        return Event(ALL_BUT_ONE, window, victims, at, min([self.fleet.start(victim) for victim in victims]), True)

    def _link(self, fault: str) -> Event:
        assert self.links is not None
        victim, at = self._victim(), time.time()
        change = {DOWN: self.links.down, HALF: self.links.halve, LOSS: lambda name: self.links.lose(name, LOST)}
        change[fault](victim)
        time.sleep(CUT_S)
        self.links.repair(victim)
        return Event(fault, ANY, (victim,), at, time.time())

    def _partition(self, window: str) -> Event:
        assert self.links is not None
        alive = self._rng.sample(self.fleet.alive(), len(self.fleet.alive()))
        half, at = tuple(sorted(alive[: len(alive) // 2])), time.time()
        self.links.part(half)
        time.sleep(CUT_S)
        self.links.heal()
        return Event(PARTITION, window, half, at, time.time())
