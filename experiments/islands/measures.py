"""What a storm did to whom, read from what the islands have written and from looks at them."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.islands.faults import HALF, LATE, LOSS, SLOW, Event
from experiments.islands.fleet import Fleet, Life

AFTER_S = 10.0  # how long behind an event survivors are looked at, and in which the view must name it
SETTLING_S = 3.0  # behind all returns; then it is calm
_WORSE = {HALF: "Mbit/s", LOSS: "packets"}  # what islands say of a link that is worse
View = Mapping[str, Mapping[str, Any]]  # of `islands.look`


class Track(NamedTuple):
    """What one island has done, in all its lives."""

    lives: Sequence[Life]
    ends: np.ndarray  # of steps, in seconds since the epoch
    took: np.ndarray  # seconds of each, all that the loop does between two of them included; NaN of a life's first
    exchange: np.ndarray  # seconds of them that `exchange` took
    clock: np.ndarray
    loss: np.ndarray
    exchanges: np.ndarray  # when one was committed here

    def first_after(self, times: np.ndarray, at: float) -> float:
        """Seconds from `at` to the first of some times; NaN if there is none."""
        later = times[times > at]
        return float(later[0] - at) if len(later) else math.nan

    def lived(self, start: float, end: float) -> bool:
        return any(life.began <= start and (life.ended is None or life.ended >= end) for life in self.lives)


def track(fleet: Fleet, name: str) -> Track:
    """Read an island's own lines."""
    lives = [life for life in fleet.lives if life.name == name]
    steps = _numbers(fleet.steps(name), 5)
    ends, clock, took, exchange, loss = steps.T
    whole = np.diff(ends, prepend=np.nan)
    for life in lives:  # of a life's first step only the step itself is known
        whole[np.searchsorted(ends, life.began) :][:1] = np.nan
    del took
    exchanges = _numbers(fleet.control(name) / "exchanges", 1)[:, 0]
    return Track(lives, ends, whole, exchange, clock, loss, exchanges)


def _numbers(path: Any, columns: int) -> np.ndarray:
    """The first columns of a file's lines; a line that a dying process left unfinished is none."""
    rows: list[list[float]] = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = [float(word) for word in line.split()[:columns]]
                if len(row) == columns and (not rows or row[0] >= rows[-1][0]):
                    rows.append(row)
    return np.array(rows).reshape(-1, columns)


def spread(seconds: np.ndarray) -> dict[str, float]:
    """Quantiles of step times, in milliseconds."""
    seconds = seconds[np.isfinite(seconds)]
    if not len(seconds):
        return dict.fromkeys(("p50", "p95", "p99", "max"), math.nan)
    found = 1e3 * np.quantile(seconds, [0.5, 0.95, 0.99, 1.0])
    return dict(zip(("p50", "p95", "p99", "max"), map(float, found), strict=True))


def returns(event: Event, tracks: Mapping[str, Track]) -> tuple[float, float]:
    """Seconds from the victims' start to their first own step and to their first exchange, of the slowest of them.

    NaN where a victim never was away; infinite where it did not come back.
    """
    if event.until <= event.at and not event.is_new_life:
        return math.nan, math.nan
    found = []
    for name in event.victims:
        own = tracks[name]
        began = min((life.began for life in own.lives if life.began >= event.until), default=event.until)
        since = began if event.is_new_life else event.until
        both = own.first_after(own.ends, since), own.first_after(own.exchanges, since)
        found.append([math.inf if math.isnan(x) else x for x in both])
    step, exchange = np.max(found, axis=0)
    return float(step), float(exchange)


def calm(ends: np.ndarray, events: Sequence[Event], tracks: Mapping[str, Track], ready: float) -> np.ndarray:
    """Which of some moments lie in no event's wake."""
    keep = ends > ready
    for event in events:
        last = [event.at + AFTER_S, event.until]
        back = max((x for x in returns(event, tracks) if math.isfinite(x)), default=0.0)
        keep &= (ends < event.at) | (ends > max(*last, event.until + back) + SETTLING_S)
    return keep


