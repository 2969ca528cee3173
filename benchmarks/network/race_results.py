"""What a race has measured, and what follows from it: contenders, forms, rows, and tables for a page."""

import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.network.contenders import tasks
from benchmarks.network.contenders.tasks import TASKS, Task, is_peer, period_of
from benchmarks.network.hosts import bits_per_second
from benchmarks.rows import read_rows
from crossover_jax import plan

STEPS = ("task", "contender", "hosts", "part", "learning_rate", "seed", "steps", "best")
SECONDS = ("task", "contender", "hosts", "link", "wait", "slowness", "count", "step_s", "frame_bytes")
WHOLE = ("task", "contender", "hosts", "link", "wait", "learning_rate", "seed", "steps", "seconds", "score")
ISLANDS = (*SECONDS[:6], "learning_rate", "seed", "steps", "seconds", "best")
COLUMNS = {"steps": STEPS, "seconds": SECONDS, "whole": WHOLE, "islands": ISLANDS}
HEADERS = 1.05  # of the bytes of frames to those of messages: docs/performance.md
LATENCY = 1e-4  # seconds, of a message between two idle hosts of the laboratory
OURS = (
    *("allreduce", "sgp", "crossover", "rows", "rows/during", "int8", "int8/during"),
    *("outer/16", "outer/16/int8", "outer/64/int8"),
)
THEIRS = (
    *("ddp", "decent/complete", "decent/one-peer-exp", "post_local/4/100", "post_local/16/0", "post_local/64/0"),
    *("diloco/16", "diloco/64"),
)
SHORT = (
    *("allreduce", "rows/during", "int8", "outer/16/int8"),
    *("ddp", "decent/one-peer-exp", "post_local/16/0", "diloco/16"),
)
SHOWN = {  # contenders, as pages and pictures call them
    **{"alone": "no exchange, JAX", "local": "no exchange, PyTorch"},
    **{"allreduce": "ours, AllReduce", "sgp": "ours, SGP", "crossover": "ours, gossip", "rows": "ours, gossip by rows"},
    "rows/during": "ours, gossip by rows, during",
    **{"int8": "ours, gossip in int8", "int8/during": "ours, gossip in int8, during"},
    **{f"outer/{h}": f"ours, outer steps every {h}, float32" for h in (4, 16)},
    **{f"outer/{h}/int8": f"ours, outer steps every {h}" for h in (16, 64)},
    **{"streamed/16": "ours, streamed over 16 steps", "ddp": "PyTorch DDP", "decent/complete": "Decent-DP, complete"},
    **{"decent/one-peer-exp": "Decent-DP, one peer", "post_local/4/100": "PostLocalSGD every 4"},
    **{f"post_local/{h}/0": f"PostLocalSGD every {h}" for h in (16, 64)},
    **{f"diloco/{h}": f"DiLoCo every {h}" for h in (4, 16, 64)},
}
BASES = {False: "alone", True: "local"}  # of ours and of theirs, what exchanges nothing


class Form(NamedTuple):
    hosts: int
    tasks: tuple[str, ...]
    contenders: tuple[str, ...]
    links: tuple[str, ...]
    waits: tuple[float, ...]
    seeds: int
    whole: tuple[tuple[str, str, float], ...] = ()  # contender, link, wait
    slowness: float = 1.0  # of host 0, whose waits take so many times as long
    changed: dict | None = None  # of the task
    islands: tuple[str, ...] = ()


WHOLE_CELLS = (
    *(("ddp", "50mbit", 0.05), ("int8", "50mbit", 0.05)),
    *(("post_local/16/0", "50mbit", 0.05), ("outer/16/int8", "5mbit", 0.05)),
)
TINY = {"steps": 40, "level": 0.3, "rates": (0.1,)}
FORMS = {
    "tiny": Form(
        2,
        ("images",),
        ("allreduce", "outer/4", "int8", "int8/during"),
        ("50mbit",),
        (0.01,),
        1,
        (("outer/4", "50mbit", 0.01),),
        changed=TINY,
        islands=("islands/1",),
    ),
    "tiny_peers": Form(
        2,
        ("images",),
        ("int8", *THEIRS[:3], "diloco/4"),
        ("50mbit",),
        (0.01,),
        1,
        (("ddp", "50mbit", 0.01),),
        changed=TINY,
    ),
    "short": Form(
        *(8, ("images",), SHORT, ("5mbit", "50mbit", "200mbit"), (0.05,), 3, WHOLE_CELLS),
        islands=("islands/1",),
    ),
    "full": Form(
        *(8, ("images", "text"), (*OURS, "streamed/16", *THEIRS)),
        *(("5mbit", "50mbit", "200mbit"), (0.05, 0.2), 3, WHOLE_CELLS),
        islands=("islands/1", "islands/4"),
    ),
}


