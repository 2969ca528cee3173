"""Many processes: how they find each other, agree before the first step, and end together."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

PyTree = Any
LOG = logging.getLogger("experiments")
LOG.setLevel(logging.INFO)
LOG.propagate = False  # `say` prints what is for the terminal
REPORT_BYTES = 16384  # of each process, gathered once: all must send equally many
SOURCES = [pathlib.Path(__file__).resolve().parents[1] / part for part in ("crossover_jax", "experiments")]


PREEMPTED = 75  # exit code, EX_TEMPFAIL: start the same command again


class Disagreement(Exception):
    """The processes of a run were not started alike, or one of them failed before the first step."""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    distributed: str = "auto",
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Make this process one of many, before the first use of JAX; does nothing for a process that is alone.

    By hand: all of `coordinator` ("host:port", where process 0 listens), `num_processes` and `process_id`. Otherwise
    `distributed` decides: "yes" leaves it to `jax.distributed` to find the cluster (TPU pods, Slurm, Open MPI,
    Kubernetes); "auto" does so where Slurm or Open MPI have started more than one task; "no" never.

    Whoever sends no heartbeat for `heartbeat_timeout` seconds is taken for dead and all others end with an error;
    `initialization_timeout` is how long, in seconds, to wait for all to come. Raises `ValueError` for two of three
    flags, for a process that is not among the `num_processes`, and if JAX cannot join the others.
    """
    by_hand = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in by_hand.items() if value is None]
    if missing and len(missing) < len(by_hand):
        raise ValueError(f"{', '.join(by_hand)} must be given together, got no {' and no '.join(missing)}.")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id must be in 0..{num_processes - 1}, got {process_id}.")
    if distributed == "no" or (missing and distributed == "auto" and not was_launched()):
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU devices; others have their own
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if missing else "deactivate",  # Slurm's would leave one GPU to each process
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:  # JAX knows Open MPI 4 only, or Open MPI 5 with mpi4py
        hint = f"; pass {', '.join(by_hand)} yourself" if missing else ""
        raise ValueError(f"cannot join the other processes: {error}{hint}") from error


def was_launched() -> bool:
    """Whether Slurm or Open MPI say that this is one of several tasks."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    return int(tasks) > 1


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
    say(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} devices", shown=False)


def say(message: str, *, shown: bool = True) -> None:
    """To the log of each process, and from the first one to the terminal."""
    LOG.info(message)
    if shown and is_first():
        print(message, flush=True)


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


class Preemption:
    """While it is entered, SIGTERM asks all processes to end at one step boundary; a second one ends at once.

    Of many processes JAX's coordination service takes the signal, from the first one on, and agrees on the step: there
    a second signal ends at once only after that.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> "Preemption":
        self._is_main = threading.current_thread() is threading.main_thread()
        self._before = signal.getsignal(signal.SIGTERM)
        if self._is_main and jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main and jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether the run is to end after `step`; True on all processes for the same one."""
        if jax.process_count() > 1 and not self._asked and multihost_utils.reached_preemption_sync_point(step):
            self._asked = True
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._asked

    def _ask(self, *_: object) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def digest(*parts: bytes | np.ndarray) -> str:
    """Twelve characters that stand for the bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return found.hexdigest()[:12]


def code_version() -> str:
    """A digest of the sources of the library and of the experiments."""
    files = sorted(path for source in SOURCES for path in source.rglob("*.py"))
    return digest(*(part for path in files for part in (path.name.encode(), path.read_bytes())))


def place(tree: PyTree, sharding: Sharding) -> PyTree:
    """Numpy values that every process has alike, as global arrays: each device takes its part, nothing is sent.

    (`jax.device_put` would compare the processes' values first, and wait for the slowest.)
    """

    def put(x):
        return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])

    with jax.transfer_guard_host_to_device("allow"):  # these are asked for
        return jax.tree.map(put, tree)


def fetch(tree: PyTree) -> PyTree:
    """Global arrays as numpy arrays, whole on every process; all processes must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def leave(code: int | str) -> NoReturn:
    """`sys.exit`. One of many ends at once: a regular exit waits for the others, who may wait for it."""
    if jax.process_count() == 1:
        sys.exit(code)
    if isinstance(code, str):
        LOG.error(code)
        print(f"process {jax.process_index()}: {code}", file=sys.stderr)
        code = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
