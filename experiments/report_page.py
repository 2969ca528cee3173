"""One HTML page about one run or several: curves, who hears whom, settings and results. It needs nothing but a browser.

    python -m experiments.report_page runs/a runs/b --out report.html

A run that is still going on is shown as far as it has come.
"""

import argparse
import functools
import html
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments import checkpoint, svg
from experiments.configs import default
from experiments.mixing_pattern import exchanges
from experiments.settings import as_json, config_of
from experiments.svg import Line
from experiments.workdir import CONFIG, METRICS, STATUS, Row, read_rows

COLOURS = 8  # of report_page.css
MOST_WORKERS = 64  # whose matrices can be read
EXCHANGES = 6
STYLE = pathlib.Path(__file__).with_suffix(".css")


class Run(NamedTuple):
    """What a folder tells of its run."""

    name: str
    rows: list[Row]
    config: dict[str, Any]  # by dotted names; empty where nothing recorded it
    num_steps: int | None  # that it is to have; None: not known


def read_run(workdir: pathlib.Path, name: str) -> Run:
    """Raises `ValueError` for a folder without rows of metrics."""
    if not (workdir / METRICS).is_file() or not (rows := read_rows(workdir, sys.maxsize)):
        raise ValueError(f"`WORKDIR` must hold the {METRICS} of a run with at least one row, got {workdir}.")
    status = json.loads((workdir / STATUS).read_text()) if (workdir / STATUS).is_file() else {}
    return Run(name, rows, recorded_config(workdir), status.get("num_steps"))


def recorded_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The run's own file, or, before there was one, the record of a checkpoint."""
    if (workdir / CONFIG).is_file():
        return json.loads((workdir / CONFIG).read_text())
    for step in reversed(checkpoint.steps(workdir)):
        try:
            return {k: v for k, v in checkpoint.read_record(workdir, step)["config"].items() if k != "data"}
        except checkpoint.Damaged:
            continue
    return {}


def names_of(workdirs: Sequence[pathlib.Path]) -> list[str]:
    """The folders' own names, or their paths where two have the same.

    >>> names_of([pathlib.Path("runs/a"), pathlib.Path("runs/b")])
    ['a', 'b']
    """
    names = [path.resolve().name for path in workdirs]
    return names if len(set(names)) == len(names) else [str(path) for path in workdirs]


def page(runs: Sequence[Run]) -> str:
    """The page. Raises `ValueError` for runs that share no axis, of text and of images."""
    of_text = {is_of_text(run) for run in runs}
    if len(of_text) > 1:
        raise ValueError("`WORKDIR` must name runs of text or runs of images, got both: they share no axis.")
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    body = [f"<h1>crossover_jax: {html.escape(title)}</h1>", legend(runs), results(runs), charts(runs, *of_text)]
    body += [*patterns(runs), settings(runs), *map(details, runs)]
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>{html.escape(title)}</title>'
        f"<style>{STYLE.read_text()}</style></head><body>{''.join(body)}</body></html>\n"
    )


def is_of_text(run: Run) -> bool:
    return "wire_bytes_per_token" in run.rows[-1]


def legend(runs: Sequence[Run]) -> str:
    items = []
    for i, run in enumerate(runs):
        c, step = run.config, run.rows[-1]["step"]
        what = f"{c['algorithm']}, {c['num_workers']} workers, {c['model.name']} on {c['dataset.name']}" if c else ""
        far = f"step {step}" if run.num_steps in (None, step) else f"step {step} of {run.num_steps}, not at its end"
        told = html.escape(f"{what}: {far}" if what else far)
        items.append(f'<li class="c{i % COLOURS}"><span><b>{html.escape(run.name)}</b> {told}</span></li>')
    return f'<ul class="runs">{"".join(items)}</ul>'


# What came out


def results(runs: Sequence[Run]) -> str:
    """The last row that has an evaluation, a column for each run."""
    columns = [results_of(run) for run in runs]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "") for column in columns)) for name in names]
    return f"<h2>Results</h2>{table(('', *(run.name for run in runs)), rows)}"


