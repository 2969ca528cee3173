"""Many islands in one process and in virtual time: the islands' own code trains real models, faults come by a script.

A step takes a second of virtual time, five of a slow island; everything is a function of the seed.
"""

import asyncio
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import crossover_jax as cj
from crossover_jax import islands
from crossover_jax.islands.simulated import Network, SimulatedIsland, VirtualTime
from experiments.islands.program import IslandProgram
from experiments.step import TrainState

PyTree = Any


class Event(NamedTuple):
    """What happens to an island (or, of a partition, to a set of them) at a part of the run, for so many seconds."""

    at: float  # of all examples, from 0 to 1
    kind: str  # "kill", "stop", "slow", "cut", "loss"
    who: Sequence[int]
    seconds: float = 20.0
    size: float = 5.0  # times slower


class World(NamedTuple):
    """Links and speeds."""

    latency: float = 0.05  # seconds, of which a step takes one
    jitter: float = 0.1  # of the logarithm of a step's time
    loss: float = 0.0  # of messages
    events: Sequence[Event] = ()


def train(made: IslandProgram, world: World, seed: int) -> dict[str, float]:
    """Train to the end; metrics of the mean of all islands' parameters, and how they got there."""
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(_Run(made, world, seed, folder).run())


def distances(state: TrainState) -> dict[str, float]:
    """How far the workers of a state `[workers, ...]` are apart, in parameters and in Adam's moments, if it has them.

    Of moments it is the distance as a part of their mean's norm.
    """
    row = {"consensus_distance": float(cj.consensus_distance(state.params))}
    for name, field in (("first_moments", "mu"), ("second_moments", "nu")):
        if (found := optax.tree.get(state.algorithm, field)) is not None:
            norm = optax.tree.norm(jax.tree.map(lambda x: jnp.mean(x, 0), found))
            row[name] = float(cj.consensus_distance(found) / norm)
    return row


class _Run:
    def __init__(self, made: IslandProgram, world: World, seed: int, folder: str):
        self.made, self.world, self.seed, self.folder = made, world, seed, folder
        self.network = Network(latency=world.latency, loss=world.loss, timeout=5.0, seed=seed)
        self.slowness = np.ones(made.config.num_workers)
        self.states: dict[int, TrainState] = {}
        self.islands: dict[int, SimulatedIsland] = {}
        self.lives: dict[int, asyncio.Task] = {}
        self.clock, self.exchanged, self.due, self.delivered = 0.0, 0, 0, 0.0
        self.steps: list[int] = []

    async def run(self) -> dict[str, float]:
        count = self.made.config.num_workers
        for i in range(count):
            self.begin(i)
        faults = [asyncio.create_task(self.fault(event)) for event in self.world.events]
        while any(not task.done() for task in self.lives.values()):
            await asyncio.wait([task for task in self.lives.values() if not task.done()])
        for task in faults:
            task.cancel()
        for task in self.lives.values():
            task.result()
        mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *(s.params for s in self.states.values()))
        first = next(iter(self.states.values()))
        row = self.made.evaluate(0, first._replace(params=mean))
        stacked = jax.tree.map(lambda *x: np.concatenate(x), *self.states.values())
        row |= distances(stacked)
        row["participation"] = self.exchanged / max(self.due, 1)
        row["seconds"] = asyncio.get_running_loop().time()
        row["delivered"] = self.clock
        return row

    def begin(self, i: int) -> None:
        self.network.dead.discard(f"i{i}")
        self.lives[i] = asyncio.create_task(self.life(i))

    async def life(self, i: int) -> None:
        made = self.made
        state = made.init()
        roster = islands.directory(self.folder, now=asyncio.get_running_loop().time)
        island = SimulatedIsland(
            self.network, roster, f"i{i}", like=state.params, seed=self.seed, patience=60.0, **made.exchange
        )
        self.islands[i] = island
        rng = np.random.default_rng([self.seed, i])
        state = await island.joined(state)
        batches, own_step = made.batches(island.life, island.clock), 0
        while island.clock < made.total:
            state, _ = made.step(state, next(batches), own_step, made.rate(island.clock))
            own_step += 1
            await asyncio.sleep(self.slowness[i] * np.exp(self.world.jitter * rng.standard_normal()))
            while f"i{i}" in self.network.stopped:
                await asyncio.sleep(0.5)
            try:
                state = state._replace(params=island.exchange(state.params, state, delivered=float(made.examples)))
            except islands.LongAway:
                state = await island.joined(state)
            self.states[i] = state
            self.clock = max(self.clock, island.clock)
        self.count(island)
        await island.left()

    def count(self, island: SimulatedIsland) -> None:
        status = island.status()
        self.exchanged, self.due = self.exchanged + status["exchanged"], self.due + status["due"]

    async def fault(self, event: Event) -> None:
        while self.clock < event.at * self.made.total:
            await asyncio.sleep(0.5)
        names = {f"i{i}" for i in event.who}
        if event.kind == "kill":
            for i in event.who:
                self.network.dead.add(f"i{i}")
                self.count(self.islands[i])
                self.islands[i].kill()
                self.lives[i].cancel()
                self.states.pop(i, None)
            await asyncio.sleep(event.seconds)
            for i in event.who:
                self.begin(i)
        elif event.kind == "stop":
            self.network.stopped |= names
            await asyncio.sleep(event.seconds)
            self.network.stopped -= names
        elif event.kind == "slow":
            self.slowness[list(event.who)] *= event.size
        elif event.kind == "cut":
            everyone = {f"i{i}" for i in range(self.made.config.num_workers)}
            self.network.parts = [names, everyone - names]
            await asyncio.sleep(event.seconds)
            self.network.parts = []
        elif event.kind == "loss":
            before, self.network.loss = self.network.loss, event.size
            await asyncio.sleep(event.seconds)
            self.network.loss = before
