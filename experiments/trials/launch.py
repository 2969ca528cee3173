"""A run of `train.py` that is watched, and killed at a moment that is chosen."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments import checkpoint
from experiments.launch import local
from experiments.workdir import STATUS

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
POLL = 0.002  # seconds; a save takes some fifty times as long
PATIENCE = 600  # seconds for a run to its end
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


class Failed(Exception):
    """A run did not end as it must."""


class Launch:
    """The processes of a run, and what it has done so far as its folder shows it."""

    def __init__(self, setting: Setting, workdir: pathlib.Path, output: pathlib.Path):
        self._setting, self._workdir, self._output = setting, workdir, output
        self._before = self._read_status()
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
        status = self._status()
        return None if status is None else status["start"]

    def reached(self) -> int | None:
        """The last step of which there is a row; None before it has been set up."""
        status = self._status()
        return None if status is None else status["step"]

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

    def _status(self) -> dict[str, Any] | None:
        """What the run tells of itself; None as long as the run before it has told it."""
        found = self._read_status()
        return None if found == self._before else found

    def _read_status(self) -> dict[str, Any] | None:
        try:
            return json.loads((self._workdir / STATUS).read_text())
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
