"""An island that a storm can hit at a chosen moment: `island.py` itself, with hooks around a few of its functions.

    python -m experiments.islands.hooks CONTROL --config=... and so on, the flags of island.py

CONTROL is a folder by which the storm and this process talk:

    aim         "WINDOW SIGNAL", read here and taken away: the signal comes from this process itself, in that window
    hit         seconds since the epoch at which it did
    pace        milliseconds that a step takes at least, instead of --pace_ms; it may change at any time
    alone       if it is there at the start, nothing is exchanged, but newcomers get their state as usual
    exchanges   written here: a line for each exchange that this side has committed, its time and its id
"""

import asyncio
import contextlib
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from absl import app

from crossover_jax.islands import island as island_module
from crossover_jax.islands.heads import PARAMS, STATE
from crossover_jax.islands.ledger import Ledger
from crossover_jax.islands.node import Node
from crossover_jax.islands.stream import CHUNK
from experiments import flags, island
from experiments.checkpoint import Checkpoints

WINDOWS = IDLE, SENDING, RECEIVING, BETWEEN, SAVING, FIRST = (
    "idle",  # no conversation is open
    "sending",  # half of a segment has been sent
    "receiving",  # half of a segment has been received
    "between segments",  # a segment has just been exchanged
    "saving",  # a checkpoint has begun, and has no name yet
    "first exchange",  # in this life, its segments are on their way
)
QUIET = 0.02  # seconds without a conversation, which are idle


class Control:
    """This process's side of the folder."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.exchanges = open(folder / "exchanges", "a", buffering=1)  # noqa: SIM115  # for the process's life

    def is_aimed(self, window: str) -> bool:
        """Whether a signal is to come in this window; the cheap question, for most of the time there is no aim."""
        with contextlib.suppress(OSError):
            return (self.folder / "aim").read_text().rpartition(" ")[0] == window
        return False

    def hit(self, window: str) -> None:
        """Send this process its signal, if it is to come in this window. Behind a SIGSTOP the process goes on here."""
        if self.is_aimed(window):
            number = int((self.folder / "aim").read_text().rpartition(" ")[2])
            (self.folder / "aim").unlink()
            (self.folder / "hit.new").write_text(str(time.time()))
            (self.folder / "hit.new").rename(self.folder / "hit")
            os.kill(os.getpid(), signal.Signals(number))

    def pace(self, otherwise: float) -> float:
        """Seconds."""
        with contextlib.suppress(OSError, ValueError):
            return float((self.folder / "pace").read_text()) / 1e3
        return otherwise


class HalfWriter:
    """A stream's writer that is hit when half of a segment has gone to the system."""

    def __init__(self, writer: asyncio.StreamWriter, control: Control, size: int):
        self._writer, self._control, self._size = writer, control, min(size, CHUNK)

    def write(self, data: Any) -> None:
        half = len(data) // 2
        if len(data) > self._size // 2:  # the segment, and not what is said before it
            self._writer.write(data[:half])
            self._control.hit(SENDING)
            data = data[half:]
        self._writer.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


class HalfReader:
    """A stream's reader that is hit when half of a segment has come."""

    def __init__(self, reader: asyncio.StreamReader, control: Control, size: int):
        self._reader, self._control, self._size = reader, control, min(size, CHUNK)

    async def readexactly(self, size: int) -> bytes:
        first = b""
        if size > self._size // 2:
            first = await self._reader.readexactly(size // 2)
            self._control.hit(RECEIVING)
        return first + await self._reader.readexactly(size - len(first))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def install(control: Control) -> None:
    """Put the hooks around the functions of this process."""
    _hook_conversations(control)
    _hook_swaps(control)
    _hook_commits(control)
    _hook_saves(control)
    _hook_steps(control)
    if (control.folder / "alone").exists():
        _be_alone()


def _hook_conversations(control: Control) -> None:
    exchange, answer, open_now = Node.exchange, Node.answer, [0]

    @contextlib.contextmanager
    def counted():
        open_now[0] += 1
        try:
            yield
        finally:
            open_now[0] -= 1
            asyncio.get_running_loop().call_later(QUIET, lambda: open_now[0] or control.hit(IDLE))

    async def hooked_exchange(self: Node, segment: int, peer: str) -> bool:
        with counted():
            took_place = await exchange(self, segment, peer)
        if took_place:
            control.hit(BETWEEN)
        return took_place

    async def hooked_answer(self: Node, conversation: Any) -> None:
        with counted():
            await answer(self, conversation)

    Node.exchange, Node.answer = hooked_exchange, hooked_answer


def _hook_swaps(control: Control) -> None:
    swap = Node._swap

    async def hooked(self: Node, conversation: Any, peer: str, segment: int, publication: Any) -> Any:
        size = self.layout.size(segment)
        if control.is_aimed(SENDING):
            conversation.writer = HalfWriter(conversation.writer, control, size)
        elif control.is_aimed(RECEIVING):
            conversation.reader = HalfReader(conversation.reader, control, size)
        elif not self.exchanged and control.is_aimed(FIRST):
            asyncio.get_running_loop().call_soon(control.hit, FIRST)
        return await swap(self, conversation, peer, segment, publication)

    Node._swap = hooked


def _hook_commits(control: Control) -> None:
    commit = Ledger.commit

    def hooked(self: Ledger, id: str, theirs: Any) -> bool:
        took_place = commit(self, id, theirs)
        if took_place:
            control.exchanges.write(f"{time.time():.4f} {id}\n")
        return took_place

    Ledger.commit = hooked


def _hook_saves(control: Control) -> None:
    save = Checkpoints.save

    def hooked(self: Checkpoints, *args: Any, **keys: Any) -> None:
        def watch() -> None:
            until = time.monotonic() + 1.0
            while time.monotonic() < until:
                if any(".orbax-checkpoint-tmp" in name for name in os.listdir(self._folder)):
                    control.hit(SAVING)
                    return
                time.sleep(0.001)

        if control.is_aimed(SAVING):
            threading.Thread(target=watch, daemon=True).start()
        save(self, *args, **keys)

    Checkpoints.save = hooked


def _hook_steps(control: Control) -> None:
    step = island._Run.step

    def hooked(self: Any, state: Any, batch: Any) -> Any:
        self.settings = self.settings._replace(pace=control.pace(self.settings.pace))
        return step(self, state, batch)

    island._Run.step = hooked


def _be_alone() -> None:
    """The events of a run without its exchanges: nothing is packed, and nothing offered."""
    exchange: Callable = island_module.Island.exchange

    def hooked(self: Any, params: Any, state: Any, *, delivered: float = 1) -> Any:
        if self._called_at is None or self._node.wanted[STATE] or self._node.wanted[PARAMS]:
            return exchange(self, params, state, delivered=delivered)
        self._raise_if_over()
        self._node.clock.add(self.life, delivered)
        self._node.steps += 1
        return params

    island_module.Island.exchange = hooked
    Ledger.is_offered = lambda self, segment: False


def main(argv: list[str]) -> None:
    control = Control(pathlib.Path(argv.pop(1)))
    install(control)
    app.run(island.main, argv=argv, flags_parser=flags.parse_flags)


if __name__ == "__main__":
    main(sys.argv)
