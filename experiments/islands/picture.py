"""A storm in one picture: islands over time, what happened to whom, how long steps took, and the loss below."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.islands.faults import ALL_BUT_ONE, EMPTY, KILLED, LATE, OF_LINKS, OLD, SLOW, STOPPED, Event
from experiments.islands.measures import Track

TRAINING, COMING, STANDS, CUT = "tab:green", "tab:olive", "tab:red", "tab:purple"
COLOURS = {KILLED: "black", STOPPED: STANDS, SLOW: "tab:blue", LATE: COMING, OLD: "black", EMPTY: "black"}
MARKS = {KILLED: "x", STOPPED: "s", SLOW: "v", LATE: ">", OLD: "P", EMPTY: "o", ALL_BUT_ONE: "x"}


def draw(
    path: pathlib.Path,
    events: Sequence[Event],
    tracks: Mapping[str, Track],
    means: Sequence[Mapping[str, float]],
    began: float,
    ended: float,
    title: str,
) -> None:
    """Save it as PNG or SVG. `means` are evaluations of the mean of all islands, with `at` and `loss`."""
    figure = Figure(figsize=(15, 3.5 + 0.45 * len(tracks) + 3.5), layout="constrained")
    heights = [0.5 + 0.45 * len(tracks), 1.8, 2.2]
    rows, steps, loss = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    _draw_islands(rows, events, tracks, began, ended)
    for own in tracks.values():
        steps.plot(own.ends - began, 1e3 * own.took, ".", markersize=1.2, alpha=0.4)
    steps.set(ylabel="step, ms", yscale="log")
    for name, own in tracks.items():
        loss.plot(*_smoothed(own.ends - began, own.loss), linewidth=0.8, alpha=0.6, label=f"{name}, training")
    loss.plot([m["at"] - began for m in means], [m["loss"] for m in means], "k.-", label="mean of all, held-out data")
    loss.set(ylabel="loss", xlabel="seconds", yscale="log", xlim=(0, ended - began))
    loss.legend(loc="upper right", ncols=3, fontsize="small")
    for axes in (steps, loss):
        axes.grid(alpha=0.3)
        for event in events:
            axes.axvline(event.at - began, color="gray", linewidth=0.6, alpha=0.6)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _draw_islands(axes, events: Sequence[Event], tracks: Mapping[str, Track], began: float, ended: float) -> None:
    places = {name: len(tracks) - 1 - i for i, name in enumerate(tracks)}
    for name, own in tracks.items():
        for life in own.lives:
            end = life.ended or ended
            mine = own.ends[(own.ends >= life.began) & (own.ends <= end)]
            first = mine[0] if len(mine) else end
            bars = [(life.began - began, first - life.began), (first - began, end - first)]
            axes.broken_barh(bars, (places[name] - 0.3, 0.6), color=[COMING, TRAINING])
    for number, event in enumerate(events, 1):
        for victim in event.victims:
            place = places[victim]
            if event.fault == STOPPED or event.fault in OF_LINKS:
                colour = STANDS if event.fault == STOPPED else CUT
                bar = [(event.at - began, event.until - event.at)]
                axes.broken_barh(bar, (place - 0.3, 0.6), color=colour)
            if event.fault == SLOW:
                axes.plot([event.at - began, ended - began], [place - 0.36] * 2, color=COLOURS[SLOW], linewidth=2.5)
            mark = MARKS.get(event.fault, "d")
            axes.plot(event.at - began, place, mark, color="black", markersize=6, markeredgecolor="white")
        axes.axvline(event.at - began, color="gray", linewidth=0.6, alpha=0.6)
        window = f", {event.window}" if event.fault in (KILLED, STOPPED) else ""
        axes.annotate(
            f"{number} {event.fault}{window}",
            (event.at - began, len(tracks) - 0.5),
            rotation=40,
            fontsize=7.5,
            ha="left",
            va="bottom",
        )
    axes.set_yticks(list(places.values()), list(places))
    axes.set(ylim=(-0.6, len(tracks) - 0.5), ylabel="island")
    axes.spines[["top", "right"]].set_visible(False)
    kinds = {"trains": TRAINING, "starts": COMING, "stopped": STANDS, "link cut or worse": CUT, "slow": COLOURS[SLOW]}
    patches = [Patch(color=colour, label=label) for label, colour in kinds.items()]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")


def _smoothed(x: np.ndarray, y: np.ndarray, over: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Means of groups of so many."""
    groups = len(x) // over
    return tuple(a[: groups * over].reshape(groups, over).mean(1) for a in (x, y))
