"""An island: one JAX runtime that trains by itself and exchanges segments with others in the background."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
from jaxtyping import Array

from crossover_jax.cuts import Cut
from crossover_jax.islands.heads import hosts_in
from crossover_jax.islands.hosts import Word
from crossover_jax.islands.joining import NoState, first_state
from crossover_jax.islands.ledger import Publication, Segment
from crossover_jax.islands.node import PARAMS, STATE, Node
from crossover_jax.islands.payload import Payload
from crossover_jax.islands.roster import Roster, Superseded, check_name
from crossover_jax.islands.state import copied, digest_of, longest_of, on_host, state_of
from crossover_jax.islands.stream import Head, LinkError
from crossover_jax.islands.transport import Tcp, Tls, Transport
from crossover_jax.leaves import PyTree


class LongAway(RuntimeError):
    """This process was stopped for so long that it must join anew."""


class Island:
    """This process's place among islands that come and go.

    `roster` says who may be there, `name` who this is, `like` what the parameters look like; `cut` and `wire` are as
    on a mesh, and the same on all islands. Every `every`-th call of `exchange` offers what there is, for up to `rounds`
    exchanges of each segment: more of them keep islands closer, and send as many times more. `bind` is the
    address at which others reach this island, "10.0.3.7:7000"; with `advertise` they are told another. `tls` has its
    certificate; None, which must be said, is plain text. A link on which nothing moves for `timeout` seconds has
    failed. Who was away for `patience` seconds has gone.

    Half of the difference of two islands is added on one side and taken away on the other, so the sum over islands is
    kept, whatever their speed: x_i ← x_i + ½ (Q(x_j) − Q(x_i)) and x_j ← x_j + ½ (Q(x_i) − Q(x_j)), of segments
    packed since the last such step. Nobody waits for anybody. Raises `ValueError` for a bad name, address or tree.

    An island of several hosts, the processes of one `jax.distributed`, makes one on each of them, with the same name
    and an address of its own, and calls the same methods at the same steps. Each exchanges its own rows of every
    segment; the first host speaks for all. All islands must have as many hosts and devices.
    """

    def __init__(
        self,
        roster: Roster,
        name: str,
        *,
        like: PyTree,
        cut: Cut,
        tls: Tls | None,
        wire: str | None = None,
        every: int = 1,
        rounds: int = 1,
        bind: str = "127.0.0.1:0",
        advertise: str | None = None,
        timeout: float = 10.0,
        patience: float = 60.0,
        seed: int = 0,
        transport: Transport | None = None,
    ):
        check_name(name)
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every}.")
        if rounds < 1:
            raise ValueError(f"`rounds` must be at least 1 exchange of a publication, got {rounds}.")
        self.name, self.every, self.patience = name, every, patience
        self._roster, self._advertise = roster, advertise
        self._payload = Payload(like, cut, wire)
        self._hosts = self._payload.hosts
        transport = transport or Tcp(bind, tls=tls, timeout=timeout)
        incarnation = self._first_incarnation()
        layout = self._payload.layout
        self._node = Node(name, incarnation, layout, transport, seed=seed, patience=patience, rounds=rounds)
        self._number, self._is_publishing = 0, False
        self._has_joined, self._has_left = False, False
        self._squares: Any = None  # of the last differences, on the devices
        self._differences = np.full(cut.num_segments, np.nan)  # squared norm of the last one of each segment
        self._failure: BaseException | None = None
        self._called_at: float | None = None
        self._is_away, self._total = False, 0.0
        self._address = ""
        self._tasks: dict[asyncio.Task, None] = {}
        self._loop = self._start()

    def _first_incarnation(self) -> int:
        return time.time_ns() // 1000

    def _start(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()

        def run() -> None:
            loop.run_forever()
            loop.close()

        threading.Thread(target=run, name=f"island {self.name}", daemon=True).start()
        return loop

    @property
    def clock(self) -> float:
        """What all islands have delivered so far, in all their lives, as far as is known here: alike on all hosts."""
        return self._node.clock.total if self._hosts.count == 1 else self._total

    @property
    def counts(self) -> dict[str, float]:
        """The clock in parts, by life of an island: to be kept in a checkpoint, for `join`."""
        return dict(self._node.clock.counts)

    @property
    def life(self) -> str:
        """Name and incarnation: no other process of the run has the same, now or later. A seed for data and dropout."""
        return f"{self.name}@{self._node.incarnation}"

    # What the training loop calls

    def join(self, state: PyTree, clock: Mapping[str, float] | None = None, *, found: bool | None = None) -> PyTree:
        """The state to go on from: a peer's, or else the given one.

        `state` is this island's own: out of a checkpoint, with the `clock.counts` that lay beside it, or fresh from
        the run's seed, with None. A peer's state is taken if there is one, from an island that has itself exchanged
        since it was started, or that began the run; then learning rate and schedule go on where the run is. A fresh
        state is used by one island only, the run's founder; who founds is settled by the roster, or said by `found`.
        Raises `NoState` where there is nothing to begin with, `ValueError` where a peer's state has other shapes.
        """
        self._wait_for(self._open(clock or {}))
        hosts, node = self._hosts, self._node
        node.hosts = hosts.gather(self._address)
        head, body = {}, b""
        if hosts.is_first:
            try:
                body = self._wait_for(self._first_state(state, clock is not None, found))
            except (NoState, ValueError) as error:
                if hosts.count > 1:
                    hosts.tell({"failed": str(error)})
                raise
            head = {"incarnation": node.incarnation, "total": node.clock.total, "body": len(body)}
        head, body = hosts.tell(head, body, longest_of(state))
        if "failed" in head:
            raise NoState(f"the first host of this island: {head['failed']}")
        node.incarnation, self._total = head["incarnation"], head["total"]
        self._wait_for(self._begin())
        return state_of(body, state) if head["body"] else state

    def exchange(self, params: PyTree, state: PyTree, *, delivered: float | int = 1) -> PyTree:
        """Add what has arrived to the parameters and offer them to others, without waiting for anybody.

        To be called after each step. `state` is what a newcomer would get, of the structure that `join` was given; it
        is copied only if somebody asks. `delivered` is what has been trained on since the last call, in the unit of
        the run's clock: examples, tokens or steps. Raises `Superseded` where a newer process has this island's name,
        and `LongAway` where this one was stopped for `patience` seconds: then `join` again.
        """
        node = self._node
        self._raise_if_over()
        node.clock.add(self.life, delivered)
        node.steps += 1
        if node.steps % self.every:
            return params
        self._hosts.in_order((params, state))
        wants = bool(node.wanted[STATE]), bool(node.wanted[PARAMS])
        word = self._hosts.agree(Word(node.clock.total, self._is_away, *wants))
        self._total = word.total
        if word.is_away:
            self._is_away, self._called_at = False, None
            raise LongAway(
                f"island {self.name!r} was away for longer than `patience`, {self.patience:g} s: call `join` again and "
                "go on from what it returns."
            )
        self._look_at_differences()
        arrived = node.ledger.take(self._number + 1)
        if arrived or self._hosts.count > 1:
            params, self._squares = self._payload.add(params, arrived, node.ledger.rounds)
        if word.wants_state:
            self._do(self._hand_over(STATE, {"digest": digest_of(state)}, self._hosts.replicated(copied(state))))
        if word.wants_params:
            self._do(self._hand_over(PARAMS, {}, self._payload.copied(params)))
        if self._hosts.count > 1 or not self._is_publishing:
            packed = self._payload.pack(params)
            if not self._is_publishing:
                self._is_publishing, self._number = True, self._number + 1
                self._do(self._publish(self._number, packed))
        return params

    def _look_at_differences(self) -> None:
        """Two islands differ by √2 times their distance to the mean: that is the estimate that the status has."""
        if self._squares is not None and self._squares.is_ready():
            squares, self._squares = np.asarray(self._squares), None
            self._differences = np.where(squares > 0, squares, self._differences)
            known = self._differences[np.isfinite(self._differences)]
            self._node.distance = float(np.sqrt(known.mean() * len(squares) / 2)) if known.size else math.nan

    def leave(self) -> None:
        """End this life: others are told no more, and nothing is exchanged any longer."""
        if not self._has_left:
            self._wait_for(self._leave())
            self._loop.call_soon_threadsafe(self._loop.stop)

    def status(self) -> Head:
        """What others can see of this island: steps, clock, participation, distance, the last error of each link."""
        return self._wait_for(self._status())

    def _raise_if_over(self) -> None:
        if self._node.over is not None:
            raise self._node.over
        if self._failure is not None:
            raise RuntimeError(
                f"island {self.name!r} has failed in the background: {self._failure!r}"
            ) from self._failure
        if self._called_at is None or self._has_left:
            raise RuntimeError("`join` must be called before `exchange`: an island begins with the run's state.")
        now, before = self._loop.time(), self._called_at
        self._called_at = now
        self._is_away |= now - before > self.patience

    # In the background

    def _do(self, coroutine: Coroutine) -> None:
        asyncio.run_coroutine_threadsafe(self._watched(coroutine), self._loop)

    def _wait_for(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _watched(self, coroutine: Coroutine) -> None:
        """No fault is silent: what fails in the background is raised by the next `exchange`."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = None
        try:
            await coroutine
        except Superseded as error:
            self._node.over = error
        except Exception as error:
            self._failure = error
        finally:
            del self._tasks[task]

    async def _blocking(self, function: Callable, *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    async def _publish(self, number: int, packed: list[Segment]) -> None:
        try:
            self._node.publish(await self._blocking(self._publication, number, packed))
        finally:
            self._is_publishing = False

    def _publication(self, number: int, packed: list[Segment]) -> Publication:
        segments = [tuple(map(self._hosts.own_rows, segment)) for segment in packed]
        return Publication(number, segments, self._payload.layout.scale(segments))

    async def _hand_over(self, what: str, head: Head, arrays: list[Array]) -> None:
        waiting, self._node.wanted[what] = self._node.wanted[what], []
        if waiting:
            found = await self._blocking(on_host, arrays)
            for future in waiting:
                if not future.done():
                    future.set_result((head, found))

    async def _open(self, clock: Mapping[str, float]) -> None:
        """Be reachable, and have an incarnation of one's own."""
        node = self._node
        node.clock.merge(clock)
        if not self._address:
            self._address = self._advertise or await node.transport.serve(node.answer)
            known = await self._blocking(self._roster.incarnation, self.name)
            node.incarnation = max(node.incarnation, known + 1)

    async def _begin(self) -> None:
        """Be one of the islands; what all hosts have in common is settled."""
        node = self._node
        node.clock.add(self.life, 0.0)
        self._called_at, self._is_away = math.inf, False  # the first step may take as long to compile as it likes
        if not self._has_joined:
            self._has_joined = True
            await self._announce()
            self._do(node.gossip())
            self._do(self._beat())

    async def _announce(self) -> None:
        if self._hosts.is_first:
            await self._blocking(self._roster.announce, self.name, self._address, self._node.incarnation)
            if self._node.clock.total:
                await self._blocking(self._roster.begun)

    async def _first_state(self, state: PyTree, is_restored: bool, found: bool | None) -> bytes | bytearray:
        async def founds() -> bool:
            return found if found is not None else await self._blocking(self._roster.may_found, self.name)

        return await first_state(self._node, state, is_restored, self._look_around, founds, self._blocking)

    async def _beat(self) -> None:
        """Say again and again that this island is there, and look who else is."""
        while True:
            try:
                await self._announce()
                await self._look_around()
            except OSError as error:  # the directory is away: go on with whom we know
                self._node.links.errors["roster"] = f"{type(error).__name__}: {error}"
            else:
                self._node.links.errors.pop("roster", None)
            await asyncio.sleep(min(1.0, self.patience / 10))

    async def _look_around(self) -> None:
        """Read the roster, and learn the names behind addresses that have none."""
        node, found = self._node, {}
        for name, address in (await self._blocking(self._roster.members)).items():
            if name == address:
                known = [own for own, other in node.links.members.items() if other == address]
                with contextlib.suppress(LinkError):
                    name = known[0] if known else (await node.status(address, address))["from"]
            if name not in (self.name, address) and address != self._address:
                found[name] = address
        node.links.members = found if self._hosts.is_first else await self._hosts_of(found)

    async def _hosts_of(self, firsts: Mapping[str, str]) -> dict[str, str]:
        """Of each other island the address of the host that has this one's rows; the first one tells it."""
        found: dict[str, str] = {}

        async def ask(name: str, address: str) -> None:
            with contextlib.suppress(LinkError, IndexError):
                found[name] = hosts_in(await self._node.status(name, address))[self._hosts.index]

        await asyncio.gather(*(ask(*first) for first in firsts.items()))
        return found

    async def _status(self) -> Head:
        return self._node.hello() | self._node.describe()

    async def _leave(self) -> None:
        self._has_left = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(OSError):
            if self._hosts.is_first:
                await self._blocking(self._roster.withdraw, self.name, self._node.incarnation)
        await self._node.transport.close()
