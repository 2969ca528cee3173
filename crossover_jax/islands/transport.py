"""Conversations between islands: messages of a small JSON head and a body of bytes, over TCP with mutual TLS."""

import asyncio
import collections
import contextlib
import functools
import ipaddress
import logging
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, Protocol, runtime_checkable

from crossover_jax.islands.stream import CHUNK, Head, LinkError, Stream, as_link_error

log = logging.getLogger("crossover_jax.islands")
WAITING = 64  # connections that have not said anything yet
OPEN = 512  # connections that are answered at once: a file descriptor each, of which a process often has 1024
HOSTS = 64  # whose refused connections are remembered
KEPT = 64  # connections that wait for their next conversation


@runtime_checkable
class Conversation(Protocol):
    """Two islands taking turns, on one connection. `peer` is the name in the other's certificate; None without TLS.

    Sending and receiving raise `LinkError`, at the latest when nothing has moved for the transport's time-out.
    """

    peer: str | None

    async def send(self, head: Head, *body: Any) -> None:
        """Send a message; each part of the body is anything with a contiguous buffer."""

    async def receive(self, longest: int = 0) -> tuple[Head, bytearray]:
        """The next message. One with a longer body than `longest` bytes is refused before it is read."""

    def packets(self) -> tuple[int, int]:
        """Packets that were sent since the last call, and of them how many again; zeros where nobody knows."""


@runtime_checkable
class Transport(Protocol):
    """How islands reach each other: what `Island` needs of a network, and what a test can put in its place."""

    async def serve(self, answer: Callable[[Conversation], Awaitable[None]]) -> str:
        """Have every conversation that others begin answered; the address at which they can."""

    def connect(self, address: str, name: str | None) -> contextlib.AbstractAsyncContextManager[Conversation]:
        """Begin a conversation, with the island of this name if one is given; left without an error, it was whole."""

    async def close(self) -> None:
        """Answer no more."""


class Tls(NamedTuple):
    """Files of one run's certificate authority, and of one island's certificate and key.

    They are read again when they change, so that a certificate can be renewed while the island runs.
    """

    ca: str
    certificate: str
    key: str

    @classmethod
    def of(cls, directory: str, name: str) -> "Tls":
        """The files that `python -m crossover_jax islands keys` has made. Raises `ValueError` if one is missing."""
        found = cls(*(os.path.join(directory, file) for file in ("ca.crt", f"{name}.crt", f"{name}.key")))
        for path in found:
            if not os.path.isfile(path):
                raise ValueError(
                    f"TLS of {name!r} needs the file {path}, which is missing: make it with `python -m crossover_jax "
                    f"islands keys {directory} {name}`."
                )
        return found

    def context(self, *, server: bool, check_name: bool = True) -> ssl.SSLContext:
        """TLS 1.3 with certificates of this authority on both sides."""
        return _context(self, server, check_name, tuple(os.stat(path).st_mtime_ns for path in self))


