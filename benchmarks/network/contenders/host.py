"""What one host of a race does: `python -m benchmarks.network.contenders.host JOB --host I`, a job as JSON.

{"kind": "train", "contender": "ddp", "runs": [[seed, learning rate], ...], ...}: the models of every evaluation,
    to a file that all hosts share; and seconds until each
{"kind": "islands", ...}: the same of one run, each host by itself
{"kind": "time", "contenders": ["ddp", ...], "waits": [0.05, ...], ...}: seconds and bytes of their steps
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.network import hosts
from benchmarks.network.contenders import tasks


def main(argv: list[str]) -> None:
    job, me = json.loads(argv[0]), int(argv[2])
    n, task = job["hosts"], tasks.TASKS[job["task"]]._replace(**job.get("changed", {}))
    if job["kind"] == "islands":
        from benchmarks.network.contenders import in_islands

        own = tasks.read(pathlib.Path(job["folder"]), job["task"], "train")
        print(json.dumps(in_islands.train(job, task, me, own)), flush=True)
        return
    if "contender" in job:
        job["contenders"] = [job["contender"]]
    make, barrier = join(job["contenders"], task, n, me)
    examples = tasks.read(pathlib.Path(job["folder"]), job["task"], "train")

    def step(contender: Any, seed: int, t: int, wait: float) -> None:
        if me == job.get("slow_host"):
            wait = wait * job["slowness"]
        contender.step(t, tasks.batch_of(examples, task, seed, t, range(me, me + 1), n), wait)

    run = train if job["kind"] == "train" else time_steps
    print(json.dumps(run(job, task, me, make, barrier, step)), flush=True)
    if tasks.is_peer(job["contenders"][0]):
        os._exit(0)  # PyTorch's groups of two hosts may wait for ever for each other at the end


def join(names: list[str], task: tasks.Task, n: int, me: int) -> tuple[Callable[[str], Any], Callable[[], None]]:
    """What makes a contender, and a barrier of all hosts."""
    if tasks.is_peer(names[0]):
        import torch
        import torch.distributed as dist

        from benchmarks.network.contenders import in_torch

        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"tcp://{hosts.address(0)}:9000", rank=me, world_size=n)
        return lambda text: in_torch.Contender(text, task), dist.barrier
    import jax
    from jax.experimental import multihost_utils

    import crossover_jax as cj
    from benchmarks.network import turns
    from benchmarks.network.contenders import in_jax

    turns.join(me, n)
    mesh = cj.make_mesh(n, devices=[next(d for d in jax.devices() if d.process_index == i) for i in range(n)])
    return lambda text: in_jax.Contender(text, task, n, mesh), lambda: multihost_utils.sync_global_devices("race")


def train(job: dict, task: tasks.Task, me: int, make: Callable, barrier: Callable, step: Callable) -> dict[str, Any]:
    """Seconds until each evaluation, `[runs, evaluations]`, evaluations themselves not counted."""
    contender, evaluations = make(job["contender"]), job["steps"] // task.every
    models = np.lib.format.open_memmap(job["models"], "r+")  # [runs, evaluations, hosts, parameters]
    seconds = []
    for run, (seed, highest) in enumerate(job["runs"]):
        contender.begin(seed, highest)
        if job["wait"]:  # what compiles, or connects, is not counted
            for t in range(job["warmup"]):
                step(contender, seed, t, 0.0)
            contender.finish()
            contender.begin(seed, highest)
        barrier()
        took, began = [], time.perf_counter()
        for t in range(task.every * evaluations):
            step(contender, seed, t, job["wait"])
            if (t + 1) % task.every == 0:
                contender.finish()
                took.append(time.perf_counter() - began)
                models[run, len(took) - 1, me] = contender.vectors()[0]
                began = time.perf_counter() - took[-1]
        seconds.append(took)
        barrier()
    models.flush()
    return {"seconds": seconds}


def time_steps(
    job: dict, task: tasks.Task, me: int, make: Callable, barrier: Callable, step: Callable
) -> dict[str, Any]:
    """Seconds and bytes of frames of a step, `[contenders, waits]`: each the mean of a series without barriers."""
    seconds, frames = [], []
    for text, periods in zip(job["contenders"], job["periods"], strict=True):
        contender = make(text)
        contender.begin(0, 0.0)
        for t in range(max(2, periods[0])):
            step(contender, 0, t, 0.0)
        contender.finish()
        at = max(2, periods[0])
        for found in (seconds, frames):
            found.append([])
        for wait in job["waits"]:
            barrier()
            time.sleep(0.05)  # the barrier's own messages have left
            sent, began = hosts.sent_bytes(), time.perf_counter()
            for t in range(at, at + periods[1]):
                step(contender, 0, t, wait)
            contender.finish()
            seconds[-1].append((time.perf_counter() - began) / periods[1])
            barrier()
            frames[-1].append((hosts.sent_bytes() - sent) / periods[1])
            at += periods[1]
    return {"seconds": seconds, "frames": frames}


if __name__ == "__main__":
    main(sys.argv[1:])
