"""Islands in one process and in no time: a network of queues and an event loop whose clock jumps to the next event."""

import asyncio
import collections
import contextlib
import selectors
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np

from crossover_jax.islands.island import Island
from crossover_jax.islands.roster import Roster
from crossover_jax.islands.state import state_of
from crossover_jax.islands.stream import Head, LinkError
from crossover_jax.islands.transport import Conversation
from crossover_jax.leaves import PyTree


class VirtualTime(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time: `asyncio.Runner(loop_factory=VirtualTime)`.

    Everything that happens in it is a function of its seeds alone. Where all wait for each other it raises
    `RuntimeError`.
    """

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float | int) -> None:
        self._now += seconds


class _Jumping(selectors.DefaultSelector):
    def __init__(self, jump: Callable[[float], None]):
        super().__init__()
        self._jump = jump

    def select(self, timeout: Any = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits, and nothing is going to happen")
        self._jump(timeout)
        return super().select(0)


class Network:
    """Links between islands of one process: `network.transport(name)` is one island's end of all of them.

    A message takes an exponentially distributed time of mean `latency` seconds, and its bytes at `rate` a second, one
    after the other from each island. So does opening a connection, which is then kept as `Tcp` keeps it. With the
    probability `loss` a message never arrives, and the other side sees a time-out.
    Islands in `dead` refuse; those in `stopped` are mute until taken out; `parts` is a list of sets between which
    nothing passes.
    """

    def __init__(
        self, *, latency: float = 0.0, rate: float = np.inf, loss: float = 0.0, timeout: float = 2.0, seed: int = 0
    ):
        self.latency, self.rate, self.loss, self.timeout = latency, rate, loss, timeout
        self.dead: set[str] = set()
        self.stopped: set[str] = set()
        self.parts: list[set[str]] = []
        self.sent: dict[str, int] = {}  # bytes of bodies, by island
        self._answers: dict[str, Callable[[Conversation], Awaitable[None]]] = {}
        self._free_at: dict[str, float] = {}
        self._rng = np.random.default_rng(seed)
        self._tasks: set[asyncio.Task] = set()

    def transport(self, name: str) -> "SimulatedTransport":
        """The end of this island, whose address is its name and ":1"."""
        return SimulatedTransport(self, name)

    def passes(self, one: str, other: str) -> bool:
        """Whether anything gets from one island to the other at present."""
        if {one, other} & (self.dead | self.stopped):
            return False
        return not self.parts or any({one, other} <= part for part in self.parts)

    def delay(self, sender: str, size: int) -> float:
        """Seconds until a message of this size that is sent now is there."""
        now = asyncio.get_running_loop().time()
        self._free_at[sender] = max(now, self._free_at.get(sender, 0.0)) + size / self.rate
        self.sent[sender] = self.sent.get(sender, 0) + size
        return self._free_at[sender] - now + (self._rng.exponential(self.latency) if self.latency else 0.0)

    def loses(self, head: Head) -> bool:
        """Whether this message never arrives."""
        del head
        return bool(self.loss) and self._rng.random() < self.loss

    def begin(self, answer: Callable[[Conversation], Awaitable[None]], conversation: "_Queues") -> None:
        """Have a conversation answered, beside whatever else happens."""

        async def answered() -> None:
            with contextlib.suppress(LinkError):
                await answer(conversation)

        task = asyncio.get_running_loop().create_task(answered())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class SimulatedTransport:
    """One island's end of a `Network`."""

    def __init__(self, network: Network, name: str):
        self.network, self.name = network, name
        self._kept: set[str] = set()  # to whom a connection is open

    async def serve(self, answer: Callable[[Conversation], Awaitable[None]]) -> str:
        self.network._answers[self.name] = answer
        return f"{self.name}:1"

    @contextlib.asynccontextmanager
    async def connect(self, address: str, name: str | None):
        network, peer = self.network, address.removesuffix(":1")
        if peer not in self._kept:
            await asyncio.sleep(network.delay(self.name, 0))
        self._kept.discard(peer)
        if peer in network.dead or peer not in network._answers:
            raise LinkError(f"{peer}: refused")
        if not network.passes(self.name, peer):
            await asyncio.sleep(network.timeout)
            raise LinkError(f"{peer}: nothing moved for the time-out")
        mine, other = _Queues(network, self.name, peer), _Queues(network, peer, self.name)
        mine.other, other.other = other, mine
        network.begin(network._answers[peer], other)
        try:
            yield mine
            self._kept.add(peer)
        finally:
            mine.close()

    async def close(self) -> None:
        self.network._answers.pop(self.name, None)


class _Queues:
    """One side of a conversation. What arrives after the other side has gone is a broken connection."""

    def __init__(self, network: Network, name: str, peer: str):
        self.network, self.name = network, name
        self.peer: str | None = peer
        self.queue: asyncio.Queue = asyncio.Queue()
        self.other: Any = None
        self._flying: collections.deque = collections.deque()
        self._arrives_at, self._is_cut = 0.0, False

    async def send(self, head: Head, *body: Any) -> None:
        coded = b"".join(bytes(memoryview(part).cast("B")) for part in body)
        seconds = self.network.delay(self.name, len(coded))
        self._put((head, bytearray(coded)), seconds)
        await asyncio.sleep(0)

    def _put(self, message: Any, seconds: float) -> None:
        head = message[0] if message else {}
        self._is_cut = self._is_cut or self.network.loses(head)
        if self._is_cut:  # a stream has no gaps: what comes behind what was lost does not come either
            return
        loop = asyncio.get_running_loop()
        self._arrives_at = max(self._arrives_at, loop.time() + seconds)  # in the order in which they were sent
        self._flying.append(message)
        loop.call_at(self._arrives_at, self._arrive)

    def _arrive(self) -> None:
        message = self._flying.popleft()
        if self.network.passes(self.name, str(self.peer)):
            self.other.queue.put_nowait(message)

    async def receive(self, longest: int = 0) -> tuple[Head, bytearray]:
        try:
            # A slow link is not a dead one: the time that the bytes take by themselves does not count.
            async with asyncio.timeout(self.network.timeout + 4 * longest / self.network.rate):
                message = await self.queue.get()
        except TimeoutError as error:
            raise LinkError(f"{self.peer}: nothing moved for the time-out") from error
        if message is None:
            raise LinkError(f"{self.peer}: the connection has ended")
        head, body = message
        if len(body) > longest:
            raise LinkError(f"a message of {len(body)} bytes where {longest} were expected")
        return head, body

    def packets(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        self._put(None, 0.0)


class SimulatedIsland(Island):
    """An `Island` of a `Network`, to be used inside of a `VirtualTime`, where `joined` and `left` are awaited.

    `exchange` is `Island`'s own, and so is all that happens behind it.
    """

    def __init__(self, network: Network, roster: Roster, name: str, **keys: Any):
        self.network = network
        super().__init__(roster, name, tls=None, transport=network.transport(name), **keys)

    def _first_incarnation(self) -> int:
        return 1  # not from the wall clock, so that a run is a function of its seed

    def _start(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def _blocking(self, function: Callable, *args: Any) -> Any:
        return function(*args)

    async def joined(self, state: PyTree, clock: Mapping[str, float] | None = None, *, found: bool | None = None):
        """As `Island.join`."""
        await self._open(clock or {})
        body = await self._first_state(state, clock is not None, found)
        await self._begin()
        return state_of(body, state) if body else state

    async def left(self) -> None:
        """As `Island.leave`."""
        await self._leave()

    def status(self) -> Head:
        """As `Island.status`."""
        return self._node.hello() | self._node.describe()

    def kill(self) -> None:
        """End this life without a word, as SIGKILL does."""
        for task in self._tasks:
            task.cancel()
        self.network._answers.pop(self.name, None)
