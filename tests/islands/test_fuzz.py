"""Recorded conversations, damaged at random: whatever comes, an island goes on exchanging, and keeps the sum."""

import asyncio
import contextlib
import itertools

import numpy as np
import pytest

from crossover_jax.islands.transport import split_address
from tests.islands.sockets import SEGMENTS, Peer, exchanges, run, until

CASES, AT_ONCE = 400, 16
FIRST = 100_000  # so that the numbers of all exchanges have as many digits


class Wire:
    """A way to a peer that keeps the bytes of both directions, or that says other bytes than the peer."""

    def __init__(self, peer, answers=None):
        self.target, self.answers = split_address(peer.address), answers
        self.said, self.answered = b"", b""

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.on_connection, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def on_connection(self, reader, writer):
        try:
            if self.answers is not None:
                writer.write(next(self.answers))
                writer.write_eof()
                await asyncio.wait_for(reader.read(), 5)
                return
            there = await asyncio.open_connection(*self.target)
            await asyncio.gather(self.pass_on(reader, there[1], "said"), self.pass_on(there[0], writer, "answered"))
            there[1].transport.abort()
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    async def pass_on(self, reader, writer, kept):
        while data := await reader.read(1 << 16):
            setattr(self, kept, getattr(self, kept) + data)
            writer.write(data)
        with contextlib.suppress(OSError):
            writer.write_eof()


async def record(a):
    """The bytes that an asker named h says to a, and the bytes that it is answered, of an exchange that took place."""
    h = await Peer("h").start()
    h.node._ids = itertools.count(FIRST)
    async with Wire(a) as wire:
        h.node.links.members = {"a": wire.address}
        assert await h.node.exchange(0, "a")
    await h.stop()
    assert f"h@1:{FIRST}".encode() in wire.said
    return wire.said, wire.answered


def damaged(data, rng):
    """One to three damages: bits flipped, bytes cut out, said twice, put in, exchanged, or the end missing."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at, size = int(rng.integers(len(data))), int(rng.integers(1, 40))
        match rng.integers(6):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = data[at : at + size]
            case 3:
                data[at:at] = rng.bytes(size)
            case 4:
                other = int(rng.integers(len(data)))
                data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
            case 5:
                del data[at:]
        data = data or bytearray(b"\0")
    return bytes(data)


@contextlib.asynccontextmanager
async def island():
    """An island a that lives, and what it must still be able to do when it has been through something."""
    a = await Peer("a", patience=0.3, timeout=5.0).start()
    living = asyncio.create_task(a.live(0.005))
    try:
        yield a
    finally:
        living.cancel()
    await until(lambda: not a.node.ledger._reserved)
    a.step()
    assert np.isfinite(a.values).all()
    b = await Peer("b").start()
    a.node.patience = 30.0
    a.meets(b), b.meets(a)
    total, scale = a.values + b.values, max(np.abs(a.values).max(), 1.0)
    a.begin(), b.begin()
    await exchanges(a, b, 3 * SEGMENTS)
    for task in (*a.tasks, *b.tasks):
        task.cancel()
    await until(lambda: not a.node.ledger._reserved and not b.node.ledger._reserved)
    await a.stop(), await b.stop()
    a.step(), b.step()
    np.testing.assert_allclose(a.values + b.values, total, rtol=0, atol=1e-13 * scale)


async def in_turns(job, number):
    """Do something so many times, a few at a time."""
    numbers = iter(range(number))

    async def some():
        for k in numbers:
            await job(k)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_requests_leave_an_island_as_able_as_before(seed):
    async def talk():
        async with island() as a:
            said, _ = await record(a)
            rng = np.random.default_rng(seed)
            before, took_place = a.node.exchanged, 0

            async def ask(k):
                nonlocal took_place
                data = said.replace(b"h@1:%d" % FIRST, b"h@1:%d" % (FIRST + 1 + k))
                data = data.replace(b'"segment": 0', b'"segment": %d' % (k % SEGMENTS))
                is_whole = k % 8 == 0
                reader, writer = await asyncio.open_connection(*split_address(a.address))
                with contextlib.suppress(OSError):
                    writer.write(data if is_whole else damaged(data, rng))
                    writer.write_eof()
                    answer = await asyncio.wait_for(reader.read(), 20)
                    took_place += is_whole and b'"committed"' in answer
                writer.transport.abort()

            await in_turns(ask, CASES)
            await until(lambda: not a.tcp._answering)
            assert took_place > CASES // 40  # or nothing of this would have gone deep
            assert a.node.exchanged - before > took_place  # some damages change a value only, or nothing that is read

    run(talk())


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_answers_leave_an_island_as_able_as_before(seed):
    async def talk():
        async with island() as a:
            h = await Peer("h").start()
            living = asyncio.create_task(h.live(0.005))
            async with Wire(h) as wire:
                a.node.links.members = {"h": wire.address}
                while not wire.answered or not a.node.exchanged:
                    wire.answered = b""
                    await a.node.exchange(0, "h")
                    await asyncio.sleep(0.01)
            living.cancel()
            await h.stop()
            rng = np.random.default_rng(seed)
            before, whole = a.node.exchanged, wire.answered
            async with Wire(h, iter(whole if k % 8 == 0 else damaged(whole, rng) for k in itertools.count())) as wire:
                a.node.links.members = {"h": wire.address}
                asked = 0

                async def ask(k):
                    nonlocal asked
                    segment = k % SEGMENTS
                    if k % AT_ONCE < SEGMENTS:
                        await until(lambda: a.node.ledger.is_offered(segment))
                        asked += 1
                        assert await a.node.exchange(segment, "h") in (True, False)

                await in_turns(ask, CASES)
                assert asked >= CASES // 2
                assert a.node.exchanged - before > asked // 16
                for what in ("state", "params"):
                    for _ in range(50):
                        with contextlib.suppress(OSError):
                            await a.node.fetch("h", what, 1000)
                for _ in range(50):
                    with contextlib.suppress(OSError):
                        await a.node.status("h")
            assert a.node.over is None or "newer process" in str(a.node.over)

    run(talk())
