"""Kill training at random moments, resume it, and compare its end bit for bit with a run that was never stopped.

    python -m experiments.trials.crash --runs 50 --processes 1,2 --algorithms crossover,sgp,allreduce --out crash.csv

For each configuration, an algorithm on a number of processes, one run is left alone. Each trial begins in an empty
workdir, is killed by SIGKILL one to three times, in set-up, between two steps or while a checkpoint is written, and
goes on to the end: every byte of the last checkpoint, its checksums and all rows of metrics must be those of the run
that was left alone. Of several processes one is killed, and the others after a few seconds, or all at once.

A crash may cost `--every` steps and those that were trained while a save was written, at most as many again because a
save waits for the one before it.

With `--out` trials that have a row there are not run again. What follows `--` goes to `train.py`. The exit code is 1 if
a trial failed; its folder is kept.
"""

import argparse
import contextlib
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from experiments import checkpoint, csv_rows, processes
from experiments.paths import local_path
from experiments.trials.launch import (
    DEVICES,
    MOMENTS,
    PATIENCE,
    SAVING,
    SETUP,
    TRAINING,
    Crash,
    Failed,
    Kill,
    Setting,
    launched,
)
from experiments.workdir import METRICS

EQUAL = "bitwise equal"


class Outcome(NamedTuple):
    """`verdict` is `EQUAL`, or what is wrong."""

    crashes: list[Crash]
    verdict: str
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Run what is missing in `--out`; the exit code."""
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, through every `finally`
    root = pathlib.Path(args.workdir or tempfile.mkdtemp(prefix="crash-"))
    settings = [
        Setting(algorithm, num_processes, args.steps, args.every, tuple(args.train_flags))
        for num_processes in args.processes
        for algorithm in args.algorithms
    ]
    kept = read_rows(args.out) if args.out else {}
    rows: list[dict[str, str]] = []
    left_alone: dict[Setting, float] = {}  # the seconds of set-up of those that are there
    try:
        for i in range(args.runs):
            setting, number = settings[i % len(settings)], i // len(settings)
            key = key_of(setting, number, args.seed)
            if key not in kept:
                folder = folder_of(setting, root)
                if setting not in left_alone:
                    left_alone[setting] = undisturbed(setting, folder / "reference")
                outcome = run_trial(setting, number, args.seed, folder, left_alone[setting])
                kept[key] = row_of(key, outcome)
                if args.out:
                    csv_rows.append(args.out, [kept[key]], list(kept[key]))
            rows.append(kept[key])
            print(line_of(i + 1, kept[key]), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted after {len(rows)} of {args.runs} trials", file=sys.stderr)
        return 128 + signal.SIGINT
    except Failed as error:
        print(f"error: the run that was left alone failed: {error}", file=sys.stderr)
        return 2
    finally:
        for setting in settings:
            shutil.rmtree(folder_of(setting, root) / "reference", ignore_errors=True)
            with contextlib.suppress(OSError):  # of failed trials something is left
                folder_of(setting, root).rmdir()
        if not args.workdir:
            with contextlib.suppress(OSError):
                root.rmdir()
    return conclude(rows)


def conclude(rows: Sequence[dict[str, str]]) -> int:
    """Print what became of all trials; 1 if one failed."""
    print(f"\n{summary(rows)}")
    equal = sum(row["verdict"] == EQUAL for row in rows)
    redone = max((int(row["redone"]) for row in rows), default=0)
    print(f"{equal} of {len(rows)} {EQUAL}; at most {redone} steps redone per crash")
    return int(equal < len(rows))


def words_of(text: str) -> list[str]:
    return text.split(",")


def numbers_of(text: str) -> list[int]:
    return [int(word) for word in words_of(text)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """This program's own flags, and `train_flags`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="trials, dealt out over the configurations")
    parser.add_argument(
        "--processes", type=numbers_of, default=[1], help=f"numbers of processes, divisors of {DEVICES}"
    )
    parser.add_argument("--algorithms", type=words_of, default=["crossover"])
    parser.add_argument("--seed", type=int, default=0, help="of when and whom to kill")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--workdir", help="where runs go while they are needed; default: a temporary folder")
    parser.add_argument("--out", help="CSV, a row for each trial")
    parser.add_argument("train_flags", nargs="*", metavar="-- train.py's flags")
    args = parser.parse_args(argv)
    try:
        args.workdir = args.workdir and local_path("--workdir", args.workdir)
        args.out = args.out and local_path("--out", args.out)
    except ValueError as error:
        parser.error(str(error))
    if wrong := [n for n in args.processes if n < 1 or DEVICES % n]:
        parser.error(f"--processes must be divisors of {DEVICES}, got {wrong[0]}")
    if args.runs < 1 or not 1 <= args.every <= args.steps:
        parser.error("--runs must be at least 1, and --every in 1..steps")
    return args


