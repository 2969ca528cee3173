"""Every algorithm of `scaling.py` on 2 to 16 hosts, at three rates, beside three lengths of compute; and a picture.

    sudo python -m benchmarks.network.grid --out grid.csv                 # half an hour; goes on where it ended
    sudo python -m benchmarks.network.grid --speed_up --out speed_up.csv  # 4, 8 and 16 hosts, a fixed global batch
    python -m benchmarks.network.grid --figure grid.png --out grid.csv --speed_up_from speed_up.csv

A model takes 0.4 s to send at 50 and 200 Mbit/s and 0.16 s at 1 Gbit/s; compute is a timed wait of 0, 1 or 3 times as
long, beside which run those algorithms for which it can make a difference. With a fixed global batch N hosts compute
for 6.2 · 4 / N seconds, at 100 Mbit/s. The picture's left half is the counterpart of the paper's figure 9
(arXiv:2012.15198): log2 of how many times faster than 4 hosts; its right half shows the grid at 200 Mbit/s.
"""

import argparse
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.network.hosts import bits_per_second
from benchmarks.rows import read_rows

SCALING = "benchmarks.network.scaling"
HOSTS, COMPUTES = (2, 4, 8, 16), (0, 1, 3)
PARAMS = {"50mbit": 625_000, "200mbit": 2_500_000, "1gbit": 5_000_000}
SHOWN = "200mbit"  # in the picture
ORDERED = "/in_flight=1"  # on CPUs channels go one after another, and are fastest when told so (docs/performance.md)
ALWAYS = ("allreduce", "sgp", f"crossover/8{ORDERED}", f"crossover/8/int8{ORDERED}", f"hierarchical/8{ORDERED}")
ALONE = (  # without compute
    *("alone", "crossover/8", f"crossover/8/bfloat16{ORDERED}"),
    *(f"crossover/{segments}{ORDERED}" for segments in (1, 4, 16)),
    *(f"switch/{segments}" for segments in (1, 4, 8, 16)),
)
DURING = (f"crossover/8{ORDERED}/during", f"crossover/8/int8{ORDERED}/during", f"hierarchical/8{ORDERED}/during")
SPEED_UP = {"rate": "100mbit", "params": 2_500_000, "steps": 4}
COMPUTED_S, AMONG = 6.2, 4  # seconds of compute of each of 4 hosts
COMPARED = ("allreduce", "sgp", f"crossover/8{ORDERED}", f"crossover/8{ORDERED}/during")
PAPER = {"allreduce": 1.247, "sgp": 1.780, f"crossover/8{ORDERED}": 1.719}  # log2 from 4 to 16 workers, figure 9
COLOURS = dict(zip(COMPARED, ("black", "tab:orange", "tab:blue", "tab:cyan"), strict=True))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="CSV; what it has is not measured again")
    parser.add_argument("--speed_up", action="store_true", help="with a fixed global batch")
    parser.add_argument("--figure", type=pathlib.Path, help="draw this PNG instead of measuring")
    parser.add_argument("--speed_up_from", type=pathlib.Path, help="CSV for its left half")
    args = parser.parse_args(argv)
    if args.figure:
        draw(read_rows(args.out), read_rows(args.speed_up_from) if args.speed_up_from else []).savefig(
            args.figure, dpi=120
        )
        return
    for flags in speed_up_cells() if args.speed_up else grid_cells():
        if not any(matches(row, flags) for row in read_rows(args.out)):
            command = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
            print(" ".join(command), flush=True)
            if code := subprocess.call([sys.executable, "-m", SCALING, *command, "--out", str(args.out)]):
                sys.exit(code)


def grid_cells() -> Iterator[dict]:
    """The flags of `scaling.py` for each cell."""
    for hosts in HOSTS:
        for rate, params in PARAMS.items():
            for compute in COMPUTES:
                names = (*ALWAYS, *(DURING if compute else ALONE))
                compute_s = compute * 32 * params / bits_per_second(rate)
                yield {
                    **{"hosts": hosts, "rate": rate, "params": params, "compute_s": compute_s},
                    **{"algorithms": ",".join(names), "steps": 3},
                }


def speed_up_cells() -> Iterator[dict]:
    for hosts in HOSTS[HOSTS.index(AMONG) :]:
        names = ("alone", *COMPARED, f"crossover/8/int8{ORDERED}")
        yield {"hosts": hosts, "compute_s": COMPUTED_S * AMONG / hosts, "algorithms": ",".join(names), **SPEED_UP}


def matches(row: dict, flags: dict) -> bool:
    """Whether a row was measured with these flags."""
    same = row["rate"] == flags["rate"] and int(row["hosts"]) == int(flags["hosts"])
    return same and math.isclose(float(row["compute_s"]), flags["compute_s"], abs_tol=1e-4)


def draw(grid: Sequence[dict], speed_up: Sequence[dict]) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(COMPUTES), width_ratios=[2, *[1] * len(COMPUTES)])
    draw_speed_up(left, speed_up)
    for axes, compute in zip(others, COMPUTES, strict=True):
        draw_seconds(axes, grid, compute * 32 * PARAMS[SHOWN] / bits_per_second(SHOWN))
    others[0].set_ylabel("seconds per step, 200 Mbit/s, 10 MB")
    for axes in (left, *others):
        axes.set_xticks(HOSTS, [str(n) for n in HOSTS])
        axes.minorticks_off()
    return figure


def draw_speed_up(axes: Axes, rows: Sequence[dict]) -> None:
    for name in COMPARED:
        seconds = {int(row["hosts"]): float(row["step_s"]) for row in rows if row["algorithm"] == name}
        if AMONG in seconds:
            points = sorted((hosts, math.log2(seconds[AMONG] / s)) for hosts, s in seconds.items())
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=label(name))
    for name, log2 in PAPER.items():
        axes.plot(max(HOSTS), log2, "x", color=COLOURS[name], label=f"{label(name)}, the paper's")
    ideal = [hosts for hosts in HOSTS if hosts >= AMONG]
    axes.plot(ideal, [math.log2(hosts / AMONG) for hosts in ideal], ":", color="grey", label="ideal")
    title = "fixed global batch"
    axes.set(xscale="log", xlabel="hosts", ylabel=f"log2 of the speed-up from {AMONG} hosts", title=title)
    axes.legend(fontsize=7)


def draw_seconds(axes: Axes, rows: Sequence[dict], compute_s: float) -> None:
    for name in COMPARED:
        points = sorted(
            (int(row["hosts"]), float(row["step_s"]))
            for row in rows
            if row["algorithm"] == name and matches(row, {**row, "rate": SHOWN, "compute_s": compute_s})
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name])
    axes.axhline(compute_s, color="grey", ls=":")
    axes.set(xscale="log", xlabel="hosts", title=f"compute {compute_s:g} s")
    axes.set_ylim(0)


def label(name: str) -> str:
    return name.removesuffix("/during").removesuffix(f"/8{ORDERED}") + (", during" if name.endswith("/during") else "")


if __name__ == "__main__":
    main(sys.argv[1:])
