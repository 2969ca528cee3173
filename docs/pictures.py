"""The picture of an exchange that README and design show: `python docs/pictures.py` writes docs/exchange.svg.

Who hears whom in it is computed: four workers, three segments, a pool of three shifts, and the first row of its table.
"""

import pathlib

from crossover_jax.topology import Pool, latin, shuffle
from crossover_jax.topology.tables import Table

WORKERS, SEGMENTS = 4, 3
COLOURS = ("#4477aa", "#ee8866", "#44aa77", "#aa4488")  # a worker's
WIDTH, HEIGHT, LEFT, TOP, ROW = 900, 170, 96, 44, 31  # of the picture; where bars begin; from worker to worker
BAR, GAP, COLUMN, THICK = 76, 84, 268, 20  # of a bar, between its two, from segment to segment; how thick a bar is
STYLE = 'font-family="sans-serif" font-size="13"'


def drawn() -> tuple[Pool, Table]:
    return latin(WORKERS, SEGMENTS, seed=1), shuffle(SEGMENTS, SEGMENTS, seed=1)


def exchange() -> str:
    """The picture as SVG."""
    pool, table = drawn()
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>An exchange: each segment of a model goes to another worker, and becomes half of the two</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for i in range(WORKERS):
        label = f'x="{LEFT - 12}" y="{TOP + ROW * i + 15}" text-anchor="end" fill="{COLOURS[i]}"'
        parts.append(f"<text {label} {STYLE}>worker {i}</text>")
    for s in range(SEGMENTS):
        x, heard = LEFT + s * COLUMN, pool.receive_from[table[0, s], 0].tolist()
        middle = x + BAR + GAP / 2
        parts.append(f'<text x="{middle:g}" y="24" text-anchor="middle" {STYLE}>segment {s}</text>')
        for i, j in enumerate(heard):
            here, there = (TOP + ROW * k + THICK / 2 for k in (j, i))
            curve = f"M{x + BAR} {here:g}C{middle:g} {here:g} {middle:g} {there:g} {x + BAR + GAP} {there:g}"
            parts.append(f'<path d="{curve}" fill="none" stroke="{COLOURS[j]}" stroke-width="3"/>')
            parts.append(_bar(x, i, BAR, COLOURS[i]))
            parts.append(_bar(x + BAR + GAP, i, BAR / 2, COLOURS[i]))
            parts.append(_bar(x + BAR + GAP + BAR / 2, i, BAR / 2, COLOURS[j]))
    return "\n".join([*parts, "</svg>", ""])


def _bar(x: float, i: int, width: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{TOP + ROW * i}" width="{width:g}" height="{THICK}" fill="{colour}"/>'


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("exchange.svg").write_text(exchange())