# Trials


def run_trial(setting: Setting, number: int, seed: int, folder: pathlib.Path, setup: float) -> Outcome:
    """The `number`th trial of a configuration, whose run that was left alone is in `folder / "reference"`."""
    kills = draw(random.Random(f"{seed} {setting.algorithm} {setting.processes} {number}"), setting.processes)
    trial = folder / f"trial-{seed}-{number}"
    try:
        outcome = disturbed(setting, kills, trial, folder / "reference", setup)
    except BaseException:
        shutil.rmtree(trial, ignore_errors=True)
        raise
    if outcome.verdict == EQUAL:
        shutil.rmtree(trial)
        return outcome
    return outcome._replace(verdict=f"{outcome.verdict} ({trial})")


def draw(rng: random.Random, num_processes: int) -> list[Kill]:
    """One to three kills, half of them while a checkpoint is written, and of these some in the very first."""

    def kill() -> Kill:
        moment = rng.choices((SETUP, TRAINING, SAVING), (2, 3, 5))[0]
        return Kill(
            moment,
            place=0.0 if moment == SAVING and rng.random() < 0.2 else rng.uniform(0, 1 if moment == SETUP else 0.9),
            delay=rng.uniform(0, 0.1),
            victim=rng.choice((None, rng.randrange(num_processes))) if num_processes > 1 else None,
            grace=rng.uniform(0, 3),
        )

    return [kill() for _ in range(rng.randint(1, 3))]


