"""A picture of what language models cost: bits per byte against bytes sent per token, a point per arm of a study."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from experiments.intervals import interval
from experiments.studies.study import FINAL, Row, Run, Study, run_config

OF_OTHERS = ("DiLoCo", "NoLoCo")


def final_bits(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Bits per byte of the test text in the final runs, without those that diverged."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:  # of a run the last row stays, others have none
        if row["stage"] == FINAL and row["bits_per_byte"]:
            found.setdefault(row["arm"], {})[row["seed"]] = row["bits_per_byte"]
    return found


def bytes_per_token(rows: Sequence[Row], study: Study) -> dict[str, float]:
    """What a worker sends in a step for each byte of its own batch, by arm."""
    found = {}
    for arm, sent in {row["arm"]: row["wire_bytes_per_step"] for row in rows if row["arm"] in study.arms}.items():
        config = run_config(study, Run(arm, FINAL, 0.0, 0))
        found[arm] = sent / (config.batch_size / config.num_workers * config.dataset.sequence)
    return found


class Point(NamedTuple):
    x: float
    y: float
    half: float  # of the interval of y
    colour: str


def draw_frontier(bits: Mapping[str, Mapping[int, float]], sent: Mapping[str, float]) -> Figure:
    """A point per arm, with its name beside it; below and to the left is better."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots()
    points = {}
    for arm, of_seeds in bits.items():
        own = interval(list(of_seeds.values()))
        colour = "tab:orange" if arm.startswith(OF_OTHERS) else "black" if arm == "allreduce" else "tab:blue"
        points[arm] = Point(sent[arm], own.mean, 0.0 if np.isinf(own.half) else own.half, colour)
        x, y, half, _ = points[arm]
        axes.errorbar(x, y, half, marker="o", capsize=3, color=colour, linestyle="none")
    if "allreduce" in points:
        axes.axhline(points["allreduce"].y, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.margins(x=0.15, y=0.12)
    axes.grid(alpha=0.3)
    axes.set(
        title="Language models of bytes: what is sent, and what it costs",
        xlabel="bytes that a worker sends per token of its own",
        ylabel="bits per byte of the test text, averaged model (mean of seeds, 95 %)",
    )
    label_beside(figure, axes, points)
    return figure


def label_beside(figure: Figure, axes: Any, points: Mapping[str, Point]) -> None:
    """Write each name as near to its point as it covers neither a point nor another name, in the point's colour."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)  # where points lie, and how long names are, is known in a figure that is laid out
    taken = []
    for x, y, half, _ in points.values():
        (left, low), (right, high) = axes.transData.transform([(x, y - half), (x, y + half)])
        taken.append(Bbox.from_extents(left - 6, low - 6, right + 6, high + 6))
    steps = sorted(itertools.product((1, -1), range(-30, 31)), key=lambda step: (abs(step[1]), -step[0]))
    for name, (x, y, _, colour) in points.items():
        for side, up in steps:
            text = axes.annotate(
                name,
                (x, y),
                (9 * side, 6 * up),
                textcoords="offset points",
                horizontalalignment="left" if side > 0 else "right",
                verticalalignment="center",
                fontsize=8,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.6},
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without the line to its point
            if all(axes.bbox.contains(*corner) for corner in box.corners()) and not box.count_overlaps(taken):
                break
            if (side, up) != steps[-1]:  # where there is no room at all a name covers something
                text.remove()
        taken.append(box)
