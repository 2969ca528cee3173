"""Does an island wait for a victim? The same events with exchange and without it, and SPMD gossip beside them."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from crossover_jax.text import as_table
from experiments import csv_rows
from experiments.islands import faults
from experiments.islands.fleet import Fleet, environment
from experiments.islands.measures import machine, spread, track
from experiments.workdir import METRICS

FOUNDER, OTHER, SLOW, KILLED, STOPPED, LATE = "abcdef"  # nothing happens to the first two
AT_START = (FOUNDER, OTHER, SLOW, KILLED, STOPPED)
WHEN = {KILLED: 0.2, STOPPED: 0.45, LATE: 0.7}  # parts of the time that is measured
SPMD_STEPS = 300
NEVER = 10**9  # steps, or epochs
EACH = 64  # examples of an island's or a worker's step
WITHOUT, WITH = "without exchange", "with exchange"


class Measured(NamedTuple):
    """One run of the events."""

    took: np.ndarray  # seconds of the steps of those to whom nothing happened
    exchange: np.ndarray  # seconds of `exchange` in each
    rate: float  # steps a second, of all that were there at the start
    participation: float


def measure(folder: pathlib.Path, flags: Sequence[str], pace_ms: float, steps: int) -> int:
    """Run islands with exchange and without, and SPMD gossip; print and write what came out. 1 if it is not enough."""
    flags = [*flags, f"--config.batch_size={EACH * len(AT_START)}", f"--config.eval_batch_size={200 * len(AT_START)}"]
    runs = {}
    for how in (WITHOUT, WITH):
        print(f"islands {how}: about {pace_ms * steps / 1e3 + 60:.0f} s", flush=True)
        runs[how] = run_islands(folder / how.replace(" ", "-"), flags, pace_ms, steps, how)
    print(f"SPMD gossip: about {SPMD_STEPS * pace_ms * faults.TIMES_SLOWER / 1e3 + 60:.0f} s", flush=True)
    spmd = run_spmd(folder / "spmd", flags, pace_ms)
    return report(folder, runs, spmd)


def run_islands(folder: pathlib.Path, flags: Sequence[str], pace_ms: float, steps: int, how: str) -> Measured:
    """Five islands, one of them slow; one is killed and started again, one is stopped for 10 s, and one joins."""
    own = [
        f"--pace_ms={pace_ms}",
        "--timeout=3",
        f"--config.steps={20 * steps}",  # the clock must not end before the measurement
        "--config.log_every=100",
        f"--config.checkpoint.every={NEVER}",  # who was killed comes back with a peer's state
    ]
    config, *more = flags
    fleet = Fleet(folder, [config, *own, *more], environment(folder.parent), islands=len(AT_START))
    try:
        for name in (*AT_START, LATE):
            fleet.control(name).mkdir(parents=True)
            if how == WITHOUT:
                (fleet.control(name) / "alone").touch()
        fleet.slow_down(SLOW, faults.TIMES_SLOWER * pace_ms)
        fleet.start(FOUNDER)
        wait_for_steps(fleet, {FOUNDER: 1})
        for name in AT_START[1:]:
            fleet.start(name)
        wait_for_steps(fleet, dict.fromkeys(AT_START, 10))
        began, length = time.time() + 2.0, steps * pace_ms / 1e3
        have_it_happen(fleet, began, length)
        sleep_until(began + length)
        ended = time.time()
        wait_for_steps(fleet, {LATE: 1})
        fleet.end()
        tracks = {name: track(fleet, name) for name in AT_START}
    finally:
        fleet.close()
    inside = {name: (own.ends > began) & (own.ends <= ended) for name, own in tracks.items()}
    rows = [json.loads((folder / name / METRICS).read_text().splitlines()[-1]) for name in (FOUNDER, OTHER)]
    return Measured(
        np.concatenate([tracks[name].took[inside[name]] for name in (FOUNDER, OTHER)]),
        np.concatenate([tracks[name].exchange[inside[name]] for name in (FOUNDER, OTHER)]),
        sum(int(keep.sum()) for keep in inside.values()) / (ended - began),
        float(np.mean([row["participation"] for row in rows])),
    )


def have_it_happen(fleet: Fleet, began: float, length: float) -> None:
    """The events, at the same moments of each run."""
    sleep_until(began + WHEN[KILLED] * length)
    fleet.send(KILLED, signal.SIGKILL)
    fleet.wait_for_end(KILLED)
    fleet.start(KILLED)
    sleep_until(began + WHEN[STOPPED] * length)
    at = fleet.send(STOPPED, signal.SIGSTOP)
    sleep_until(at + faults.STOP_S)
    fleet.send(STOPPED, signal.SIGCONT)
    sleep_until(began + WHEN[LATE] * length)
    fleet.start(LATE)


def run_spmd(folder: pathlib.Path, flags: Sequence[str], pace_ms: float) -> float:
    """Steps a second of as many workers, one process each over Gloo, of which one is as slow."""
    count, (config, *more) = len(AT_START), flags
    command = [
        *(sys.executable, "-m", "experiments.trials.paced"),
        *(f"--pace_ms={pace_ms}", f"--slow_ms={faults.TIMES_SLOWER * pace_ms}"),
        *("--", f"--processes={count}", "--devices-per-process=1"),
        *("--", config, f"--workdir={folder}", f"--config.num_workers={count}", f"--config.steps={SPMD_STEPS}"),
        *("--config.log_every=20", f"--config.eval_every={NEVER}", f"--config.checkpoint.every={NEVER}", *more),
    ]
    with open(folder.with_suffix(".log"), "w") as log:
        code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)
    if code:
        sys.exit(f"error: the SPMD run ended with {code}, see {log.name}")
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return float(np.median([row["examples_per_second"] for row in rows[1:]])) / EACH


def report(folder: pathlib.Path, runs: Mapping[str, Measured], spmd: float) -> int:
    """Print and write it; 1 if a limit does not hold."""
    before, after = (spread(runs[how].took) for how in (WITHOUT, WITH))
    share = float(np.median(runs[WITH].exchange) / np.nanmedian(runs[WITH].took))
    header = ("", "steps", "p50 ms", "p95 ms", "p99 ms", "longest ms", "exchange ms", "steps/s of five")
    lines = [
        (
            how,
            len(run.took),
            *(f"{value:.1f}" for value in spread(run.took).values()),
            f"{1e3 * np.median(run.exchange):.2f}",
            f"{run.rate:.1f}",
        )
        for how, run in runs.items()
    ]
    print(f"\n{as_table(header, lines)}\n")
    found = {
        "p95": (after["p95"] / before["p95"], 1.1, "p95 of the step, with exchange / without"),
        "p99": (after["p99"] / before["p99"], 1.3, "p99 of the step, with exchange / without"),
        "share": (share, 0.05, "median of exchange() / median of the step"),
        "rate": (runs[WITH].rate / spmd, 3.0, f"rate / that of SPMD gossip, {spmd:.1f} steps/s"),
    }
    holds = {name: value >= limit if name == "rate" else value <= limit for name, (value, limit, _) in found.items()}
    rows = [
        (
            words,
            f"{value:.3f}",
            f"{'at least' if name == 'rate' else 'at most'} {limit}",
            "holds" if holds[name] else "NOT",
        )
        for name, (value, limit, words) in found.items()
    ]
    print(as_table(("", "found", "must be", ""), rows))
    print(f"\nparticipation of the two to whom nothing happened: {runs[WITH].participation:.2f}")
    print(machine())
    kept = {name: value for name, (value, _, _) in found.items()}
    kept |= {f"{name}_{how}_ms": value for how in runs for name, value in spread(runs[how].took).items()}
    csv_rows.append(
        folder / "nobody_waits.csv", [kept | {"steps": len(runs[WITH].took), "spmd": spmd}], [*kept, "steps", "spmd"]
    )
    return int(not all(holds.values()))


def wait_for_steps(fleet: Fleet, wanted: Mapping[str, int]) -> None:
    """Until each of some islands has made so many. Raises `NotBegun`."""
    fleet.wait_until(lambda: all(len(track(fleet, name).ends) >= n for name, n in wanted.items()), list(wanted))


def sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.time()))
