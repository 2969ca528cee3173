"""What must be alike on all processes is compared before the first step; all of them go on, or none does."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.processes.identity import digest

REPORT_BYTES = 16384  # of each process, gathered once: all must send equally many


class Disagreement(Exception):
    """The processes of a run were not started alike, or one of them failed before the first step."""


@contextlib.contextmanager
def agreement() -> Iterator[dict[str, Any]]:
    """Collect what must be alike on all processes; at the end of the block all of them go on, or none does.

    The block fills the dict with values by name and prepares the run. An exception in it ends all processes. Nothing
    in it may wait for another process: the reports, of one size, are the first that is sent. Raises `Disagreement`
    naming each field that differs, with the process and its value.
    """
    fields: dict[str, Any] = {}
    try:
        yield fields
    except Exception as error:
        _gather({"error": f"{type(error).__name__}: {error}"})
        raise
    if jax.process_count() > 1 and (message := differences(_gather(fields))):
        raise Disagreement(message)


def failures(error: Exception | None) -> str:
    """What went wrong on any process, the same on all of them, who wait for each other here; empty if nothing did."""
    fields = {} if error is None else {"error": f"{type(error).__name__}: {error}"}
    reports = _gather(fields)
    return "; ".join(
        report["error"] if len(reports) == 1 else f"process {i}: {report['error']}"
        for i, report in enumerate(reports)
        if "error" in report
    )


def differences(reports: Sequence[dict[str, str]]) -> str:
    """What is wrong with the reports of all processes, in a sentence; empty if nothing is.

    >>> differences([{"seed": "0"}, {"seed": "0"}, {"seed": "1"}])
    'the processes must be started alike: seed is 0 on processes 0, 1 and 1 on process 2.'
    >>> differences([{"seed": "0"}, {"error": "DataMissing: no fashion_mnist"}])
    'process 1 could not start: DataMissing: no fashion_mnist'
    """
    failed = [
        f"process {i} could not start: {report['error']}" for i, report in enumerate(reports) if "error" in report
    ]
    if failed:
        return "; ".join(failed)
    found = []
    for name in dict.fromkeys(name for report in reports for name in report):
        values = [report.get(name, "absent") for report in reports]
        if len(set(values)) > 1:
            holders = {value: [i for i, v in enumerate(values) if v == value] for value in dict.fromkeys(values)}
            found.append(f"{name} is " + " and ".join(f"{v} on {_listed(i)}" for v, i in holders.items()))
    return f"the processes must be started alike: {'; '.join(found)}." if found else ""


def _listed(indices: list[int]) -> str:
    return (
        f"process{'es' * (len(indices) > 1)} " + ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    )


def _gather(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The fields of all processes, long values by their digests."""
    if jax.process_count() == 1:
        return [fields]
    short = {name: _shortened(str(value), name) for name, value in fields.items()}
    encoded = json.dumps(short).encode()
    if len(encoded) > REPORT_BYTES:
        raise ValueError(f"the report of a process must fit {REPORT_BYTES} bytes, got {len(encoded)}.")
    report = np.zeros(REPORT_BYTES, np.uint8)
    report[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return [json.loads(bytes(row).rstrip(b"\0")) for row in multihost_utils.process_allgather(report)]


def _shortened(value: str, name: str) -> str:
    if name == "error":
        return value[:4000]
    return value if len(value) <= 64 else f"{value[:32]}… ({digest(value.encode())})"
