"""Islands in a race: each host trains by itself and exchanges in the background; the run's clock says where it is.

    islands/H       offers what it has after each H steps, in int8, for up to three exchanges of each segment

`python -m benchmarks.network.contenders.host` runs this for a job of the kind "islands": the models of every
evaluation, as of a run that trains, and seconds until each.
"""

import functools
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import crossover_jax as cj
from benchmarks.network import hosts
from benchmarks.network.contenders import in_jax, tasks
from crossover_jax import islands

PORT = 7000
WARMUP = 8  # steps with a learning rate of zero, in which all compile and meet


def train(job: dict, task: tasks.Task, me: int, examples: tasks.Examples) -> dict[str, Any]:
    """Until all islands together have seen the run's examples; evaluations are at the clock's multiples."""
    n, (seed, highest), folder = job["hosts"], job["runs"][0], pathlib.Path(job["models"]).parent
    roster = islands.static({f"island-{i}": f"{hosts.address(i)}:{PORT}" for i in range(n)})
    state = _first_state(task, seed)
    island = islands.Island(
        roster,
        f"island-{me}",
        like=state[0],
        cut=cj.by_rows(in_jax.SEGMENTS),
        wire="int8",
        every=int(job["contender"].split("/")[1]),
        rounds=3,
        bind=f"{hosts.address(me)}:{PORT}",
        timeout=30.0,
        tls=None,
    )
    update = jax.jit(functools.partial(_update, task=task), donate_argnums=0)
    wait = job["wait"] * (job["slowness"] if me == job.get("slow_host") else 1.0)

    def step(state: Any, t: int, rate: float, delivered: int) -> Any:
        jax.block_until_ready(state)  # a gradient needs the parameters
        time.sleep(wait)
        batch = tasks.batch_of(examples, task, seed, t, range(me, me + 1), n)
        params, opt_state = update(state, tuple(x[0] for x in batch), np.float32(rate))
        return island.exchange(params, (params, opt_state), delivered=delivered), opt_state

    state = island.join(state, found=me == 0)
    for t in range(WARMUP):
        state = step(state, t, 0.0, 0)
    _barrier(folder, "ready", me, n)
    state = _first_state(task, seed)
    models = np.lib.format.open_memmap(job["models"], "r+")  # [1, evaluations, hosts, parameters]
    t, took, began, each = 0, [], time.perf_counter(), task.batch // n
    while len(took) < models.shape[1]:
        state = step(state, t, tasks.rate_at(int(island.clock) // task.batch, task, highest), each)
        t += 1
        while len(took) < models.shape[1] and island.clock >= (len(took) + 1) * task.every * task.batch:
            took.append(time.perf_counter() - began)
            models[0, len(took) - 1, me] = tasks.as_vector(state[0], task)
            began = time.perf_counter() - took[-1]
    _barrier(folder, "done", me, n)
    island.leave()
    models.flush()
    return {"seconds": [took]}


def _first_state(task: tasks.Task, seed: int) -> tuple[in_jax.Params, optax.OptState]:
    params = jax.tree.map(jnp.asarray, tasks.first_values(task, seed))
    return params, in_jax.make_optimizer(task, jnp.float32(0)).init(params)


def _update(state: Any, batch: Any, rate: jax.Array, *, task: tasks.Task) -> Any:
    params, opt_state = state
    updates, opt_state = in_jax.make_optimizer(task, rate).update(
        in_jax.gradients(params, batch, task), opt_state, params
    )
    return optax.apply_updates(params, updates), opt_state


def _barrier(folder: pathlib.Path, name: str, me: int, n: int) -> None:
    """Of hosts that share a folder."""
    (folder / f"{name}-{me}").touch()
    while len(list(folder.glob(f"{name}-*"))) < n:
        time.sleep(0.01)
