"""What measured steps say of links: how long a message waits, how many times the nominal transfer an exchange takes.

    python -m benchmarks.network.fit benchmarks/network/results/hosts.csv
    python -m benchmarks.network.fit benchmarks/network/results/hosts.csv --check benchmarks/network/results/grid.csv

The rows are those that `scaling.py` writes. `--check` predicts the steps of another file, which the fit has not seen.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.network.hosts import bits_per_second
from benchmarks.rows import read_rows
from crossover_jax.text import as_table

NEEDED = ("algorithm", "hosts", "rate", "compute_s", "step_s", "payload_bytes")  # columns
Row = Mapping[str, Any]


class Fit(NamedTuple):
    """The links of all hosts."""

    latency: float  # seconds that a message waits
    slowdown: float  # of a transfer at the nominal rate

    def predict(self, rows: Sequence[Row]) -> np.ndarray:
        """Seconds of the steps that rows describe."""
        exchange = _cost(rows) @ (self.latency, self.slowdown)
        compute = _column(rows, "compute_s")
        return np.where(_is_during(rows), np.maximum(compute, exchange), compute + exchange)

    def errors(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Medians of |predicted / measured − 1|: of all steps that exchange anything, and of the exchanges themselves.

        An exchange is what a step takes beyond its compute, which is given, where it comes after the gradient.
        """
        predicted, measured, compute = self.predict(rows), _column(rows, "step_s"), _column(rows, "compute_s")
        sends = _column(rows, "payload_bytes") > 0
        shows = sends & ~_is_during(rows)
        of_exchanges = (predicted - compute)[shows], (measured - compute)[shows]
        return _median_error(predicted[sends], measured[sends]), _median_error(*of_exchanges)


def fit(rows: Sequence[Row]) -> Fit:
    """Latency and slowdown from measured steps.

    Least squares of relative errors, over the steps whose exchange comes after the gradient: beside it, its time does
    not show. Neither is below 0. Raises `ValueError` where the measurements do not tell the two apart: they need
    exchanges of several sizes or rates.
    """
    cost, measured = _cost(rows), _column(rows, "step_s")
    used = ~_is_during(rows) & (cost[:, 1] > 0)
    relative = cost[used] / measured[used][:, None]
    # One column counts messages, the other seconds. Without a common scale the rank would see the larger one only.
    if np.linalg.matrix_rank(relative / relative.max(0, initial=1e-300)) < 2:
        raise ValueError(
            "the measurements must have exchanges after the gradient, of several sizes or rates, to tell latency from "
            f"rate, got {used.sum()} of {len(np.unique(cost[used], axis=0))} kinds."
        )
    exchange = measured - _column(rows, "compute_s")
    return Fit(*_solve_not_negative(relative, exchange[used] / measured[used]).tolist())


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=pathlib.Path, help="CSV of measurements")
    parser.add_argument("--check", type=pathlib.Path, help="CSV of the steps to predict (default: the same)")
    args = parser.parse_args(argv)
    try:
        found = fit(read_measurements(args.rows))
        print(as_text(found, read_measurements(args.check or args.rows)))
    except ValueError as error:
        sys.exit(f"error: {error}")


def as_text(found: Fit, rows: Sequence[Row]) -> str:
    of_steps, of_exchanges = found.errors(rows)
    lines = [
        (row["algorithm"], row["hosts"], row["rate"], row["compute_s"], row["step_s"], f"{predicted:.4g}")
        for row, predicted in zip(rows, found.predict(rows), strict=True)
    ]
    return (
        as_table(("algorithm", "hosts", "rate", "compute, s", "step, s", "predicted, s"), lines)
        + f"\n\nlatency {1e6 * found.latency:.3g} µs, {found.slowdown:.3f} times the transfer at the nominal rate; "
        f"median error of steps {100 * of_steps:.1f} %, of exchanges {100 * of_exchanges:.1f} %"
    )


def read_measurements(path: pathlib.Path) -> list[dict[str, str]]:
    """Rows of `scaling.py`. Raises `ValueError` where the file cannot be read or lacks a column."""
    if not path.is_file():
        raise ValueError(f"{path} must be a CSV file, there is none.")
    rows = read_rows(path)
    if lacking := [name for name in NEEDED if not rows or name not in rows[0]]:
        raise ValueError(f"{path} must have rows with {', '.join(NEEDED)}, it lacks {', '.join(lacking)}.")
    return rows


def _cost(rows: Sequence[Row]) -> np.ndarray:
    """Of each row how many messages wait for another, and seconds to send it all at the nominal rate."""
    payload = _column(rows, "payload_bytes")
    waits = np.array([_waits(row["algorithm"], int(row["hosts"])) for row in rows])
    rates = np.array([bits_per_second(row["rate"]) for row in rows])
    return np.stack([waits * (payload > 0), 8 * payload / rates], axis=1)


def _waits(algorithm: str, hosts: int) -> int:
    """Messages of a step that wait for another. Gloo averages along a ring, not in log2 n turns as `plan` assumes."""
    return 2 * (hosts - 1) if algorithm.startswith("allreduce") else 1


def _is_during(rows: Sequence[Row]) -> np.ndarray:
    return np.array(["during" in row["algorithm"] for row in rows])


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def _median_error(predicted: np.ndarray, measured: np.ndarray) -> float:
    return float(np.median(np.abs(predicted / measured - 1))) if measured.size else 0.0


def _solve_not_negative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The least squares solution of a x = b in two unknowns, neither below 0."""
    both, *_ = np.linalg.lstsq(a, b, rcond=None)
    # With two unknowns the constraint leaves three cases: neither is 0, or one of them.
    alone = [np.where(np.arange(2) == i, max(0.0, a[:, i] @ b / (a[:, i] @ a[:, i])), 0.0) for i in (0, 1)]
    return both if (both >= 0).all() else min(alone, key=lambda x: float(np.sum((a @ x - b) ** 2)))


if __name__ == "__main__":
    main(sys.argv[1:])