def results_of(run: Run) -> dict[str, str]:
    last, ends = run.rows[-1], [row for row in run.rows if "eval/mean/loss" in row]
    found = {"step": f"{last['step']}", "epoch": f"{last['epoch']:.2f}"}
    if ends:
        row = ends[-1]
        workers = [row.get(f"eval/workers/accuracy{end}") for end in ("_min", "_max")]
        if "bits_per_byte" in row:
            found["bits per byte, averaged model"] = f"{row['bits_per_byte']:.4f}"
            found["lowest of the run"] = f"{min(row['bits_per_byte'] for row in ends):.4f}"
        found["accuracy, averaged model"] = f"{row['eval/mean/accuracy']:.4f}"
        found["highest of the run"] = f"{max(row['eval/mean/accuracy'] for row in ends):.4f}"
        if None not in workers:
            found["accuracy, workers"] = "{:.4f} to {:.4f}".format(*workers)
        found["loss, averaged model"] = f"{row['eval/mean/loss']:.4f}"
        found["consensus distance"] = f"{row['consensus_distance']:.4f}"
    rate = "tokens_per_second" if is_of_text(run) else "examples_per_second"
    found[f"{rate.replace('_', ' ')}, median"] = f"{np.median([row[rate] for row in run.rows]):.0f}"
    found["MB sent by a worker per step"] = f"{last['wire_bytes_per_step'] / 1e6:.4g}"
    found["MB sent by a worker in all"] = f"{last['wire_bytes_per_step'] * last['step'] / 1e6:.4g}"
    if is_of_text(run):
        found["bytes sent per token"] = f"{last['wire_bytes_per_token']:.1f}"
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="scroll"><table><thead>{line("th", head)}</thead><tbody>{body}</tbody></table></div>'


# Curves


def charts(runs: Sequence[Run], of_text: bool) -> str:
    x, rate = ("step", "tokens_per_second") if of_text else ("epoch", "examples_per_second")
    accuracy = [line(i, run, "eval/mean/accuracy", x, 100.0, band=True) for i, run in enumerate(runs)]
    distance = [line(i, run, "consensus_distance", x) for i, run in enumerate(runs)]
    rates = [line(i, run, rate, x, is_thin=True) for i, run in enumerate(runs)]
    key, scale = ("bits_per_byte", 1.0) if of_text else ("eval/mean/accuracy", 100.0)
    to_bits = 1 / math.log(2) if of_text else 1.0
    train = [line(i, run, "train/loss", x, to_bits, is_thin=True) for i, run in enumerate(runs)]
    test = [line(i, run, "bits_per_byte" if of_text else "eval/mean/loss", x) for i, run in enumerate(runs)]
    sent = [line(i, run, key, "sent", scale) for i, run in enumerate(runs)]
    sent = [own for own in sent if any(own.x)]  # not of workers that send nothing
    loss = "bits per byte" if of_text else "loss"
    score = "bits per byte" if of_text else "accuracy, %"
    figures = [
        ("accuracy, %", "averaged model; the band is from the worst to the best worker", accuracy, x, {}),
        (loss, "thick: held-out data, averaged model; thin: training", [*train, *test], x, {"is_log": True}),
        ("consensus distance", "of the workers from their average", distance, x, {"from_zero": True}),
        (rate.replace("_", " "), "of all workers, without evaluations", rates, x, {"from_zero": True}),
        (f"{score} by what was sent", "averaged model", sent, "MB sent by a worker", {}),
    ]
    if of_text:
        figures[:2] = reversed(figures[:2])
    drawn = (
        f"<figure><h3>{html.escape(name)}</h3>{svg.chart(lines, name, unit, **scales)}"
        f"<figcaption>{html.escape(told)}</figcaption></figure>"
        for name, told, lines, unit, scales in figures
    )
    return f'<h2>Curves</h2><div class="charts">{"".join(drawn)}</div>'


