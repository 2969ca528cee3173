"""What a run shows and leaves behind: a progress bar, `metrics.jsonl`, TensorBoard events, `curves.png` and a table."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter
from tqdm import tqdm

Row = dict[str, Any]


def new_workdir(path: str | pathlib.Path) -> pathlib.Path:
    """The folder, made if it is missing. Raises `ValueError` if it cannot be written or holds the metrics of a run."""
    workdir = pathlib.Path(path).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").touch()
    except OSError as error:
        raise ValueError(f"`workdir` must be a folder that can be written, got {path}: {error.strerror}.") from None
    if (workdir / "metrics.jsonl").stat().st_size:
        raise ValueError(f"`workdir` must not hold the metrics.jsonl of an earlier run, got {path}: name another one.")
    return workdir


class Log:
    """The progress bar, and rows of metrics, written as soon as they are known; without a `workdir` only collected.

    `train/loss` and `train/accuracy` are means over the steps and workers since the row before, and
    `examples_per_second` is measured from row to row, without the evaluations between them.
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
    ):
        self.rows: list[Row] = []
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self._workdir, self._title = workdir, title
        self._batch_size, self._steps_per_epoch = batch_size, steps_per_epoch
        self._wire_bytes = wire_bytes_per_step
        if workdir is not None:
            self._file = open(workdir / "metrics.jsonl", "w", buffering=1)  # noqa: SIM115 (closed by close)
            self._events = SummaryWriter(str(workdir))
        self._bar = tqdm(total=num_steps, unit="step", dynamic_ncols=True, mininterval=1.0, disable=workdir is None)
        self._last = time.perf_counter()

    def tick(self) -> None:
        """Count a step."""
        self._bar.update()

    def row(self, step: int, metrics: dict[str, np.ndarray], evaluate: Callable[[], Row] | None = None) -> None:
        """Write a row after `step` from the metrics of the steps since the row before, `[steps, workers]`."""
        row = {
            "step": step,
            "epoch": step / self._steps_per_epoch,
            "train/loss": metrics["loss"].mean(dtype=np.float64).item(),
            "train/accuracy": metrics["accuracy"].mean(dtype=np.float64).item(),
            "examples_per_second": len(metrics["loss"]) * self._batch_size / self._lap("training"),
            "wire_bytes_per_step": self._wire_bytes,
        }
        self._bar.set_postfix(
            loss=f"{row['train/loss']:.3f}",
            accuracy=f"{row['train/accuracy']:.3f}",
            images_s=f"{row['examples_per_second']:.0f}",
        )
        if evaluate is not None:
            row |= evaluate()
            self._lap("evaluation")
        self.rows.append(row)
        if self._workdir is not None:
            self._write(row)

    def close(self) -> None:
        """End the files and draw the curves of what there is; also for a run that was stopped."""
        self._bar.close()
        if self._workdir is None:
            return
        self._file.close()
        self._events.close()
        if self.rows:
            draw_curves(self.rows, self._workdir / "curves.png", self._title)

    def _lap(self, what: str) -> float:
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        self.seconds[what] += lap
        return lap

    def _write(self, row: Row) -> None:
        if "consensus_distance" in row:
            self._bar.write(_summary(row))
        self._file.write(json.dumps(row) + "\n")
        for name in row.keys() - {"step"}:
            self._events.add_scalar(name, row[name], row["step"])


def _summary(row: Row) -> str:
    """One line about an evaluation."""
    return (
        f"epoch {row['epoch']:5.2f}  step {row['step']:6d}  loss {row['train/loss']:.3f}  "
        f"averaged model {row['eval/mean/accuracy']:.4f}  workers {row['eval/workers/accuracy']:.4f} "
        f"[{row['eval/workers/accuracy_min']:.4f}, {row['eval/workers/accuracy_max']:.4f}]  "
        f"consensus distance {row['consensus_distance']:.3f}"
    )


def draw_curves(rows: list[Row], path: str | pathlib.Path, title: str) -> None:
    """Accuracy, loss and consensus distance against epochs, as a PNG."""
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
    figure.savefig(path, dpi=110)


def _plot(axes: Any, rows: list[Row], name: str, label: str, *, scale: float = 1.0, **style: Any) -> None:
    epoch, value = _column(rows, name)
    axes.plot(epoch, scale * value, label=label, **style)


def _column(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the rows that have `name`."""
    rows = [row for row in rows if name in row]
    return np.array([row["epoch"] for row in rows]), np.array([row[name] for row in rows])


def table(rows: dict[str, str]) -> str:
    """Two aligned columns.

    >>> print(table({"workers": "8", "accuracy": "0.91"}))
    workers   8
    accuracy  0.91
    """
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
