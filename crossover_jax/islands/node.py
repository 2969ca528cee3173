"""What an island says to others and answers them: the protocol, in coroutines that know neither sockets nor threads."""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from crossover_jax.islands.clock import Clock
from crossover_jax.islands.heads import PARAMS, STATE, is_incarnation, is_name, refusal, short
from crossover_jax.islands.layout import Layout
from crossover_jax.islands.ledger import ABORTED, COMMITTED, Ledger, Publication, Segment
from crossover_jax.islands.links import Links
from crossover_jax.islands.peers import deal, deal_again
from crossover_jax.islands.roster import Superseded
from crossover_jax.islands.stream import Head, LinkError
from crossover_jax.islands.transport import Conversation, Transport


class Refused(LinkError):
    """The other island has answered that it will not, and why."""


class Node:
    """One life of an island, as the others see it.

    An exchange of a segment is one conversation. The one who asks has reserved its own; the other reserves, and says
    so, or is busy. Both send their bits at once, each looks at what has come, the asker confirms, the other commits
    and says so, and then the asker commits. If that last word is lost the asker asks for it, and until it has it, its
    segment stays reserved. A conversation that ends before that is an exchange that did not happen.
    """

    def __init__(
        self,
        name: str,
        incarnation: int,
        layout: Layout,
        transport: Transport,
        *,
        seed: int = 0,
        patience: float = 30.0,
        limit: float = 100.0,
        rounds: int = 1,
    ):
        self.name, self.incarnation, self.layout, self.transport = name, incarnation, layout, transport
        self.patience, self.limit = patience, limit
        self.ledger, self.clock = Ledger(len(layout.segments), rounds, layout.mixed), Clock()
        self.links = Links(name)
        self.incarnations: dict[str, int] = {}  # the newest that was heard of, by name
        self.over: Exception | None = None  # why this life must end
        self.hosts: list[str] = []  # addresses of this island's hosts, the first one's first
        self.is_founder, self.origin, self.steps, self.exchanged, self.due = False, "", 0, 0, 0
        self.distance = math.nan
        self.wanted: dict[str, list[asyncio.Future]] = {STATE: [], PARAMS: []}
        self._published_at, self._interval = -math.inf, 1.0  # when it was, seconds from one to the next
        self._asking, self._published = 0.0, asyncio.Event()  # seconds to an answer
        self._dealt: tuple[int, list[list[str]]] = -1, []
        self._rng = np.random.default_rng([seed, incarnation % (1 << 32), *name.encode()])
        self._ids = itertools.count()

    # What the island calls

    def publish(self, publication: Publication) -> None:
        """Offer what has just been packed."""
        self.ledger.publish(publication)
        now = asyncio.get_running_loop().time()
        if now > self._published_at > -math.inf:
            self._interval = now - self._published_at
        self._published_at = now
        self.due += len(self.layout.segments) * self.ledger.rounds if self.links.members else 0
        self._published.set()
        self._published = asyncio.Event()

    def is_donor(self) -> bool:
        """Whether newcomers may take their state from here: it has met another in this life, or began the run."""
        return self.exchanged > 0 or self.is_founder

    async def gossip(self) -> None:
        """Exchange every segment of every publication, for ever; a peer that hangs holds up one segment only."""
        async with asyncio.TaskGroup() as group:
            for segment in range(len(self.layout.segments)):
                group.create_task(self._gossip_of(segment))

    async def _gossip_of(self, segment: int) -> None:
        while True:
            published, now = self._published, self.ledger.now
            peers = self._peers(now.number, segment) if now else []
            while not published.is_set():
                for peer in peers:
                    if published.is_set() or not self.ledger.is_offered(segment):
                        break
                    await self.exchange(segment, peer)
                # Whoever has met nobody by then draws again; not sooner than asking takes, for who asks is busy.
                wait = max(0.1 * self._interval, 4 * self._asking) * self._rng.uniform(0.5, 1.5)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await published.wait()
                peers = deal_again(self.name, self._living(), segment, self._rng)

    def _peers(self, number: int, segment: int) -> list[str]:
        if self._dealt[0] != number:
            self._dealt = number, deal(self.name, self._living(), len(self.layout.segments), self._rng)
        return self._dealt[1][segment]

    def _living(self) -> list[str]:
        return self.links.living(asyncio.get_running_loop().time())

    # Asking

    async def exchange(self, segment: int, peer: str) -> bool:
        """Exchange one segment with one peer; whether it took place."""
        id = f"{self.name}@{self.incarnation}:{next(self._ids)}"
        publication = self.ledger.reserve(segment, id)
        if publication is None:
            return False
        theirs, granted, outcome = None, None, ABORTED
        try:
            async with self._conversation(peer, "exchange", segment=segment, id=id) as (conversation, head):
                if "granted" in head:
                    theirs = await self._swap(conversation, peer, segment, publication)
                    granted = head.get("incarnation")
                    await conversation.send({"confirm": True})
                    head, _ = await conversation.receive()
                    granted = None  # the other has spoken: there is nothing to ask for
                    self._raise_if_refused(head)
                    outcome = head.get("outcome", ABORTED)
                self.links.counts["busy"] += "busy" in head
        except LinkError as error:
            self.links.leave_alone(peer, asyncio.get_running_loop().time())
            self.links.keep_error(peer, str(error), "failed")
            if granted is not None:
                outcome = await self._outcome(peer, id, granted)
        finally:
            took_place = outcome == COMMITTED and theirs is not None and self.ledger.commit(id, theirs)
            if not took_place:
                self.ledger.abort(id)
        self.exchanged += took_place
        return took_place

    async def _swap(self, conversation: Conversation, peer: str, segment: int, publication: Publication) -> Segment:
        """Both segments at once; theirs, if it is good. Raises `LinkError`."""
        longest, began = self.layout.size(segment), asyncio.get_running_loop().time()
        sending = asyncio.ensure_future(conversation.send({}, *publication.segments[segment]))
        try:
            _, body = await conversation.receive(longest)
            await sending
            seconds = asyncio.get_running_loop().time() - began
            self.links.count(peer, longest, seconds, conversation.packets())
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, LinkError):
                await sending
        problem = f"must have {longest} bytes; it has {len(body)}"
        if len(body) == longest:
            theirs = self.layout.split(segment, body)
            problem = self.layout.problem(segment, theirs, publication.scale, self.limit)
            if not problem:
                return theirs
        await conversation.send({"refused": f"segment {segment} {problem}"})
        raise LinkError(f"refused: segment {segment} {problem}")

    async def _outcome(self, peer: str, id: str, incarnation: int) -> str:
        """What an exchange came to whose last word was lost; aborted if nobody is left who knows."""
        loop = asyncio.get_running_loop()
        until, wait = loop.time() + self.patience, 0.1
        while loop.time() < until and self.incarnations.get(peer, incarnation) == incarnation:
            try:
                async with self._conversation(peer, "outcome", id=id) as (_, head):
                    if head.get("incarnation") == incarnation:
                        return head.get("outcome", ABORTED)
            except LinkError:
                await asyncio.sleep(wait)
                wait = min(2 * wait, 2.0)
        self.links.counts["outcomes that nobody knew"] += 1
        return ABORTED

    async def status(self, peer: str, address: str | None = None) -> Head:
        """What a peer says of itself, or whoever is at an address. Raises `LinkError`."""
        async with self._conversation(peer, "status", address) as (_, head):
            return head

    async def fetch(self, peer: str, what: str, longest: int, address: str | None = None) -> tuple[Head, bytearray]:
        """A peer's `STATE` or `PARAMS`, of one moment. Raises `LinkError`."""
        async with self._conversation(peer, what, address) as (conversation, head):
            name, until = head["from"], asyncio.get_running_loop().time() + self.patience
            while "ready" not in head:
                if asyncio.get_running_loop().time() > until:
                    raise LinkError(f"{what} was asked for, and not handed over within {self.patience:g} s")
                head, _ = await conversation.receive()
                self._raise_if_refused(head)
            head, body = await conversation.receive(longest)
            if len(body) != longest:
                raise LinkError(f"{what} of {longest} bytes was asked for, and {len(body)} have come")
            self._hear(head, name)
            return head, body

    @contextlib.asynccontextmanager
    async def _conversation(
        self, peer: str, do: str, address: str | None = None, **request: Any
    ) -> AsyncIterator[tuple[Conversation, Head]]:
        """One with a peer, or with whoever is at an address, and the first answer in it."""
        where = address or self.links.members.get(peer)
        if where is None:
            raise LinkError(f"{peer} is not in the roster")
        began = asyncio.get_running_loop().time()
        async with self.transport.connect(where, None if address else peer) as conversation:
            await conversation.send(self.hello() | {"do": do} | request)
            head, _ = await conversation.receive()
            self._asking += 0.1 * (asyncio.get_running_loop().time() - began - self._asking)
            self._raise_if_refused(head)
            self._hear(head, conversation.peer or (None if address else peer))
            self.links.works(peer)
            yield conversation, head

    def _raise_if_refused(self, head: Head) -> None:
        if "refused" in head:
            self._supersede(head.get("superseded"))
            raise Refused(f"refused: {short(head['refused'])}")

    # Answering

    async def answer(self, conversation: Conversation) -> None:
        """One conversation that another has begun."""
        head, _ = await conversation.receive()
        refused = refusal(head, conversation.peer, self.layout, self.incarnations)
        if refused:
            self.links.keep_error(short(head.get("from")), f"it was refused: {refused['refused']}", "refused")
            await conversation.send(self.hello() | refused)
            return
        self._hear(head)
        if head["do"] == "exchange":
            await self._answer_exchange(conversation, head)
        elif head["do"] == "outcome":
            await conversation.send(self.hello() | {"outcome": self.ledger.abort(head["id"])})
        elif head["do"] == "status":
            await conversation.send(self.hello() | self.describe())
        else:
            await self._answer_fetch(conversation, head["do"])

    async def _answer_exchange(self, conversation: Conversation, head: Head) -> None:
        segment, id = head["segment"], head["id"]
        is_old = asyncio.get_running_loop().time() - self._published_at > self.patience
        publication = None if is_old else self.ledger.reserve(segment, id)
        if publication is None:
            await conversation.send(self.hello() | {"busy": "old" if is_old else True})
            return
        try:
            await conversation.send(self.hello() | {"granted": publication.number})
            theirs = await self._swap(conversation, head["from"], segment, publication)
            said, _ = await conversation.receive()
            self._raise_if_refused(said)
            if said.get("confirm") is True and self.ledger.commit(id, theirs):
                self.exchanged += 1
                self.links.errors.pop(head["from"], None)
        except LinkError as error:
            self.links.keep_error(head["from"], str(error), "failed")
            raise
        finally:
            outcome = self.ledger.abort(id)  # does nothing once it has been committed
        await conversation.send({"outcome": outcome})

    async def _answer_fetch(self, conversation: Conversation, what: str) -> None:
        if what == STATE and not self.is_donor():
            await conversation.send(self.hello() | {"refused": "has met no other island in this life yet"})
            return
        future = asyncio.get_running_loop().create_future()
        self.wanted[what].append(future)
        await conversation.send(self.hello() | {"wait": True})
        while not (await asyncio.wait([future], timeout=1.0))[0]:
            await conversation.send({"wait": True})  # so that the other sees that somebody is there
        await conversation.send({"ready": True})
        head, arrays = future.result()
        await conversation.send(self.hello() | {"steps": self.steps} | head, *arrays)

    # What all messages carry

    def hello(self) -> Head:
        """Who says this, in which life, of which model, and how far the run is."""
        return {
            "from": self.name,
            "incarnation": self.incarnation,
            "model": self.layout.model,
            "fingerprint": self.layout.fingerprint,
            "clock": self.clock.counts,
        }

    def _hear(self, head: Head, expected: str | None = None) -> None:
        """Believe what one says of itself, and of the clock."""
        name, incarnation, counts = head.get("from"), head.get("incarnation"), head.get("clock")
        if not is_name(name) or not is_incarnation(incarnation):
            raise LinkError("an answer that is not in this protocol")
        if expected not in (None, name):
            raise LinkError(f"{expected!r} was asked, and {short(name)} has answered")
        if name == self.name:
            self._supersede(incarnation)
        self.incarnations[name] = max(incarnation, self.incarnations.get(name, 0))
        if isinstance(counts, dict):
            self.clock.merge(counts)

    def _supersede(self, incarnation: Any) -> None:
        if is_incarnation(incarnation) and incarnation > self.incarnation:
            self.over = Superseded(
                f"a newer process has the name {self.name!r} (incarnation {incarnation}, this one is "
                f"{self.incarnation}): this one must end."
            )

    def describe(self) -> Head:
        """What there is to see of this island from outside."""
        age = asyncio.get_running_loop().time() - self._published_at
        return {
            "steps": self.steps,
            "total": self.clock.total,
            "publication": self.ledger.now.number if self.ledger.now else None,
            "age": round(age, 3) if math.isfinite(age) else None,
            "origin": self.origin,
            "donor": self.is_donor(),
            "exchanged": self.exchanged,
            "due": max(self.due, self.exchanged),  # by who came before it was known that anybody is there
            "distance": self.distance if math.isfinite(self.distance) else None,
            "errors": self.links.errors,
            "impaired": {peer: why for peer, why in self.links.impaired.items() if peer in self.links.members},
            "strangers": getattr(self.transport, "refused", {}),
            "counts": dict(self.links.counts),
            "members": sorted(self.links.members),
            "incarnations": self.incarnations,
            "hosts": self.hosts,
        }