@functools.lru_cache(64)  # a millisecond each time, in the thread of all conversations
def _context(tls: Tls, server: bool, check_name: bool, changed: tuple[int, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(tls.ca)
    context.load_cert_chain(tls.certificate, tls.key)
    context.check_hostname = check_name and not server
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class Tcp:
    """Conversations over TCP: with mutual TLS, or in plain text where `tls` is None.

    A connection is kept for the next conversation with the same peer: a new one costs a round trip more, two with TLS,
    and begins slowly. It ends if there is none for half of `timeout`, and after ten minutes.

    `bind` is "host:port" of one interface, port 0 for any that is free. What nobody reads or sends for `timeout`
    seconds, in pieces of 256 KiB, has failed; a slow link is not a dead one. `refused` says of each host why the last
    connection from there was refused, until one is not. Raises `ValueError` for an address of all interfaces.
    """

    def __init__(self, bind: str, *, tls: Tls | None, timeout: float = 10.0):
        self.host, self.port = split_address(bind)
        if self.host in ("", "0.0.0.0", "::", "*"):  # other spellings are found by `serve`
            raise ValueError(_ALL_INTERFACES.format(bind))
        self.tls, self.timeout = tls, timeout
        # asyncio does not send the other side what OpenSSL has to say to it.
        self._if_mute = ": it may have refused our certificate" if tls else ""
        self.refused: dict[str, str] = {}
        self._waiting: dict[asyncio.Task, str] = {}  # hosts of those that have said nothing yet, the oldest first
        self._answering: set[asyncio.Task] = set()
        self._ending: set[asyncio.Task] = set()
        self._kept: dict[Stream, tuple[Any, asyncio.TimerHandle]] = {}  # to whom, and when it ends; the oldest first
        self._listener: socket.socket | None = None
        self._again: asyncio.TimerHandle | None = None

    async def serve(self, answer: Callable[[Conversation], Awaitable[None]]) -> str:
        loop = asyncio.get_running_loop()
        family, _, _, _, address = (await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM))[0]
        if ipaddress.ip_address(str(address[0]).partition("%")[0]).is_unspecified:
            raise ValueError(_ALL_INTERFACES.format(f"{self.host}:{self.port}"))
        self._secure(server=True)  # what is wrong with the files is raised here
        self._listener = socket.create_server(address, family=family, backlog=1024)
        self._listener.setblocking(False)
        loop.add_reader(self._listener, self._accept, self._listener, answer)
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self._listener.getsockname()[1]}"

    def _accept(self, listener: socket.socket, answer: Callable[[Conversation], Awaitable[None]]) -> None:
        """Each connection in a task of its own from the first byte on: a handshake holds up nobody else."""
        loop = asyncio.get_running_loop()
        try:
            sock, (host, *_) = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:  # perhaps all file descriptors are in use
            log.warning("a connection could not be accepted: %s", error)
            loop.remove_reader(listener)
            self._again = loop.call_later(1.0, loop.add_reader, listener, self._accept, listener, answer)
            return
        if len(self._answering) >= OPEN:
            sock.close()
            self._refuse(host, f"a connection from {host}: {OPEN} others are being answered")
            return
        task = self._keep(self._answering, self._answered(sock, host, answer))
        task.add_done_callback(lambda _: sock.close())
        self._waiting[task] = host
        if len(self._waiting) > WAITING:  # of the host that has most of them, the oldest goes
            ((crowded, _),) = collections.Counter(self._waiting.values()).most_common(1)
            oldest = next(task for task, host in self._waiting.items() if host == crowded)
            del self._waiting[oldest]
            oldest.cancel()

    async def _answered(
        self, sock: socket.socket, host: str, answer: Callable[[Conversation], Awaitable[None]]
    ) -> None:
        whom, task, stream = f"a connection from {host}", asyncio.current_task(), None
        assert task is not None

        def on_head() -> None:
            if self._waiting.pop(task, None):
                self.refused.pop(host, None)

        seconds = 0.0  # nobody waits for one that has said nothing, or when this transport is closed
        try:
            with as_link_error(whom, self._if_mute):
                stream = Stream(*await self._opened(sock), whom, self.timeout, on_head=on_head)
            await answer(stream)
            while await stream.begins():
                await answer(stream)
            seconds = self.timeout
        except LinkError as error:
            if task in self._waiting:
                self._refuse(host, str(error))
            else:
                seconds = self.timeout  # the last word may be why
        except Exception:  # a fault of ours is not the end of the others
            log.exception("a conversation with %s has failed", host)
        finally:
            self._waiting.pop(task, None)
            if stream:
                await stream.end(seconds)

    async def _opened(self, sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=CHUNK, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        opening = loop.create_task(loop.connect_accepted_socket(lambda: protocol, sock, **self._secure(server=True)))
        try:
            transport, _ = await asyncio.shield(opening)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # cancelled before its handshake, it would stay open: so it ends itself
            (opened,) = await asyncio.gather(opening, return_exceptions=True)
            if isinstance(opened, tuple):
                opened[0].abort()
            raise
        return reader, asyncio.StreamWriter(transport, protocol, reader, loop)

    def _refuse(self, host: str, why: str) -> None:
        if self.refused.pop(host, None) != why:  # a scanner does not fill the log
            log.warning("%s", why)
        self.refused[host] = why
        if len(self.refused) > HOSTS:
            del self.refused[next(iter(self.refused))]

    @contextlib.asynccontextmanager
    async def connect(self, address: str, name: str | None):
        whom, is_whole = f"{name} at {address}" if name else address, False
        with as_link_error(whom):
            secure = self._secure(server=False, check_name=name is not None)
            key = address, name, secure.get("ssl")  # which is another one when the files have changed
            if not (stream := self._kept_one(key)):
                host, port = split_address(address)
                secure |= {"server_hostname": name or ""} if self.tls else {}
                async with asyncio.timeout(self.timeout):
                    opened = await asyncio.open_connection(host, port, limit=CHUNK, **secure)
                stream = Stream(*opened, whom, self.timeout, self._if_mute)
        try:
            yield stream
            is_whole = True
        finally:
            if is_whole:  # whatever was said has been heard
                timer = asyncio.get_running_loop().call_later(self.timeout / 2, self._let_go, stream)
                self._kept[stream] = key, timer
                if len(self._kept) > KEPT:
                    self._let_go(next(iter(self._kept)))
            else:
                self._let_go(stream)

    def _kept_one(self, key: Any) -> Stream | None:
        """A connection that both sides have kept, the one that was used last."""
        for stream in [stream for stream, (whom, _) in self._kept.items() if whom == key][::-1]:
            self._kept.pop(stream)[1].cancel()
            if stream.can_be_kept():
                return stream
            self._let_go(stream)
        return None

    def _let_go(self, stream: Stream) -> None:
        if stream in self._kept:
            self._kept.pop(stream)[1].cancel()
        self._keep(self._ending, stream.end(self.timeout))

    async def close(self) -> None:
        if self._again:
            self._again.cancel()
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        for stream in [*self._kept]:
            self._let_go(stream)
        await asyncio.sleep(0)  # a task that is cancelled before it has begun closes nothing
        tasks = [*self._answering, *self._ending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _secure(self, **how: bool) -> dict[str, Any]:
        return {"ssl": self.tls.context(**how), "ssl_handshake_timeout": self.timeout} if self.tls else {}

    def _keep(self, tasks: set[asyncio.Task], coroutine: Coroutine) -> asyncio.Task:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; raises `ValueError`."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f'an address must be "host:port" with a port up to 65535, got {address!r}.')
    return host.strip("[]"), int(port)


_ALL_INTERFACES = (
    "`bind` must name one interface, got {!r}, which is all of them: pass the address at which the other islands reach "
    'this one, as "10.0.3.7:7000".'
)