class Results:
    """The rows that are there, in a folder, of a form."""

    def __init__(self, form: Form, out: pathlib.Path):
        self.form, self.out = form, out

    def rows(self, kind: str, **like: object) -> list[dict[str, str]]:
        """The rows that have these values."""
        found = read_rows(self.out / f"race_{kind}.csv")
        like = {"hosts": self.form.hosts, **like}
        return [row for row in found if all(_same(row[name], value) for name, value in like.items())]

    def task(self, name: str) -> Task:
        return TASKS[name]._replace(**self.form.changed or {})

    def best_rate(self, name: str, contender: str) -> float:
        """Of fewest steps on held-out examples; where no rate gets there, of the best score."""
        sign = -1 if not TASKS[name].is_loss else 1
        rows = self.rows("steps", task=name, contender=contender, part="validation")
        best = min(rows, key=lambda row: (float(row["steps"] or "inf"), sign * float(row["best"])))
        return float(best["learning_rate"])

    def step_seconds(self, name: str, contender: str, link: str, wait: float, slowness: float = 1.0) -> float | None:
        """The median of what was measured, where it was."""
        same = {"task": name, "link": link, "wait": wait, "slowness": slowness}
        rows = self.rows("seconds", contender=without_warmup(contender), **same)
        return statistics.median([float(row["step_s"]) for row in rows]) if rows else None

    def steps_to_level(self, name: str, contender: str) -> list[float]:
        """Of each seed; infinite where the level was not reached. DDP's, where it was not run, are AllReduce's."""
        rows = self.rows("steps", task=name, contender=contender, part="test")
        if contender == "ddp" and not rows:
            rows = self.rows("steps", task=name, contender="allreduce", part="test")
        return [float(row["steps"] or "inf") for row in rows]

    def seconds_to_level(self, name: str, contender: str, link: str, wait: float, slowness: float = 1.0) -> list[float]:
        """Of each seed; none where one of its parts was not measured, infinite where the level was not reached."""
        each, ddp = (self.step_seconds(name, c, link, wait, slowness) for c in (contender, "ddp"))
        first = warmup_of(contender)
        if each is None or (first and ddp is None):
            return []
        steps = self.steps_to_level(name, contender)
        return [min(s, first) * (ddp or 0.0) + max(s - first, 0) * each for s in steps]

    # Tables

    def as_text(self) -> str:
        """Tables in Markdown, as they stand on the page."""
        parts = []
        for name in self.form.tasks:
            for wait in self.form.waits:
                parts += [self._table_of_levels(name, wait), self._table_of_steps(name, wait)]
        return "\n\n".join([part for part in [*parts, self._table_of_islands(), self._table_of_whole()] if part])

    def _table_of_levels(self, name: str, wait: float) -> str:
        links, lines = self.form.links, []
        for contender in self.form.contenders:
            times = [self.seconds_to_level(name, contender, link, wait) for link in links]
            if steps := self.steps_to_level(name, contender):
                shown = [_with_range(each, ".0f") + " s" if each else "" for each in times]
                cells = SHOWN[contender], f"{self.best_rate(name, contender):g}", _with_range(steps, "g"), *shown
                lines.append((statistics.median(times[0] or [math.inf]), cells))
        header = f"{name}, a wait of {1e3 * wait:g} ms", "learning rate", "steps", *map(shown_rate, links)
        return _table(header, [cells for _, cells in sorted(lines, key=lambda line: line[0])])

    def _table_of_steps(self, name: str, wait: float) -> str:
        lines = []
        for contender in (BASES[False], BASES[True], *self.form.contenders):
            cells = []
            for link in self.form.links:
                each = self.step_seconds(name, contender, link, wait)
                alone = self.step_seconds(name, BASES[is_peer(contender)], link, wait)
                if each is None:
                    cells.append("")
                    continue
                predicted = predict(without_warmup(contender), self.task(name), self.form.hosts, link, alone or wait)
                is_base = contender in BASES.values()
                cells.append(f"{1e3 * each:.0f} ms" + ("" if is_base else f" ({predicted / each:.2f})"))
            if any(cells):
                lines.append((SHOWN[contender], *cells))
        return _table((f"{name}, a wait of {1e3 * wait:g} ms", *map(shown_rate, self.form.links)), lines)

    def _table_of_whole(self) -> str:
        lines = []
        for row in self.rows("whole"):
            each = self.step_seconds(row["task"], row["contender"], row["link"], float(row["wait"]))
            if each is not None:
                product, took = each * int(row["steps"]), float(row["seconds"])
                shown = f"{took:.0f} s", f"{product:.0f} s", f"{product / took:.2f}", row["score"]
                lines.append((SHOWN[row["contender"]], shown_rate(row["link"]), row["steps"], *shown))
        return _table(("end to end", "link", "steps", "took", "product", "ratio", "score"), lines)

    def _table_of_islands(self) -> str:
        """Beside DDP, whose steps a slow host makes longer and not more."""
        lines = []
        found = self.rows("islands")
        for run in sorted({(row["contender"], row["link"], row["wait"], row["slowness"]) for row in found}):
            contender, link, wait, slowness = run[0], run[1], float(run[2]), float(run[3])
            rows = self.rows("islands", contender=contender, link=link, wait=wait, slowness=slowness)
            steps, seconds = ([float(row[key] or "inf") for row in rows] for key in ("steps", "seconds"))
            ddp, ratio = self.seconds_to_level(rows[0]["task"], "ddp", link, wait, slowness), ""
            if ddp:
                ratio = f"{statistics.median(seconds) / statistics.median(ddp):.2f}"
            shown = f"{_with_range(seconds, '.0f')} s", f"{statistics.median(ddp):.0f} s" if ddp else "", ratio
            slow = f"{slowness:g} times" if slowness != 1 else "no"
            lines.append((f"every {contender.split('/')[1]}", shown_rate(link), slow, _with_range(steps, "g"), *shown))
        return _table(("islands", "link", "a slow host", "steps", "islands", "DDP", "ratio"), lines)


