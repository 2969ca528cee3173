"""The pictures of README and pages, as SVG files in docs: `python -m docs.pictures`.

Who hears whom in them is computed by the library's own pools and tables, what gossip costs from experiments/results.
"""

import math
import pathlib
import statistics

from benchmarks.network.contenders.tasks import is_peer
from benchmarks.network.race_results import FORMS, SHOWN, Results, shown_rate
from crossover_jax.topology import Pool, latin, shuffle
from crossover_jax.topology.tables import Table
from experiments import csv_rows
from experiments.frontier import final_bits
from experiments.intervals import paired

WORKERS, SEGMENTS = 4, 3
COLOURS = ("#4477aa", "#ee8866", "#44aa77", "#aa4488", "#bbaa33", "#66bbdd", "#994433", "#777777")  # a worker's
WIDTH, HEIGHT, LEFT, TOP, ROW = 900, 170, 96, 44, 31  # of an exchange; where bars begin; from worker to worker
BAR, GAP, COLUMN, THICK = 76, 84, 268, 20  # of a bar, between its two, from segment to segment; how thick a bar is
STYLE = 'font-family="sans-serif" font-size="13"'
POOL_OF, ROUNDS, STEPS = 8, 7, 6  # of pool and table
RESULTS = pathlib.Path(__file__).parents[1] / "experiments" / "results"
MODEL = 4 * 151_872  # bytes of the language model of the studies
ARMS = {  # of them, as they are shown: a name, on which side of its point it stands, and how far below
    "three rounds in int8 corrected": ("gossip at every step", "end", -8),
    "gossip outer 8 three rounds in int8": ("gossip every 8", "end", 18),
    "gossip outer 16 three rounds in int8": ("gossip every 16", "end", -8),
    "DiLoCo 16": ("DiLoCo every 16", "start", 18),
    "NoLoCo 16": ("NoLoCo every 16", "start", -8),
    "allreduce": ("AllReduce", "end", -8),
}

RACE = pathlib.Path(__file__).parents[1] / "benchmarks" / "network" / "results"


def drawn() -> tuple[Pool, Table]:
    return latin(WORKERS, SEGMENTS, seed=1), shuffle(SEGMENTS, SEGMENTS, seed=1)


def exchange() -> str:
    """Four workers, three segments, a pool of three shifts, and the first row of its table."""
    pool, table = drawn()
    parts = []
    for i in range(WORKERS):
        parts.append(_text(LEFT - 12, TOP + ROW * i + 15, f"worker {i}", anchor="end", colour=COLOURS[i]))
    for s in range(SEGMENTS):
        x, heard = LEFT + s * COLUMN, pool.receive_from[table[0, s], 0].tolist()
        middle = x + BAR + GAP / 2
        parts.append(_text(middle, 24, f"segment {s}"))
        for i, j in enumerate(heard):
            here, there = (TOP + ROW * k + THICK / 2 for k in (j, i))
            curve = f"M{x + BAR} {here:g}C{middle:g} {here:g} {middle:g} {there:g} {x + BAR + GAP} {there:g}"
            parts.append(f'<path d="{curve}" fill="none" stroke="{COLOURS[j]}" stroke-width="3"/>')
            parts.append(_bar(x, TOP + ROW * i, BAR, COLOURS[i]))
            parts.append(_bar(x + BAR + GAP, TOP + ROW * i, BAR / 2, COLOURS[i]))
            parts.append(_bar(x + BAR + GAP + BAR / 2, TOP + ROW * i, BAR / 2, COLOURS[j]))
    title = "An exchange: each segment of a model goes to another worker, and becomes half of the two"
    return _picture(title, WIDTH, HEIGHT, parts)


