"""Kill training at random moments, resume it, and compare its end bit for bit with a run that was never stopped.

    python experiments/crash_test.py --runs 50 --processes 1,2 --algorithms crossover,sgp,allreduce --out crash.csv

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
import csv
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

if not __package__:  # as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from experiments import checkpoint, processes
from experiments.launch import local
from experiments.workdir import METRICS

DEVICES = 8  # of all processes together, one worker on each
FLAGS = (
    f"--config.num_workers={DEVICES}",
    "--config.log_every=1",  # the rows tell how far a run has come
    "--config.batch_size=64",
    "--config.eval_batch_size=512",
    "--config.dataset.train_split=train[:6400]",  # epochs of 100 steps
    "--config.dataset.eval_split=test[:512]",
    "--config.model.name=mlp",
    "--config.model.options={'hidden': (32,)}",
)
SETUP, TRAINING, SAVING, ENDING = MOMENTS = ("set-up", "training", "saving", "ending")
EQUAL = "bitwise equal"
POLL = 0.002  # seconds; a save takes some fifty times as long
PATIENCE = 600  # seconds for a run to its end
STARTED = re.compile(rb"set up in \d+ s; training \d+ steps(?: behind step (\d+))?\n")  # as train.py says it
UNFINISHED = re.compile(r"(\d+)\.orbax-checkpoint-tmp.*")


class Setting(NamedTuple):
    """What a run is started with."""

    algorithm: str
    processes: int
    steps: int
    every: int  # steps between two checkpoints
    flags: tuple[str, ...] = ()


class Kill(NamedTuple):
    """When a run is to be killed, and which of its processes."""

    moment: str
    place: float  # in [0, 1): of the seconds of set-up, or of the steps that are left
    delay: float  # seconds behind that step, or behind the beginning of the save
    victim: int | None = None  # None: all at once
    grace: float = 0.0  # seconds that the others have


class Crash(NamedTuple):
    """How a run was killed, and what became of it."""

    moment: str
    reached: int | None  # the last step with a row; None: it had not begun to train
    resumed: int | None = None  # the step that the next run went on from

    def redone(self) -> int:
        return 0 if self.reached is None or self.resumed is None else max(0, self.reached - self.resumed)


class Outcome(NamedTuple):
    """`verdict` is `EQUAL`, or what is wrong."""

    crashes: list[Crash]
    verdict: str
    seconds: float


class Failed(Exception):
    """A run did not end as it must."""


def main(argv: Sequence[str]) -> int:
    """Run what is missing in `--out`; the exit code."""
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, through every `finally`
    root = pathlib.Path(args.workdir or tempfile.mkdtemp(prefix="crash-test-"))
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
                    append(args.out, kept[key])
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
    parser.add_argument("--out", type=pathlib.Path, help="CSV, a row for each trial")
    parser.add_argument("train_flags", nargs="*", metavar="-- train.py's flags")
    args = parser.parse_args(argv)
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


# Runs


class Launch:
    """The processes of a run, and what it has done so far as its folder shows it."""

    def __init__(self, setting: Setting, workdir: pathlib.Path, output: pathlib.Path):
        self._setting, self._workdir, self._output = setting, workdir, output
        self._start: int | None = None
        self._metrics_before = self._metrics_file()
        self._stale = self._unfinished()  # saves that the run before it did not end
        self._processes: list[subprocess.Popen] = []

    def begin(self) -> None:
        num_processes, port = self._setting.processes, local.free_port()
        # With a compilation cache a resumed run would not compile its own step, which has to give the same bits.
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES // num_processes)}
        flags = [
            *FLAGS,
            f"--config.algorithm={self._setting.algorithm}",
            f"--config.steps={self._setting.steps}",
            f"--config.checkpoint.every={self._setting.every}",
            *self._setting.flags,
            f"--workdir={self._workdir}",
        ]
        with open(self._output, "wb") as output:
            for i in range(num_processes):
                alone = [sys.executable, str(local.TRAIN), *flags]
                line = local.command(flags, port, num_processes, i) if num_processes > 1 else alone
                self._processes.append(
                    subprocess.Popen(
                        local.dying_with_us(line), env=environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )

    def end(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def is_alive(self) -> bool:
        return all(process.poll() is None for process in self._processes)

    def wait(self) -> None:
        """Wait for the run to end by itself. Raises `Failed` unless it ends well."""
        deadline = time.monotonic() + PATIENCE
        while None in (codes := [process.poll() for process in self._processes]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if any(codes):
            text = self._output.read_text(errors="replace").replace("\r", "\n").strip()
            raise Failed(f"process {[bool(code) for code in codes].index(True)} ended by itself: {text[-300:]!r}")
        if None in codes:
            raise Failed(f"it did not end within {PATIENCE} s")

    def kill(self, kill: Kill, setup: float) -> Crash | None:
        """Kill it at its moment, of which `setup` is the seconds of set-up; None if it ends before. Raises `Failed`."""
        began, delay = time.monotonic(), kill.delay
        while self.is_alive() and time.monotonic() < began + PATIENCE:
            if not self._is_time(kill, time.monotonic() - began, setup):
                time.sleep(POLL)
                continue
            time.sleep(delay)
            with self._frozen():  # so that what is seen is what it dies of
                crash = Crash(self._moment(), self.reached())
                if kill.moment != SAVING or crash.moment == SAVING:
                    victims = self._processes if kill.victim is None else [self._processes[kill.victim]]
                    for process in victims:
                        process.kill()
                    for process in victims:
                        process.wait()
                    break
            delay /= 2  # the save was over
        else:
            self.wait()
            return None
        deadline = time.monotonic() + kill.grace
        while None in [process.poll() for process in self._processes] and time.monotonic() < deadline:
            time.sleep(POLL)
        self.end()
        return crash

    def start(self) -> int | None:
        """The step that it went on from; None before it has been set up."""
        if self._start is None and (found := STARTED.search(self._output.read_bytes())):
            self._start = int(found[1] or 0)
        return self._start

    def reached(self) -> int | None:
        """The last step of which there is a row; None before it has been set up."""
        start = self.start()
        if start is None or self._metrics_file() == self._metrics_before:  # the rows of the run before it
            return start
        with open(self._workdir / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().splitlines()
        for line in reversed(lines):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                return json.loads(line)["step"]
        return start

    def _saving(self) -> int | None:
        """The step of which a checkpoint is being written."""
        now = self._unfinished()
        self._stale &= now
        return max((step for step, _ in now - self._stale), default=None)

    def _moment(self) -> str:
        if self.start() is None:
            return SETUP
        if self._saving() is not None:
            return SAVING
        return ENDING if self.reached() == self._setting.steps else TRAINING

    def _is_time(self, kill: Kill, seconds: float, setup: float) -> bool:
        start, reached = self.start(), self.reached()
        if kill.moment == SETUP:
            return seconds >= kill.place * setup or start is not None
        if start is None or reached is None:
            return False
        target = start + kill.place * (self._setting.steps - start)
        if kill.moment == TRAINING:
            return reached >= target
        step = self._saving()
        return step is not None and step >= target

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """No process of it does anything; those that are not killed go on afterwards."""
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)
        for process in self._processes:
            with contextlib.suppress(ChildProcessError):  # it has ended
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
        for process in self._processes:
            process.send_signal(signal.SIGCONT)

    def _metrics_file(self) -> int | None:
        """Which file it is: a run that has been set up makes a new one."""
        try:
            return (self._workdir / METRICS).stat().st_ino
        except FileNotFoundError:
            return None

    def _unfinished(self) -> set[tuple[int, int]]:
        """Steps and inodes of the checkpoints that have no name yet."""
        found = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(self._workdir / checkpoint.FOLDER) as entries:
            for entry in entries:
                if match := UNFINISHED.fullmatch(entry.name):
                    found.add((int(match[1]), entry.inode()))
        return found


@contextlib.contextmanager
def launched(setting: Setting, workdir: pathlib.Path, output: pathlib.Path) -> Iterator[Launch]:
    """A run of `train.py`, of which nothing is left behind the block."""
    launch = Launch(setting, workdir, output)
    try:
        launch.begin()
        yield launch
    finally:
        launch.end()


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
    """The rows of earlier trials; one that was not written to its end is none."""
    if not path.exists():
        return {}
    with open(path, newline="") as file:
        return {tuple(row[name] for name in KEY): row for row in csv.DictReader(file) if row.get("verdict")}


def append(path: pathlib.Path, row: dict[str, str]) -> None:
    """Add a row to the CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


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