def line(i: int, run: Run, name: str, x: str, scale: float = 1.0, *, band: bool = False, is_thin: bool = False) -> Line:
    """What the rows say of `name`, against `x`; "sent": the megabytes that a worker has sent by then."""
    rows = [row for row in run.rows if name in row]
    xs = [row["wire_bytes_per_step"] * row["step"] / 1e6 if x == "sent" else row[x] for row in rows]
    edges = [[scale * row.get(f"eval/workers/accuracy{end}", math.nan) for row in rows] for end in ("_min", "_max")]
    low, high = edges if band and np.isfinite(edges).all() else (None, None)
    return Line(i % COLOURS, xs, [scale * row[name] for row in rows], low, high, is_thin)


# Who hears whom


def patterns(runs: Sequence[Run]) -> Iterable[str]:
    yield "<h2>Who hears whom</h2>"
    yield (
        '<p class="quiet">A row is a worker, a column whom it hears; the darker, the more of its parameters comes from '
        "there. The first pictures are of one layer, the last of the whole model. Measured with this version of the "
        "code, on a model of twelve equal layers.</p>"
    )
    for run in runs:
        yield f"<h3>{html.escape(run.name)}</h3>{pattern(run)}"


def pattern(run: Run) -> str:
    if not run.config:
        return '<p class="none">Nothing recorded the config of this run.</p>'
    if run.config["num_workers"] > MOST_WORKERS:
        return f'<p class="none">Of more than {MOST_WORKERS} workers no picture can be read.</p>'
    try:
        found = exchanges(config_of(run.config), EXCHANGES)
    except (ValueError, KeyError, AttributeError) as error:  # of a config that another version of the code wrote
        return f'<p class="none">{html.escape(f"This version cannot build the algorithm: {error}")}</p>'
    if not found:
        averaged = run.config["algorithm"] == "allreduce"
        why = "Gradients are averaged over all workers at every step" if averaged else "No worker hears another"
        return f'<p class="none">{why}: parameters do not travel.</p>'
    together = functools.reduce(lambda so_far, own: own.model @ so_far, found, np.eye(len(found[0].model)))
    shown = [(f"layer, step {own.step}", own.layer) for own in found]
    shown += [(f"model, step {found[0].step}", found[0].model), (f"model, {len(found)} exchanges", together)]
    drawn = (f"<figure>{svg.matrix(shares, name)}<figcaption>{name}</figcaption></figure>" for name, shares in shown)
    return f'<div class="strip">{"".join(drawn)}</div>'


# Settings


def settings(runs: Sequence[Run]) -> str:
    """Where several runs differ, or how one differs from the defaults."""
    known = [run for run in runs if run.config]
    if not known:
        return ""
    columns = {run.name: run.config for run in known}
    title = "Where the configs differ"
    if len(known) == 1:
        columns, title = {"default": as_json(default.get_config()), **columns}, "What is not at its default"
    keys = sorted({key for column in columns.values() for key in column})
    told = {key: [told_value(column, key) for column in columns.values()] for key in keys}
    rows = [(key, *values) for key, values in told.items() if len(set(values)) > 1]
    return f"<h2>{title}</h2>{table(('key', *columns), rows) if rows else '<p>Nowhere.</p>'}"


def told_value(config: Mapping[str, Any], key: str) -> str:
    return str(config[key]) if key in config else ""


def details(run: Run) -> str:
    """All settings and all evaluations, to be unfolded."""
    rows = [row for row in run.rows if "eval/mean/loss" in row] or run.rows[-1:]
    names = list(dict.fromkeys(name for row in rows for name in row))
    told = [[f"{row[name]:.6g}" if name in row else "" for name in names] for row in rows]
    whole = table(("key", "value"), [(key, told_value(run.config, key)) for key in sorted(run.config)])
    name = html.escape(run.name)
    return (
        f'<details data-run="{name}"><summary>{name}: every evaluation</summary>{table(names, told)}</details>'
        f"<details><summary>{name}: every setting</summary>{whole}</details>"
    )


def main(argv: Sequence[str]) -> int:
    """Write the page; what is wrong with a folder is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report_page", description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="the page (default: report.html in the first WORKDIR)")
    args = parser.parse_args(argv)
    out = args.out or args.workdirs[0] / "report.html"
    try:
        runs = [read_run(path, name) for path, name in zip(args.workdirs, names_of(args.workdirs), strict=True)]
        out.write_text(page(runs))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