def pool() -> str:
    """The first three rounds of a pool of eight workers: arrows from who speaks to who hears."""
    rounds, parts = latin(POOL_OF, ROUNDS), []
    for p in range(3):
        centre = 150 + 300 * p
        spots = [
            (centre + 88 * math.sin(2 * math.pi * i / POOL_OF), 138 - 88 * math.cos(2 * math.pi * i / POOL_OF))
            for i in range(POOL_OF)
        ]
        parts.append(_text(centre, 24, f"round {p}"))
        for i, j in enumerate(rounds.receive_from[p, 0].tolist()):
            (x0, y0), (x1, y1) = spots[j], spots[i]
            part = 1 - 17 / math.hypot(x1 - x0, y1 - y0)  # the arrow ends where the circle begins
            line = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x0 + part * (x1 - x0):.1f}" y2="{y0 + part * (y1 - y0):.1f}"'
            parts.append(f'<line {line} stroke="{COLOURS[j]}" stroke-width="2" marker-end="url(#a{j})"/>')
        for i, (x, y) in enumerate(spots):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="13" fill="{COLOURS[i]}"/>')
            parts.append(_text(x, y + 4.5, str(i), colour="#ffffff"))
    heads = "".join(
        f'<marker id="a{i}" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0 0L9 4L0 8z" fill="{colour}"/></marker>'
        for i, colour in enumerate(COLOURS)
    )
    title = "Three rounds of a pool: in each every worker speaks to one other and hears one other"
    return _picture(title, WIDTH, 250, [f"<defs>{heads}</defs>", *parts])


def table() -> str:
    """Whom worker 0 hears: a row for each step, a column for each segment."""
    rounds, chosen = latin(POOL_OF, ROUNDS), shuffle(ROUNDS, ROUNDS)
    parts = [_text(LEFT + 100 * s + 50, 24, f"segment {s}") for s in range(ROUNDS)]
    for step in range(STEPS):
        y = 36 + ROW * step
        parts.append(_text(LEFT - 12, y + 15, f"step {step}", anchor="end"))
        for s in range(ROUNDS):
            j = int(rounds.receive_from[chosen[step, s], 0, 0])
            parts.append(_bar(LEFT + 100 * s + 2, y, 96, COLOURS[j]))
            parts.append(_text(LEFT + 100 * s + 50, y + 15, f"hears {j}", colour="#ffffff"))
    title = "A table: at each step each segment of worker 0 hears another worker"
    return _picture(title, LEFT + 100 * ROUNDS + 20, 36 + ROW * STEPS, parts)


def orders() -> str:
    """When an exchange happens: a row for each algorithm, time from left to right."""
    gradient, update, sent = "#4477aa", "#44aa77", "#ee8866"
    rows: dict[str, list[tuple[float, float, int, str]]] = {  # beginning and length in steps, lane, colour
        "mix_after": [(1.6 * k + d, w, 0, c) for k in range(3) for d, w, c in _step(gradient, update, sent)],
        "mix_during": [
            *((1.2 * k + d, w, 0, c) for k in range(4) for d, w, c in _step(gradient, update)),
            *((1.2 * k, 0.4, 1, sent) for k in range(4)),
        ],
        "outer, every=4": [
            *((1.2 * k + d, w, 0, c) for k in range(4) for d, w, c in _step(gradient, update)),
            (4.8, 0.4, 0, sent),
        ],
        "the same, overlap": [
            *((1.2 * k + d, w, 0, c) for k in range(4) for d, w, c in _step(gradient, update)),
            (0, 4.7, 1, sent),
        ],
    }
    unit, left, parts = 140, 150, []
    for row, (name, bars) in enumerate(rows.items()):
        y = 42 + 56 * row
        parts.append(_text(left - 12, y + 15, name, anchor="end"))
        parts += [_bar(left + unit * x, y + 22 * lane, unit * w - 3, colour, 18) for x, w, lane, colour in bars]
    for k, (name, colour) in enumerate((("gradient", gradient), ("update", update), ("exchange", sent))):
        parts.append(_bar(left + 130 * k, 10, 18, colour, 14))
        parts.append(_text(left + 130 * k + 26, 22, name, anchor="start"))
    title = "When an exchange happens: after the update, during the gradient, or beside several steps"
    return _picture(title, WIDTH, 264, parts)


