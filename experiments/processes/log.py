"""What a process tells: its own log file, and from the first one the terminal."""

import logging
import os
import pathlib
import sys

import jax

LOG = logging.getLogger("experiments")
LOG.setLevel(logging.INFO)
LOG.propagate = False  # `say` prints what is for the terminal


def is_first() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def log_to(workdir: pathlib.Path) -> None:
    """From here on this process's log is `workdir/logs/process-<index>.log`, for `say` and what libraries log.

    One of many also sends there what native code prints, such as Gloo's connections, and, but for the first, its own
    standard output.
    """
    folder = workdir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"process-{jax.process_index()}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(old)  # of an earlier run in this process
        LOG.removeHandler(old)
        old.close()
    for logger in (LOG, root):
        logger.addHandler(handler)
    if jax.process_count() > 1:
        terminal = os.dup(sys.stdout.fileno())
        with open(path, "a") as log:
            os.dup2(log.fileno(), sys.stdout.fileno())
        if is_first():
            sys.stdout = os.fdopen(terminal, "w", buffering=1)
        else:
            sys.stdout.reconfigure(line_buffering=True)  # pyrefly: ignore  # or SIGKILL would take what it holds back
    say(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices", shown=False)


def say(message: str, *, shown: bool = True) -> None:
    """To the log of each process, and from the first one to the terminal."""
    LOG.info(message)
    if shown and is_first():
        print(message, flush=True)