def row_of(
    number: int,
    event: Event,
    events: Sequence[Event],
    tracks: Mapping[str, Track],
    views: Sequence[tuple[float, View]],
    ready: float,
) -> dict[str, Any]:
    """An event's line in the table; times in seconds, of steps in milliseconds."""
    slow = {name for other in events if other.fault == SLOW and other.at < event.at for name in other.victims}
    end = event.at + AFTER_S
    survivors = [
        name for name, own in tracks.items() if name not in {*event.victims, *slow} and own.lived(event.at - 1, end)
    ]
    near = np.concatenate([own.took[(own.ends > event.at) & (own.ends <= end)] for own in _of(tracks, survivors)])
    quiet = np.concatenate([own.took[calm(own.ends, events, tracks, ready)] for own in _of(tracks, survivors)])
    next_exchange = [own.first_after(own.exchanges, event.at) for own in _of(tracks, survivors)]
    step, exchange = returns(event, tracks)
    named_s, named = named_in(event, views)
    return {
        "event": number,
        "fault": event.fault,
        "window": event.window,
        "victims": " ".join(event.victims),
        "at_s": event.at - ready,
        "survivors": " ".join(survivors),
        **{f"step_{name}_ms": value for name, value in spread(near).items()},
        **{f"calm_{name}_ms": value for name, value in spread(quiet).items()},
        "next_exchange_s": max(next_exchange, default=math.nan),
        "back_to_step_s": step,
        "back_to_exchange_s": exchange,
        "participation": participation(views, survivors, event.at, end),
        "clock": max((view_clock(view) for at, view in views if at <= end), default=math.nan),
        "named_s": named_s,
        "named": named,
    }


def _of(tracks: Mapping[str, Track], names: Sequence[str]) -> list[Track]:
    """NumPy can concatenate none but nothing."""
    empty = Track([], *(np.zeros(0) for _ in Track._fields[1:]))
    return [tracks[name] for name in names] or [empty]


def view_clock(view: View) -> float:
    return max((head["total"] for head in view.values() if "total" in head), default=0.0)


def participation(views: Sequence[tuple[float, View]], names: Sequence[str], start: float, end: float) -> float:
    """Exchanges done / due of some islands between two looks; NaN where they were not looked at."""
    before = next((view for at, view in reversed(views) if at <= start), {})
    after = next((view for at, view in views if at >= end), {})
    done = due = 0
    for name in names:
        old, new = before.get(name, {}), after.get(name, {})
        if "due" in old and "due" in new and new["due"] >= old["due"]:
            done, due = done + new["exchanged"] - old["exchanged"], due + new["due"] - old["due"]
    return done / due if due else math.nan


def machine() -> str:
    """What the times depend on."""
    return f"measured on {os.cpu_count()} cores, at its end under a load of {os.getloadavg()[0]:.1f}"


# Whether the view names a fault


def named_in(event: Event, views: Sequence[tuple[float, View]]) -> tuple[float, str]:
    """How many seconds after an event a look at the islands showed it, and by what; (NaN, "no") if none did in time."""
    before = next((view for at, view in reversed(views) if at <= event.at), {})
    later = [(at, view) for at, view in views if event.at < at <= event.at + AFTER_S]
    for at, view in later:
        for victim in event.victims:
            words = sign(event, victim, before, view, [*([(event.at, before)] if before else []), *later], at)
            if words:
                return at - event.at, words
    return math.nan, "no"


def sign(event: Event, victim: str, before: View, view: View, looks: Sequence[tuple[float, View]], at: float) -> str:
    """What in one view shows that something has happened to an island."""
    head, old = view.get(victim), before.get(victim)
    if head is None:
        return f"{victim} is not in the roster" if old else ""
    if "error" in head:
        return f"{victim} does not answer: {head['error']}"
    if not old or head.get("incarnation") != old.get("incarnation", head.get("incarnation")):
        return (
            f"{victim} is new, its state from {head.get('origin')}" if event.is_new_life or event.fault == LATE else ""
        )
    kind = _WORSE.get(event.fault, "nothing")
    for name, peer in [(other, victim) for other in view] + [(victim, other) for other in view]:
        error = view[name].get("errors", {}).get(peer)
        if error and error != before.get(name, {}).get("errors", {}).get(peer):
            return f"{name}, exchange with {peer}: {error}"
        worse, was = (look.get(name, {}).get("impaired", {}).get(peer, "") for look in (view, before))
        if kind in worse and kind not in was:  # another fault may not be over yet
            return f"{name}, link to {peer}: {worse}"
    if event.fault == SLOW and at - event.at > 4:
        first = next(look for when, look in looks if when > event.at + 0.5)
        return _falls_behind(victim, first, view)
    return ""


def _falls_behind(victim: str, first: View, last: View) -> str:
    """Whether an island makes less than half of the others' steps, or of their exchanges."""
    for what, total in (("steps", None), ("exchanged", "due")):
        gains = {}
        for name, head in last.items():
            if what in head and what in first.get(name, {}):
                gain = head[what] - first[name][what]
                due = head[total] - first[name][total] if total else 1
                gains[name] = gain / due if due else math.nan
        others = [gain for name, gain in gains.items() if name != victim]
        if others and gains.get(victim, math.inf) < 0.5 * float(np.nanmedian(others)):
            return f"{victim} makes {gains[victim] / float(np.nanmedian(others)):.0%} of the others' {what}"
    return ""
