"""Draw the counterparts of the paper's figures from `results/*.csv`, ours beside theirs, and print what they say.

    python -m experiments.figures --results experiments/results --out figures

Ours is the test accuracy of the averaged model, a mean over seeds with its 95 % interval; theirs is one run of
ResNet-50 on ImageNet per point. Of language models there is bits per byte against bytes sent per token. A study that
has not been run is left out.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

if not __package__:  # as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import csv_rows
from experiments.frontier import bytes_per_token, draw_frontier, final_bits
from experiments.intervals import Interval, interval, paired
from experiments.paths import local_path
from experiments.studies import lm_frontier, lm_others
from experiments.studies.study import FINAL, TUNING, Row, run_of

PAPER = pathlib.Path(__file__).parent / "results" / "paper.csv"
COLOURS = {"allreduce": "black", "crossover": "tab:blue", "sgp": "tab:orange", "hierarchical": "tab:green"}
GROUPS = 8  # of the hierarchy in figure 8
# arm of a study -> method in the paper's CSV
ABLATIONS = {
    "paper": "crossover",
    "no load balancing": "crossover_no_load_balance",
    "no segments": "crossover_no_segment",
    "neither": "crossover_no_load_balance_no_segment",
}
Accuracies = Mapping[str, Mapping[int, float]]  # of arms, by seed


def main(argv: Sequence[str]) -> int:
    """Draw what there are results for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", default=PAPER.parent)
    parser.add_argument("--out", required=True, help="folder for the PNGs")
    args = parser.parse_args(argv)
    try:
        results, out = local_path("--results", args.results), local_path("--out", args.out)
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    paper = csv_rows.read(PAPER)
    for name, draw in STUDIES.items():
        found = final_accuracies(csv_rows.read(results / f"{name}.csv"))
        if not found:
            print(f"{name}: no results")
            continue
        figure = draw(found, paper)
        figure.savefig(out / f"{name}.png", dpi=110)
        print(f"\n{name}: {out / f'{name}.png'}\n{table(found)}")
    if tuning := tuning_accuracies(csv_rows.read(results / "batch.csv")):
        draw_rates(tuning, paper).savefig(out / "rates.png", dpi=110)
        print(f"\nlearning rates: {out / 'rates.png'}")
    bits, sent = {}, {}
    for name, study in FRONTIER.items():
        rows = csv_rows.read(results / f"{name}.csv")
        sent |= bytes_per_token(rows, study.get_study())
        bits |= {arm: own for arm, own in final_bits(rows).items() if arm in sent}
    if bits:
        draw_frontier(bits, sent).savefig(out / "frontier.png", dpi=110)
        print(f"\nfrontier, bits per byte: {out / 'frontier.png'}\n{table(bits, digits=4)}")
    return 0


