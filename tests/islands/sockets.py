"""Islands without training on real sockets: values that are exchanged over loopback, in one event loop."""

import asyncio
import contextlib
import gc
import logging
import time

import numpy as np

from crossover_jax.islands.layout import Layout
from crossover_jax.islands.ledger import Publication
from crossover_jax.islands.node import Node
from crossover_jax.islands.transport import Tcp, Tls

SEGMENTS, SIZE = 8, 16


def layout(model="model", fingerprint="same"):
    return Layout(
        model,
        fingerprint,
        [[(np.dtype(np.float64), SIZE)]] * SEGMENTS,
        lambda k, offered, mine, theirs: (offered[0] + (theirs[0] - mine[0]) / 2,),
        lambda k, bits: float(np.abs(bits[0]).max()),
    )


class Peer:
    """One island's values [segments, size] on a real socket; `node` and `tcp` are the code under test."""

    def __init__(self, name, *, keys=None, incarnation=1, timeout=5.0, layout=None, tls=None, patience=30.0):
        tls = tls or (Tls.of(str(keys), name) if keys else None)
        self.name, self.tcp = name, Tcp("127.0.0.1:0", tls=tls, timeout=timeout)
        self.node = Node(name, incarnation, layout or globals()["layout"](), self.tcp, patience=patience)
        self.values = np.random.default_rng([*name.encode()]).standard_normal((SEGMENTS, SIZE))
        self.number, self.tasks = 0, []

    async def start(self):
        self.address = await self.tcp.serve(self.node.answer)
        self.step()
        return self

    def meets(self, *peers):
        self.node.links.members = {peer.name: peer.address for peer in peers}

    def step(self):
        self.number += 1
        arrived = self.node.ledger.take(self.number)
        for arrival in arrived:
            self.values[arrival.segment] += (arrival.theirs[0] - arrival.mine[0]) / 2
        segments = [(row.copy(),) for row in self.values]
        self.node.publish(Publication(self.number, segments, self.node.layout.scale(segments)))
        return len(arrived)

    async def live(self, period=0.02):
        while True:
            self.step()
            await asyncio.sleep(period)

    def begin(self):
        self.tasks += [asyncio.create_task(c) for c in (self.node.gossip(), self.live())]

    async def stop(self):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await until(lambda: not self.node.ledger._reserved)
        await self.tcp.close()


@contextlib.asynccontextmanager
async def pair(**keys):
    """Two islands, a and b, that exchange with each other and notice nothing of what happens meanwhile."""
    a, b = [await Peer(name, **keys).start() for name in "ab"]
    a.meets(b), b.meets(a)
    total = a.values + b.values
    a.begin(), b.begin()
    try:
        await exchanges(a, b)
        yield a, b
        await exchanges(a, b)
        assert "b" not in a.node.links.errors
        assert "a" not in b.node.links.errors
    finally:
        for peer in (a, b):
            for task in peer.tasks:
                task.cancel()
        await until(lambda: not a.node.ledger._reserved and not b.node.ledger._reserved)
        await a.stop(), await b.stop()
    a.step(), b.step()
    np.testing.assert_allclose(a.values + b.values, total, rtol=0, atol=1e-12)


async def exchanges(a, b, number=8):
    """Wait until two islands have exchanged so many segments from now on."""
    before = a.node.exchanged, b.node.exchanged
    await until(lambda: a.node.exchanged >= before[0] + number and b.node.exchanged >= before[1] + number)


async def until(holds, seconds=30.0):
    """Wait until something holds, or fail."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.005)


class Faults(logging.Handler):
    """What went wrong in an event loop without anybody who heard of it."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.found = []

    def emit(self, record):
        self.found.append(self.format(record))


def run(coroutine, seconds=60.0):
    """Run a test in an event loop in which no exception may be left over."""
    faults = Faults()

    async def watched():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: faults.found.append(str(context)))
        async with asyncio.timeout(seconds):
            found = await coroutine
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        await until(lambda: all(task.done() for task in rest))
        await asyncio.sleep(0.01)  # a transport is closed a little later than it is ended
        return found

    loggers = [logging.getLogger(name) for name in ("asyncio", "crossover_jax.islands")]
    for logger in loggers:
        logger.addHandler(faults)
    try:
        found = asyncio.run(watched())
        gc.collect(1)  # an exception that nobody took is told when its task goes
    finally:
        for logger in loggers:
            logger.removeHandler(faults)
    if faults.found:
        raise AssertionError("\n".join(faults.found))
    return found
