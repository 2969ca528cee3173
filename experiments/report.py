"""What a run shows and leaves behind: its progress, rows of metrics for people and programs, curves and a table.

workdir/metrics.jsonl   a row of metrics a line
workdir/events.*        the same for TensorBoard, in groups
workdir/config.json     what the run was started with
workdir/status.json     where the run is: the step that it went on from, and the one of its last row
workdir/curves.png      accuracy, loss and consensus distance; of text, bits per byte and consensus distance
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore  # generated code without types
from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore  # generated code without types

from experiments import processes
from experiments.progress import Progress
from experiments.tracking import Wandb
from experiments.workdir import METRICS, STATUS, Row, append, read_rows, rewrite

EVENTS = "TensorBoard's file"
TAGS = {  # TensorBoard and others make a group of what stands before the first slash
    "epoch": "progress/epoch",
    "examples_per_second": "progress/examples_per_second",
    "tokens_per_second": "progress/tokens_per_second",
    "wire_bytes_per_step": "sent/wire_bytes_per_step",
    "wire_bytes_per_token": "sent/wire_bytes_per_token",
    "bits_per_byte": "eval/mean/bits_per_byte",
    "consensus_distance": "eval/workers/consensus_distance",
}


class Unwritten(Exception):
    """Rows of metrics are lost."""


class Events:
    """A file for TensorBoard; a row is on the disk when `add` returns, for a killed process keeps nothing else.

    (`tensorboardX.SummaryWriter` writes behind a queue, and would lose what metrics.jsonl has.)
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._writer = EventsWriter(str(workdir / "events"))
        if first_step:  # TensorBoard then forgets what an earlier process wrote of later steps
            start = SessionLog(status=SessionLog.START)
            self._write(Event(step=first_step + 1, session_log=start))
        self._writer.flush()

    def add(self, row: Row) -> None:
        values = [Summary.Value(tag=name, simple_value=row[name]) for name in row.keys() - {"step"}]
        self._write(Event(step=row["step"], summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


class Log:
    """The progress, and rows of metrics, written as soon as they are known; without a `workdir` only collected.

    `train/loss` and `train/accuracy` are means over the steps and workers since the row before, and
    `examples_per_second` is measured from row to row, without the evaluations between them. Where an example is text of
    `tokens_per_example` bytes, there are also `tokens_per_second`, of all workers, and `wire_bytes_per_token`, what a
    worker sends for each byte of its own batch. With the `state` of an earlier run it goes on where that was, behind
    the rows up to `first_step`.
    """

    def __init__(
        self,
        workdir: pathlib.Path | None,
        *,
        title: str,
        num_steps: int,
        batch_size: int,
        steps_per_epoch: float,
        wire_bytes_per_step: float,
        num_workers: int = 1,
        tokens_per_example: int | None = None,
        first_step: int = 0,
        state: dict[str, Any] | None = None,
        wandb: Wandb | None = None,
    ):
        self.rows: list[Row] = [] if workdir is None else read_rows(workdir, first_step)
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self._means: dict[str, list[float]] = {"loss": [], "accuracy": []}  # of each step since the last row
        if state is not None:
            self.seconds |= state["seconds"]
            self._means = {name: list(values) for name, values in state["means"].items()}
        self._steps = 0  # since the last lap
        self._workdir, self._title = workdir, title
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._wire_bytes = wire_bytes_per_step
        self._num_workers, self._tokens = num_workers, tokens_per_example
        if workdir is not None:
            rewrite(workdir / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows))
            self._status = {"began": time.time(), "start": first_step, "step": first_step, "num_steps": num_steps}
            rewrite(workdir / STATUS, json.dumps(self._status))  # behind the rows: who sees it sees those of this run
            self._events = Events(workdir, first_step)
        self._wandb = wandb
        self._unwritten = ""
        self._progress = Progress(first_step, num_steps, shown=workdir is not None)
        self._last = time.perf_counter()

    def tick(self, steps: int = 1) -> None:
        """Count steps."""
        self._progress.tick(steps)

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Take the metrics of the steps since the last time, `[steps, workers]`, into the next row."""
        self._steps += len(metrics["loss"])
        for name, means in self._means.items():
            means.extend(metrics[name].mean(1, dtype=np.float64).tolist())

    def state(self) -> dict[str, Any]:
        """What the next row needs of the steps so far, for JSON."""
        return {"means": {name: list(means) for name, means in self._means.items()}, "seconds": dict(self.seconds)}

    def row(self, step: int, evaluate: Callable[[], Row] | None = None) -> Row:
        """Write a row after `step` from what was added since the row before."""
        row = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            **{f"train/{name}": float(np.mean(means)) for name, means in self._means.items()},
            "examples_per_second": self._steps * self._batch_size / self._lap("training"),
            "wire_bytes_per_step": self._wire_bytes,
        }
        shown = {"loss": f"{row['train/loss']:.3f}", "accuracy": f"{row['train/accuracy']:.3f}"}
        if self._tokens is not None:
            row["tokens_per_second"] = row["examples_per_second"] * self._tokens
            row["wire_bytes_per_token"] = self._wire_bytes * self._num_workers / (self._batch_size * self._tokens)
            shown["tokens_s"] = f"{row['tokens_per_second']:.0f}"
        else:
            shown["images_s"] = f"{row['examples_per_second']:.0f}"
        self._means = {name: [] for name in self._means}
        self._progress.show(shown)
        if evaluate is not None:
            row |= evaluate()
            self._lap("evaluation")
        self.rows.append(row)
        if self._workdir is not None:
            self._write(row, self._workdir / METRICS)
        return row

    def end(self) -> None:
        """Write what a full disk refused, for there is no next row. Raises `Unwritten`."""
        if self._workdir is None or not self._unwritten:
            return
        try:
            append(self._workdir / METRICS, self._unwritten)
        except OSError as error:
            lost = self._unwritten.count("\n")
            raise Unwritten(f"the last {lost} rows of {METRICS} could not be written: {error.strerror}.") from None
        self._unwritten = ""

    def close(self) -> None:
        """End the files and draw the curves of what there is; also for a run that was stopped."""
        self._progress.close()
        if self._workdir is None:
            return
        if self._wandb is not None:
            self._wandb.close()
        with saying(EVENTS):
            self._events.close()
        if self.rows:
            with saying("curves.png"):
                draw_curves(self.rows, self._workdir / "curves.png", self._title)

    def _lap(self, what: str) -> float:
        now = time.perf_counter()
        lap, self._last, self._steps = now - self._last, now, 0
        self.seconds[what] += lap
        return lap

    def _write(self, row: Row, path: pathlib.Path) -> None:
        if "consensus_distance" in row:
            self._progress.write(_summary(row))
        grouped = {TAGS.get(name, name): value for name, value in row.items()}
        with saying(EVENTS):  # first: a process that dies between the two leaves no row that TensorBoard has not
            self._events.add(grouped)
        if self._wandb is not None:
            self._wandb.add(grouped)
        self._unwritten += json.dumps(row) + "\n"
        with saying(METRICS):
            append(path, self._unwritten)
            self._unwritten = ""  # else of a full disk: with the next row
        self._status["step"] = row["step"]
        with saying(STATUS):
            rewrite(path.with_name(STATUS), json.dumps(self._status))


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
    """A file that cannot be written is said, and the run goes on."""
    try:
        yield
    except OSError as error:
        processes.say(f"WARNING: {what} could not be written, the run goes on: {error.strerror}")


def _summary(row: Row) -> str:
    """One line about an evaluation."""
    bits = f"bits per byte {row['bits_per_byte']:.3f}  " if "bits_per_byte" in row else ""
    return (
        f"epoch {row['epoch']:5.2f}  step {row['step']:6d}  loss {row['train/loss']:.3f}  {bits}"
        f"averaged model {row['eval/mean/accuracy']:.4f}  workers {row['eval/workers/accuracy']:.4f} "
        f"[{row['eval/workers/accuracy_min']:.4f}, {row['eval/workers/accuracy_max']:.4f}]  "
        f"consensus distance {row['consensus_distance']:.3f}"
    )


def draw_curves(rows: list[Row], path: str | pathlib.Path, title: str) -> None:
    """Accuracy, loss and consensus distance against epochs, as a PNG; of text what `text_curves` shows."""
    of_text = "wire_bytes_per_token" in rows[-1]
    (text_curves if of_text else image_curves)(rows, title).savefig(path, dpi=110)


def image_curves(rows: list[Row], title: str) -> Figure:
    """Accuracy, loss and consensus distance against epochs."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    accuracy, loss, distance = figure.subplots(1, 3)
    epoch, low = _column(rows, "eval/workers/accuracy_min")
    _, high = _column(rows, "eval/workers/accuracy_max")
    accuracy.fill_between(epoch, 100 * low, 100 * high, color="tab:orange", alpha=0.3, label="workers, min to max")
    _plot(accuracy, rows, "eval/workers/accuracy", "workers, mean", scale=100, color="tab:orange")
    _plot(accuracy, rows, "eval/mean/accuracy", "averaged model", scale=100, color="tab:blue", marker="o")
    accuracy.set(title="test accuracy, %", xlabel="epoch")
    _plot(loss, rows, "train/loss", "training, workers' batches", color="tab:gray", linewidth=1)
    _plot(loss, rows, "eval/mean/loss", "test, averaged model", color="tab:blue", marker="o")
    loss.set(title="loss", xlabel="epoch", yscale="log")
    _plot(distance, rows, "consensus_distance", "", color="tab:green", marker="o")
    distance.set(title="consensus distance Ξ", xlabel="epoch", ylim=(0, None))
    for axes in (accuracy, loss, distance):
        axes.grid(alpha=0.3)
    accuracy.legend(loc="lower right")
    loss.legend(loc="upper right")
    figure.suptitle(title)
    return figure


def text_curves(rows: list[Row], title: str) -> Figure:
    """Bits per byte and consensus distance against steps; the title says what is sent per token.

    Above the first panel stands what each worker has sent by then, where it sends anything.
    """
    figure = Figure(figsize=(12, 5), layout="constrained")
    bits, distance = figure.subplots(1, 2, sharex=True)
    _plot(bits, rows, "train/loss", "training, workers' batches", x="step", scale=1 / math.log(2), color="tab:gray")
    found = [row["bits_per_byte"] for row in rows if "bits_per_byte" in row]
    label = "held-out text, averaged model" + (f": {found[-1]:.3f}" if found else "")
    _plot(bits, rows, "bits_per_byte", label, x="step", color="tab:blue", marker="o")
    bits.set(ylabel="bits per byte", xlabel="step", xlim=(0, rows[-1]["step"] * 1.02), yscale="log")
    bits.yaxis.set_major_locator(FixedLocator([1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 5, 6, 8, 10]))
    bits.yaxis.set_major_formatter("{x:g}")
    bits.yaxis.set_minor_locator(NullLocator())
    if sent := rows[-1]["wire_bytes_per_step"] / 1e6:
        above = bits.secondary_xaxis("top", functions=(lambda step: step * sent, lambda megabytes: megabytes / sent))
        above.set_xlabel("MB sent by each worker")
    _plot(distance, rows, "consensus_distance", "", x="step", color="tab:green", marker="o")
    distances = [row["consensus_distance"] for row in rows if "consensus_distance" in row]
    distance.set(ylabel="consensus distance Ξ", xlabel="step", ylim=(0, 1.1 * max(distances, default=0.0) or None))
    for axes in (bits, distance):
        axes.grid(alpha=0.3)
    bits.legend(loc="upper right")
    figure.suptitle(f"{title}: {rows[-1]['wire_bytes_per_token']:.1f} bytes sent per token")
    return figure


def _plot(
    axes: Any, rows: list[Row], name: str, label: str, *, x: str = "epoch", scale: float = 1.0, **style: Any
) -> None:
    places, value = _column(rows, name, x)
    axes.plot(places, scale * value, label=label, **style)


def _column(rows: list[Row], name: str, x: str = "epoch") -> tuple[np.ndarray, np.ndarray]:
    """Epochs, or another `x`, and values of the rows that have `name`."""
    rows = [row for row in rows if name in row]
    return np.array([row[x] for row in rows]), np.array([row[name] for row in rows])


def table(rows: dict[str, str]) -> str:
    """Two aligned columns.

    >>> print(table({"workers": "8", "accuracy": "0.91"}))
    workers   8
    accuracy  0.91
    """
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
