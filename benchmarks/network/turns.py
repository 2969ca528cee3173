"""Steps of several programs that alternate on all hosts, and what they took."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from benchmarks.network import hosts


def join(me: int, num_hosts: int) -> None:
    """Make this process JAX's process `me` of so many, on Gloo."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"{hosts.address(0)}:9000", num_hosts, me)


def time_in_turns(steps: Sequence[Callable[[int], Any]], count: int) -> dict[str, list[list[float]]]:
    """Seconds, and bytes of frames that left this host, by program and turn.

    Every step begins after a barrier. What it returns is waited for. Turn −1, which compiles, is not counted.
    """
    seconds, frames = [[] for _ in steps], [[] for _ in steps]
    for t in range(-1, count):
        for i, step in enumerate(steps):
            multihost_utils.sync_global_devices(f"{t} {i}")
            sent, began = hosts.sent_bytes(), time.perf_counter()
            jax.block_until_ready(step(t))
            taken = time.perf_counter() - began
            # Without this barrier a slow host's last messages would be counted in the next step of a fast one.
            multihost_utils.sync_global_devices("all has arrived")
            if t >= 0:
                seconds[i].append(taken)
                frames[i].append(hosts.sent_bytes() - sent)
    return {"seconds": seconds, "frames": frames}


def step_seconds(outputs: Sequence[Mapping[str, Any]], i: int) -> list[float]:
    """Of each turn of program `i`, what its slowest host took."""
    return [max(turn) for turn in zip(*(host["seconds"][i] for host in outputs), strict=True)]


def mean_frames(outputs: Sequence[Mapping[str, Any]], i: int) -> float:
    """Bytes of frames per host and step of program `i`."""
    return statistics.mean(statistics.mean(host["frames"][i]) for host in outputs)