def final_accuracies(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Test accuracies of the final runs; of one that diverged, 0."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:  # of a run the last row stays
        if row["stage"] == FINAL:
            found.setdefault(row["arm"], {})[row["seed"]] = row["accuracy"] or 0.0
    return found


def tuning_accuracies(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Held-out accuracies of all tuning seeds, by arm and learning rate."""
    last = {run_of(row): row["accuracy"] or 0.0 for row in rows if row["stage"] == TUNING}
    found: dict[str, dict[float, list[float]]] = {}
    for run, accuracy in last.items():
        found.setdefault(run.arm, {}).setdefault(run.learning_rate, []).append(accuracy)
    return found


def baseline_of(arm: str, found: Accuracies) -> str:
    """The AllReduce that an arm is compared with: where there are several, that of its batch or warm-up."""
    own = f"allreduce {arm.partition(' ')[2]}"
    return own if own in found and own != arm else "allreduce"


def difference(arm: str, found: Accuracies) -> Interval | None:
    """To its AllReduce, paired over seeds; None for AllReduce itself, and where there is none to compare with."""
    baseline = baseline_of(arm, found)
    return paired(found[arm], found[baseline]) if baseline in found and baseline != arm else None


def table(found: Accuracies, digits: int = 2) -> str:
    """A line per arm: its accuracy, or bits, and the paired difference to its AllReduce."""
    lines, spec = [], f".{digits}f"
    for arm, of_seeds in found.items():
        own, less = interval(list(of_seeds.values())), difference(arm, found)
        line = f"  {arm:28} {own.mean:6{spec}} ± {own.half:{spec}}  {len(of_seeds):2} seeds"
        if less is not None:
            line += f"   to {baseline_of(arm, found)}: {less:{spec}}"
        lines.append(line)
    return "\n".join(lines)


# Figures


def beside(title: str, unit: str) -> tuple[Figure, Any, Any]:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    ours, theirs = figure.subplots(1, 2)
    ours.set(title="ours: perceptron, Fashion-MNIST", xlabel=unit, ylabel="test accuracy, %")
    theirs.set(title="paper: ResNet-50, ImageNet", xlabel=unit, ylabel="top-1, %")
    for axes in (ours, theirs):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure, ours, theirs


def labelled(figure: Figure) -> Figure:
    """With every point of its horizontal axes written out."""
    for axes in figure.axes:
        points = sorted({x for line in axes.lines for x in np.asarray(line.get_xdata(), float).tolist()})
        axes.set_xticks(points, [f"{x:g}" for x in points])
        axes.minorticks_off()
    return figure


def plot(axes: Any, points: Mapping[Any, Sequence[float]], label: str, **style: Any) -> None:
    """Means against workers or batch, with intervals where there are several values."""
    x = sorted(points)
    intervals = [interval(points[i]) for i in x]
    halves = [0.0 if np.isinf(own.half) else own.half for own in intervals]
    axes.errorbar(x, [own.mean for own in intervals], halves, label=label, marker="o", capsize=3, **style)


def ours_by(found: Accuracies, prefix: str) -> dict[int, list[float]]:
    """Accuracies of the arms "prefix n" by n."""
    split = {arm: arm.rpartition(" ") for arm in found}
    return {int(n): list(found[arm].values()) for arm, (name, _, n) in split.items() if name == prefix}


def theirs_by(paper: Sequence[Row], figure: str, method: str, key: str, **which: Any) -> dict[int, list[float]]:
    rows = [row for row in paper if (row["figure"], row["method"]) == (figure, method)]
    return {row[key]: [row["top1"]] for row in rows if all(row[name] == value for name, value in which.items())}


def draw_batch(found: Accuracies, paper: Sequence[Row]) -> Figure:
    figure, ours, theirs = beside("Accuracy by global mini-batch, 8 workers (figure 7)", "global mini-batch")
    for name in ("allreduce", "sgp", "crossover"):
        plot(ours, ours_by(found, name), name, color=COLOURS[name])
        plot(theirs, theirs_by(paper, "figure 7", name, "batch"), name, color=COLOURS[name])
    ours.legend()
    return labelled(figure)


def draw_rates(tuning: Mapping[str, Mapping[float, Sequence[float]]], paper: Sequence[Row]) -> Figure:
    """The largest batch of ours, on held-out examples, beside the largest of theirs."""
    batch = max(int(arm.rpartition(" ")[-1]) for arm in tuning)
    figure, ours, theirs = beside(f"Accuracy by learning rate, batch {batch} and 163840 (figure 6)", "learning rate")
    ours.set(ylabel="held-out accuracy, %")
    for name in ("allreduce", "sgp", "crossover"):
        plot(ours, tuning.get(f"{name} {batch}", {}), name, color=COLOURS[name])
        plot(theirs, theirs_by(paper, "figure 6", name, "learning_rate", batch=163840), name, color=COLOURS[name])
    ours.legend()
    return labelled(figure)


def draw_workers(found: Accuracies, paper: Sequence[Row]) -> Figure:
    figure, ours, theirs = beside("Accuracy by number of workers, fixed global batch (figure 8)", "workers")
    crossover = ours_by(found, "crossover")
    workers = [n for n in crossover if n >= GROUPS]
    same = {"allreduce": list(found["allreduce"].values()), "hierarchical": crossover.get(GROUPS)}
    for name, values in same.items():  # whatever the number of workers
        if values:
            label = f"hierarchical, {GROUPS} groups" if name == "hierarchical" else name
            plot(ours, dict.fromkeys(workers, values), label, color=COLOURS[name])
    plot(ours, {n: crossover[n] for n in workers}, "crossover", color=COLOURS["crossover"])
    for peers, line in (("1 peer", "-"), ("2 peers", "--")):
        plot(ours, ours_by(found, f"sgp {peers}"), f"sgp, {peers}", color=COLOURS["sgp"], linestyle=line)
    for name in ("allreduce", "sgp", "crossover"):
        plot(theirs, theirs_by(paper, "figure 8", name, "workers"), name, color=COLOURS[name])
    hierarchical = theirs_by(paper, "figure 8", "hierarchical_crossover", "workers")
    plot(theirs, hierarchical, f"hierarchical, {GROUPS} groups", color=COLOURS["hierarchical"])
    ours.legend()
    theirs.legend()
    return labelled(figure)


def draw_ablations(found: Accuracies, paper: Sequence[Row]) -> Figure:
    figure, ours, theirs = beside("What load balancing and segments are worth", "workers")
    for name, method in ABLATIONS.items():
        plot(ours, ours_by(found, name), name)
        plot(theirs, theirs_by(paper, "ablation", method, "workers"), name)
    for name in ("crossover", "1 segment", "64 segments", "phases", "one phase"):
        plot(ours, ours_by(found, name), name, linestyle=":")
    figure.legend(*ours.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return labelled(figure)


def draw_bars(found: Accuracies, paper: Sequence[Row]) -> Figure:
    """Differences to AllReduce of the same kind, of AllReduce itself to the first; the paper has none of these."""
    del paper
    figure = Figure(figsize=(8, 0.5 * len(found) + 1.5), layout="constrained")
    axes = figure.subplots()
    of_arms = {arm: less for arm in reversed(list(found)) if (less := difference(arm, found)) is not None}
    arms, differences = list(of_arms), list(of_arms.values())
    axes.barh(arms, [own.mean for own in differences], xerr=[own.half for own in differences], capsize=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.set(xlabel="test accuracy minus that of its AllReduce, points (paired over seeds, 95 %)")
    axes.grid(alpha=0.3, axis="x")
    return figure


FRONTIER = {"lm_frontier": lm_frontier, "lm_others": lm_others}  # one picture of both
STUDIES = {
    "batch": draw_batch,
    "workers": draw_workers,
    "ablations": draw_ablations,
    "lars": draw_bars,
    "gap": draw_bars,
    "large": draw_bars,
    "large_lars": draw_bars,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