def frontier() -> str:
    """What gossip costs a language model: bits per byte above AllReduce, against what a worker sends."""
    rows = [row for name in ("lm_frontier", "lm_others") for row in csv_rows.read(RESULTS / f"{name}.csv")]
    bits, sent = final_bits(rows), {row["arm"]: row["wire_bytes_per_step"] / MODEL for row in rows}
    left, bottom, wide, high = 90, 250, 780, 2400  # where the axes meet; a decade and a half, and a bit, in pixels

    def x_of(models: float) -> float:
        return left + wide * math.log(models / 0.03) / math.log(3 / 0.03)

    parts = [_text(left - 10, 16, "bits per byte above AllReduce", anchor="start")]
    for y in (0.0, 0.02, 0.04, 0.06, 0.08):
        height = bottom - 25 - high * y
        parts.append(f'<path d="M{left} {height:g}H{left + wide}" stroke="#dddddd"/>')
        parts.append(_text(left - 10, height + 4, f"{y:.2f}", anchor="end"))
    for models in (0.03, 0.1, 0.3, 1.0, 3.0):
        parts.append(_text(x_of(models), bottom + 18, f"{models:g}"))
    parts.append(_text(left + wide / 2, bottom + 38, "models that a worker sends per step"))
    for arm, (name, side, below) in ARMS.items():
        own, x = paired(bits[arm], bits["allreduce"]), x_of(sent[arm])
        colour = COLOURS[1] if "LoCo" in arm else "#000000" if arm == "allreduce" else COLOURS[0]
        y, half = bottom - 25 - high * own.mean, high * own.half
        parts.append(f'<path d="M{x:.1f} {y - half:.1f}V{y + half:.1f}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        parts.append(_text(x + (10 if side == "start" else -10), y + below, name, anchor=side, colour=colour))
    title = "Gossip loses nothing at every step, and with outer steps less than DiLoCo for fewer bytes"
    return _picture(title, WIDTH, bottom + 50, parts)


def race() -> str:
    """Seconds to a level of accuracy on eight hosts, ours and others', at each link: medians of seeds."""
    made = Results(FORMS["short"], RACE)
    (wait,), links, left, wide = made.form.waits, made.form.links, 250, 190
    racers = made.form.contenders
    times = {
        link: {c: statistics.median(made.seconds_to_level("images", c, link, wait)) for c in racers} for link in links
    }
    order, parts = sorted(racers, key=lambda c: times[links[0]][c]), []
    for row, contender in enumerate(order):
        colour = COLOURS[1 if is_peer(contender) else 0]
        parts.append(_text(left - 12, 54 + 26 * row, SHOWN[contender], anchor="end", colour=colour))
    for column, link in enumerate(links):
        x, longest = left + column * (wide + 30), max(times[link].values())
        parts.append(_text(x, 22, shown_rate(link), anchor="start"))
        for row, contender in enumerate(order):
            y, seconds = 40 + 26 * row, times[link][contender]
            length = (wide - 60) * seconds / longest
            parts.append(_bar(x, y, length, COLOURS[1 if is_peer(contender) else 0], 18))
            parts.append(_text(x + length + 6, y + 14, f"{seconds:.0f} s", anchor="start"))
    title = "Seconds to 88 % on Fashion-MNIST, eight hosts: crossover_jax in blue, PyTorch's in orange"
    return _picture(title, WIDTH, 40 + 26 * len(order) + 6, parts)


def _step(gradient: str, update: str, sent: str = "") -> list[tuple[float, float, str]]:
    """A step's bars: beginning, length and colour of each."""
    return [(0, 1, gradient), (1, 0.2, update), *([(1.2, 0.4, sent)] if sent else [])]


def _picture(title: str, width: float, height: float, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{title}</title>", ground, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "middle", colour: str = "") -> str:
    fill = f' fill="{colour}"' if colour else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{fill} {STYLE}>{text}</text>'


def _bar(x: float, y: float, width: float, colour: str, thick: float = THICK) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{thick:g}" fill="{colour}"/>'


PICTURES = (exchange, pool, table, orders, frontier, race)

if __name__ == "__main__":
    for picture in PICTURES:
        pathlib.Path(__file__).with_name(f"{picture.__name__}.svg").write_text(picture())
