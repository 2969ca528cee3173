"""Charts as SVG that stands inside an HTML page: no scripts, colours by CSS, exact values where the pointer rests."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 348, 10, 196  # of the axes
POINTS = 1000  # of a line: more are not seen


class Line(NamedTuple):
    """What is drawn of one run; `low` and `high` are the edges of a band."""

    colour: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    is_thin: bool = False  # noisy values of every row, without points


class Axis(NamedTuple):
    """From values to places between `start` and `end`."""

    first: float
    last: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        first, last, value = (math.log(x) if self.is_log else x for x in (self.first, self.last, value))
        return self.start + (self.end - self.start) * (value - first) / (last - first)


def chart(lines: Sequence[Line], label: str, unit: str, *, from_zero: bool = False, is_log: bool = False) -> str:
    """A chart of `lines` against `unit`; what is not finite is left out, and of log scales what is not positive."""
    lines = [clean(line, is_log) for line in lines]
    values = [y for line in lines for part in (line.y, line.low or (), line.high or ()) for y in part]
    if not values:
        return f'<p class="none">No row has {html.escape(label)}.</p>'
    last_x = max(x for line in lines for x in line.x)
    x_axis = Axis(0.0, last_x or 1.0, LEFT, RIGHT)
    first, last = widened(0.0 if from_zero else min(values), max(values), is_log)
    y_axis = Axis(first, last, BOTTOM, TOP, is_log)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">']
    for value in ticks(first, last, is_log):
        y = f"{y_axis.place(value):.2f}"
        parts.append(f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 5}" y="{y}">{value:g}</text>')
    for value in ticks(0.0, x_axis.last):
        parts.append(f'<text class="x" x="{x_axis.place(value):.2f}" y="{BOTTOM + 14}">{value:g}</text>')
    parts.append(f'<text class="x" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}">{html.escape(unit)}</text>')
    parts += [drawn(line, x_axis, y_axis, unit) for line in lines]
    return "".join([*parts, "</svg>"])


def clean(line: Line, is_log: bool) -> Line:
    """Without the places where a value cannot be drawn, and of long lines every so many."""
    columns = [np.asarray(column, float) for column in (line.x, line.y, line.low, line.high) if column is not None]
    keep = np.all([np.isfinite(column) & (column > 0 if is_log and i else True) for i, column in enumerate(columns)], 0)
    every = -(-max(keep.sum(), 1) // POINTS)
    x, y, *band = ([*map(float, column[keep][::every])] for column in columns)
    return line._replace(x=x, y=y, low=band[0] if band else None, high=band[1] if band else None)


def widened(first: float, last: float, is_log: bool) -> tuple[float, float]:
    """The ends of an axis that has values from `first` to `last` on it, with some room."""
    if is_log:
        return first / 1.1, last * 1.1
    room = 0.05 * (last - first) or abs(last) * 0.1 or 1.0
    return (0.0 if first == 0 else first - room), last + room


def ticks(first: float, last: float, is_log: bool = False) -> list[float]:
    """Round values between two ends, about five.

    >>> ticks(0, 10), ticks(0.3, 2.4, True)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.5, 1.0, 2.0])
    """
    if is_log and last / first > 3:
        decades = range(math.floor(math.log10(first)), math.ceil(math.log10(last)) + 1)
        factors = (1, 2, 5) if last / first < 1000 else (1,)
        return [m * 10.0**d for d in decades for m in factors if first <= m * 10.0**d <= last]
    rough = (last - first) / 5
    base = 10.0 ** math.floor(math.log10(rough))
    step = next(m * base for m in (1, 2, 5, 10) if m * base >= 0.999 * rough)
    return [round(i * step, 12) for i in range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)]


def drawn(line: Line, x_axis: Axis, y_axis: Axis, unit: str) -> str:
    def path(x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join(f"{x_axis.place(a):.2f},{y_axis.place(b):.2f}" for a, b in zip(x, y, strict=True))

    parts = []
    if line.low is not None and line.high is not None:
        edge = path([*line.x, *reversed(line.x)], [*line.high, *reversed(line.low)])
        parts.append(f'<polygon class="band c{line.colour}" points="{edge}"/>')
    kind = "thin" if line.is_thin else "line"
    parts.append(f'<polyline class="{kind} c{line.colour}" points="{path(line.x, line.y)}"/>')
    for x, y in zip(line.x, line.y, strict=True) if not line.is_thin else ():
        place = f'cx="{x_axis.place(x):.2f}" cy="{y_axis.place(y):.2f}"'
        parts.append(f'<circle class="c{line.colour}" {place} r="2.2"><title>{unit} {x:g}: {y:.6g}</title></circle>')
    return "".join(parts)


def matrix(shares: Float[np.ndarray, "workers workers"], label: str) -> str:
    """Squares, row by row who hears and column by column whom; the darker, the more of it."""
    n = len(shares)
    cell = 120 / n
    parts = [f'<svg class="matrix" viewBox="-9 -9 130 130" role="img" aria-label="{html.escape(label)}">']
    parts.append('<rect class="frame" width="120" height="120"/>')
    for i, j in np.argwhere(shares > 5e-4).tolist():
        place = f'x="{j * cell:.2f}" y="{i * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}"'
        told = f"<title>worker {i} hears {shares[i, j]:.3f} of worker {j}</title>" if n <= 16 else ""
        parts.append(f'<rect {place} fill-opacity="{max(shares[i, j] ** 0.5, 0.1):.2f}">{told}</rect>')
    for k in (0, n - 1):
        place = (k + 0.5) * cell
        parts.append(f'<text x="{place:.2f}" y="-2">{k}</text><text x="-5" y="{place + 3:.2f}">{k}</text>')
    return "".join([*parts, "</svg>"])