def undisturbed(setting: Setting, folder: pathlib.Path) -> float:
    """Train in `folder / "run"` from the first step to the last; the seconds of set-up. Raises `Failed`."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try
    folder.mkdir(parents=True)
    began = time.monotonic()
    with launched(setting, folder / "run", folder / "0.log") as launch:
        while launch.start() is None and launch.is_alive() and time.monotonic() < began + PATIENCE:
            time.sleep(0.05)
        setup = time.monotonic() - began
        launch.wait()
    return setup


def disturbed(
    setting: Setting, kills: Sequence[Kill], folder: pathlib.Path, reference: pathlib.Path, setup: float
) -> Outcome:
    """Train in `folder / "run"`, with these kills, and compare with `reference / "run"`."""
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier try
    folder.mkdir(parents=True)
    crashes: list[Crash] = []
    began = time.monotonic()

    def outcome(verdict: str) -> Outcome:
        return Outcome(crashes, verdict, time.monotonic() - began)

    for i, kill in enumerate([*kills, None]):
        with launched(setting, folder / "run", folder / f"{i}.log") as launch:
            try:
                crash = launch.kill(kill, setup) if kill else launch.wait()
            except Failed as error:
                return outcome(str(error))
        start = launch.start()
        if start is not None:
            crashes[:] = [c._replace(resumed=start) if c.resumed is None else c for c in crashes]
        if crash is None:
            break
        crashes.append(crash._replace(reached=launch.reached()))  # the others may have gone a step further
    try:
        wrong = differences(folder / "run", reference / "run", setting.steps)
    except (checkpoint.Damaged, ValueError, OSError) as error:
        wrong = f"its last checkpoint cannot be read: {error}"
    if wrong:
        return outcome(wrong)
    if not crashes:
        return outcome("it ended before it could be killed")
    if damaged := [log.name for log in folder.glob("*.log") if b"is damaged" in log.read_bytes()]:
        return outcome(f"a checkpoint was damaged, see {damaged[0]}")
    redone = max(crash.redone() for crash in crashes)
    if redone > 2 * setting.every:  # a save waits for the one before: no more than `every` steps while it is written
        return outcome(f"{redone} steps were redone, of two saves or more")
    return outcome(EQUAL)


def differences(workdir: pathlib.Path, reference: pathlib.Path, step: int) -> str:
    """What differs between two runs that have ended, in a few words; empty if nothing does."""
    if step not in checkpoint.steps(workdir):
        return f"there is no checkpoint of step {step}"
    found, wanted = rows_of(workdir), rows_of(reference)
    if len(found) != len(wanted):
        return f"there are {len(found)} rows of metrics, not {len(wanted)}"
    if unequal := [i for i, (row, same) in enumerate(zip(found, wanted, strict=True)) if row != same]:
        return f"{len(unequal)} rows of metrics differ, first row {unequal[0] + 1}"
    record, same = (checkpoint.read_record(path, step) for path in (workdir, reference))
    for name in ("leaves", "workers", "examples", "rollbacks", "best"):
        if record[name] != same[name]:
            return f"{name} in the record of step {step} differ"
    found, wanted = state_of(workdir, step), state_of(reference, step)
    if unequal := [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]:
        return f"{len(unequal)} of {len(wanted)} leaves of the state differ, first {unequal[0]}"
    return ""


def rows_of(workdir: pathlib.Path) -> list[str]:
    """Each row of metrics but for how fast it was, as text: floats that print alike are alike."""
    rows = []
    for line in (workdir / METRICS).read_text().splitlines():
        try:
            row = json.loads(line)
            del row["examples_per_second"]
            rows.append(json.dumps(row))
        except (ValueError, TypeError, KeyError):
            rows.append(f"unreadable: {line}")
    return rows


def state_of(workdir: pathlib.Path, step: int) -> dict[str, tuple[Any, ...]]:
    """Dtype, shape and bytes of every leaf, as orbax reads them here: nothing of `train.py` is asked."""
    handler = ocp.PyTreeCheckpointHandler()
    path = epath.Path((workdir / checkpoint.FOLDER / str(step) / "state").absolute())
    try:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree)
        state = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    finally:
        handler.close()
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(name): (str(x.dtype), x.shape, np.asarray(x).tobytes()) for name, x in leaves}


# What is shown and kept


def folder_of(setting: Setting, root: pathlib.Path) -> pathlib.Path:
    return root / f"{setting.algorithm}-{setting.processes}"


def key_of(setting: Setting, number: int, seed: int) -> tuple[str, ...]:
    """What names a trial in the CSV."""
    *fields, flags = setting
    return (*map(str, fields), " ".join(flags), str(seed), str(number))


KEY = (*Setting._fields, "seed", "trial")


def row_of(key: tuple[str, ...], outcome: Outcome) -> dict[str, str]:
    """A trial in the CSV; what is of each crash, with spaces between."""
    crashes = outcome.crashes
    return {
        **dict(zip(KEY, key, strict=True)),
        "moments": " ".join(crash.moment for crash in crashes),
        "reached": " ".join("-" if crash.reached is None else str(crash.reached) for crash in crashes),
        "resumed": " ".join("-" if crash.resumed is None else str(crash.resumed) for crash in crashes),
        "redone": str(max((crash.redone() for crash in crashes), default=0)),
        "seconds": f"{outcome.seconds:.1f}",
        "code": processes.code_version(),
        "verdict": outcome.verdict,
    }


def read_rows(path: pathlib.Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of earlier trials by what names them."""
    return {tuple(row[name] for name in KEY): row for row in csv_rows.read(path, str)}


def line_of(number: int, row: dict[str, str]) -> str:
    """A trial on the terminal: each kill as its moment, the step reached and the one resumed from."""
    of_crashes = zip(*(row[name].split() for name in ("moments", "reached", "resumed")), strict=True)
    kills = ", ".join(f"{moment} {reached} → {resumed}" for moment, reached, resumed in of_crashes)
    where = f"{row['algorithm']} x {row['processes']}"
    return f"{number:3}  {where:13}  {kills:62}  {row['redone']:>3} redone  {row['seconds']:>5} s  {row['verdict']}"


def summary(rows: Sequence[dict[str, str]]) -> str:
    """A line per configuration, and how many kills fell where."""
    lines = [["configuration", "equal", *MOMENTS, "most redone"]]
    for name in dict.fromkeys((row["algorithm"], row["processes"]) for row in rows):
        of_it = [row for row in rows if (row["algorithm"], row["processes"]) == name]
        moments = " ".join(row["moments"] for row in of_it).split()
        lines.append(
            [
                " x ".join(name),
                f"{sum(row['verdict'] == EQUAL for row in of_it)} of {len(of_it)}",
                *(str(moments.count(moment)) for moment in MOMENTS),
                f"{max(int(row['redone']) for row in of_it)} of at most {2 * int(of_it[0]['every'])}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
