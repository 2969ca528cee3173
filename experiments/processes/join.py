"""How a process becomes one of many, and how it leaves the others."""

import logging
import os
import sys
from typing import NoReturn

import jax

from experiments.processes.log import LOG


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
