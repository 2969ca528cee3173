"""Islands without training: values that are only exchanged, in virtual time."""

import asyncio

import numpy as np

from crossover_jax.islands.layout import Layout
from crossover_jax.islands.ledger import Publication
from crossover_jax.islands.node import Node
from crossover_jax.islands.simulated import Network, VirtualTime

SIZE = 16  # values of a segment


def layout(num_segments, fingerprint="same"):
    return Layout(
        "model",
        fingerprint,
        [[(np.dtype(np.float64), SIZE)]] * num_segments,
        lambda k, offered, mine, theirs: (offered[0] + (theirs[0] - mine[0]) / 2,),
        lambda k, bits: np.abs(bits[0]).max(),
    )


class Values:
    """One island's values [segments, SIZE], published once a second; `node` is the code under test."""

    def __init__(self, network, name, values, names, *, period=1.0, incarnation=1, seed=0, **keys):
        self.values, self.period, self.number = values, period, 0
        self.rng = np.random.default_rng([seed, *name.encode()])
        self.node = Node(name, incarnation, layout(len(values)), network.transport(name), seed=seed, **keys)
        self.node.links.members = {other: f"{other}:1" for other in names if other != name}
        self.applied = []  # the segments of each publication
        self.tasks = []

    async def start(self):
        await self.node.transport.serve(self.node.answer)
        self.tasks = [asyncio.create_task(self.node.gossip()), asyncio.create_task(self.live())]
        return self

    def step(self):
        arrived = self.node.ledger.take(self.number + 1)
        for arrival in arrived:
            self.values[arrival.segment] += (arrival.theirs[0] - arrival.mine[0]) / 2
        self.applied.append({arrival.segment for arrival in arrived})
        self.number += 1
        segments = [(row.copy(),) for row in self.values]
        self.node.publish(Publication(self.number, segments, self.node.layout.scale(segments)))

    async def live(self):
        while True:
            await asyncio.sleep(self.period * np.exp(0.2 * self.rng.standard_normal()))
            self.step()

    def stop(self):
        for task in self.tasks:
            task.cancel()

    async def settle(self, seconds=20.0):
        """Publish no more, let what is under way end, and add what has arrived."""
        self.tasks[1].cancel()
        await asyncio.sleep(seconds)
        for arrival in self.node.ledger.take(self.number + 1):
            self.values[arrival.segment] += (arrival.theirs[0] - arrival.mine[0]) / 2


def run(coroutine):
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(coroutine)


async def exchange(n, seconds, *, num_segments=8, network=None, seed=0, periods=None, **keys):
    """`n` islands that exchange for so long; the islands and their first values."""
    network = network or Network(latency=0.02, seed=seed)
    names = [f"i{k:02d}" for k in range(n)]
    first = np.random.default_rng(seed).standard_normal((n, num_segments, SIZE))
    islands = []
    for k, name in enumerate(names):
        period = periods[k] if periods else 1.0
        islands.append(await Values(network, name, first[k].copy(), names, period=period, seed=seed, **keys).start())
    await asyncio.sleep(seconds)
    await asyncio.gather(*(island.settle(20 + 40 * network.latency) for island in islands))
    for island in islands:
        island.stop()
    return islands, first


def stacked(islands):
    return np.stack([island.values for island in islands])