def is_reached(score: float, task: Task) -> bool:
    return score <= task.level if task.is_loss else score >= task.level


def best_of(scores: Sequence[float], task: Task) -> float:
    return (min if task.is_loss else max)(scores)


def warmup_of(contender: str) -> int:
    """Steps of DDP that come first."""
    return int(contender.split("/")[2]) if contender.startswith("post_local/") else 0


def without_warmup(contender: str) -> str:
    """
    >>> without_warmup("post_local/4/100")
    'post_local/4/0'
    """
    name, *options = contender.split("/")
    return f"{name}/{options[0]}/0" if name == "post_local" else contender


def predict(contender: str, task: Task, n: int, link: str, compute: float) -> float:
    """Seconds of a step by `crossover_jax.plan`, of what a step takes without an exchange, `compute`."""
    on = plan.Link(bits_per_second(link) / 8 / HEADERS, LATENCY)
    name, *options = contender.split("/")
    model, every = 4.0 * tasks.num_params(task), period_of(contender)
    if name in ("alone", "local"):
        return compute
    if name in ("allreduce", "ddp", "post_local", "diloco") or options == ["complete"]:
        exchange = plan.allreduce_seconds(model, n, on)
    elif "int8" in (name, *options):
        exchange = plan.gossip_seconds(plan.BYTES["int8"] * model / 4, on, rounds=3)
    else:
        exchange = plan.gossip_seconds(model / int(options[0]) if name == "streamed" else model, on)
    hides = "during" in options or name == "decent"
    return max(compute, exchange / every) if hides else compute + exchange / every


def _same(text: str, value: object) -> bool:
    return text == value if isinstance(value, str) else float(text) == float(value)


def _with_range(values: Sequence[float], form: str) -> str:
    median, least, most = (
        f"{x:{form}}" if math.isfinite(x) else "never" for x in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({least} to {most})" if len(set(values)) > 1 else median


def shown_rate(link: str) -> str:
    """
    >>> shown_rate("50mbit")
    '50 Mbit/s'
    """
    return f"{link.removesuffix('mbit')} Mbit/s"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = (header, ["---"] * len(header), *lines) if lines else ()
    return "\n".join("".join(f"| {cell} " if cell else "| " for cell in row) + "|" for row in rows)
