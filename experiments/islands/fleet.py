"""Islands on one machine as processes that are started, hit and started again, one by one."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.checkpoint import FOLDER
from experiments.launch import local
from experiments.workdir import METRICS

LOOK = 0.02  # seconds between two looks at who lives
BEGIN_S = 900.0  # seconds that islands have to begin: a busy machine may need minutes to start them


class NotBegun(RuntimeError):
    """An island has ended before it did what was waited for, or takes too long."""


class Life(NamedTuple):
    """A process of an island, from its start to its end, in seconds since the epoch."""

    name: str
    began: float
    ended: float | None = None
    code: int | None = None


class Fleet:
    """Islands, and what they write below `folder`.

        NAME/               an island's workdir
        control/NAME/       of hooks.py
        steps/NAME          a line of each step, from all its lives
        logs/NAME           what it printed

    `inside` is what stands before an island's command, and `address` where it is bound, where the laboratory gives
    each a network of its own.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        flags: Sequence[str],
        environment: Mapping[str, str],
        *,
        islands: int,
        inside: Callable[[str], Sequence[str]] = lambda name: (),
        address: Callable[[str], str] = lambda name: "127.0.0.1:0",
    ):
        self.folder, self.flags, self.environment, self.islands = folder, list(flags), dict(environment), islands
        self.inside, self.address = inside, address
        self.lives: list[Life] = []
        self._processes: list[subprocess.Popen] = []  # of each life
        self._lock, self._over = threading.Lock(), threading.Event()
        for part in ("steps", "logs"):
            (folder / part).mkdir(parents=True)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def start(self, name: str) -> float:
        """Start an island's process; when that was.

        To be called by the main thread only: Linux ends the process with the thread that started it.
        """
        self.control(name).mkdir(parents=True, exist_ok=True)
        flags = [f"--workdir={self.folder}", f"--bind={self.address(name)}", f"--step_log={self.steps(name)}"]
        python, _, *line = local.island_command([*flags, *self.flags], name, self.islands)
        command = [*self.inside(name), python, "-m", "experiments.islands.hooks", str(self.control(name)), *line]
        with open(self.folder / "logs" / name, "ab") as log, self._lock:
            began = time.time()
            process = subprocess.Popen(
                local.dying_with_us(command),
                env=self.environment,
                cwd=local.TRAIN.parents[1],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            self._processes.append(process)
            self.lives.append(Life(name, began))
        return began

    def steps(self, name: str) -> pathlib.Path:
        return self.folder / "steps" / name

    def control(self, name: str) -> pathlib.Path:
        return self.folder / "control" / name

    def names(self) -> list[str]:
        """Of all that have been started."""
        with self._lock:
            return list(dict.fromkeys(life.name for life in self.lives))

    def alive(self) -> list[str]:
        return [name for name in self.names() if self._process(name).poll() is None]

    def _process(self, name: str) -> subprocess.Popen:
        """Of an island's last life."""
        with self._lock:
            return next(
                p for p, life in zip(reversed(self._processes), reversed(self.lives), strict=True) if life.name == name
            )

    def wait_until(self, condition: Callable[[], bool], names: Sequence[str]) -> None:
        """Wait for what these islands do at their beginning. Raises `NotBegun`."""
        until = time.monotonic() + BEGIN_S
        while not condition():
            ended = [name for name in names if name not in self.alive()]
            if ended or time.monotonic() > until:
                who = f"island {ended[0]}" if ended else "an island"
                raise NotBegun(f"{who} has not begun: see {self.folder / 'logs'}.")
            time.sleep(0.2)

    # Hits

    def send(self, name: str, number: signal.Signals) -> float:
        """Send a signal now, whatever the island is doing; when that was."""
        at = time.time()
        self._process(name).send_signal(number)
        return at

    def aim(self, name: str, window: str, number: signal.Signals) -> None:
        """Have the island hit itself when it is next in a window; `hit` knows when it was."""
        control = self.control(name)
        control.mkdir(parents=True, exist_ok=True)
        (control / "hit").unlink(missing_ok=True)
        (control / "aim.new").write_text(f"{window} {int(number)}")
        (control / "aim.new").rename(control / "aim")

    def hit(self, name: str, seconds: float) -> float | None:
        """When the island hit itself, which is waited for; None if it did not, and then the aim is taken back."""
        control, until = self.control(name), time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(OSError, ValueError):
                return float((control / "hit").read_text())
            time.sleep(LOOK)
        (control / "aim").unlink(missing_ok=True)
        return None

    def slow_down(self, name: str, pace_ms: float) -> float:
        """Let each step take at least so long from now on, in all lives; when that was."""
        (self.control(name) / "pace.new").write_text(str(pace_ms))
        (self.control(name) / "pace.new").rename(self.control(name) / "pace")
        return time.time()

    def wait_for_end(self, name: str, seconds: float = 60.0) -> None:
        """Raises `subprocess.TimeoutExpired`."""
        self._process(name).wait(seconds)

    # What an island comes back with

    def keep(self, name: str) -> None:
        """Copy the newest checkpoint of now, to come back with later."""
        steps = [int(path.name) for path in (self.folder / name / FOLDER).glob("*") if path.name.isdigit()]
        if steps:
            newest = str(max(steps))
            shutil.copytree(self.folder / name / FOLDER / newest, self._kept(name) / newest, dirs_exist_ok=True)

    def make_old(self, name: str) -> None:
        """Put the checkpoint that was kept in the place of later ones."""
        if self._kept(name).exists():
            shutil.rmtree(self.folder / name / FOLDER, ignore_errors=True)
            shutil.copytree(self._kept(name), self.folder / name / FOLDER)

    def make_empty(self, name: str) -> None:
        """Take an island's folder away, as a new machine has none; its metrics stay in the logs."""
        with contextlib.suppress(OSError):
            (self.folder / name / METRICS).rename(self.folder / "logs" / f"{name}-{time.time():.0f}-{METRICS}")
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _kept(self, name: str) -> pathlib.Path:
        return self.folder / "kept" / name

    # The end

    def end(self, grace: float = 60.0) -> dict[str, int | None]:
        """Ask all to end, as SIGTERM does; the return codes of those that were alive."""
        alive, until = self.alive(), time.monotonic() + grace
        for name in alive:
            self._process(name).send_signal(signal.SIGCONT)
            self._process(name).terminate()
        for name in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process(name).wait(max(0.1, until - time.monotonic()))
        return {name: self._process(name).poll() for name in alive}

    def close(self) -> None:
        """Leave no process behind."""
        for process in self._processes:
            process.kill()
            process.wait()
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        """Note when each life ended."""
        is_over = False
        while not is_over:
            is_over = self._over.is_set()
            with self._lock:
                for i, (life, process) in enumerate(zip(self.lives, self._processes, strict=True)):
                    if life.code is None and (code := process.poll()) is not None:
                        self.lives[i] = life._replace(ended=time.time(), code=code)
            time.sleep(LOOK)


def environment(folder: pathlib.Path) -> dict[str, str]:
    """Of islands: what one of them has compiled the others find, and its own next life, in `folder`."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "jax-cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
