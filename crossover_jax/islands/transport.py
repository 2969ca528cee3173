"""Conversations between islands: messages of a small JSON head and a body of bytes, over TCP with mutual TLS."""

import asyncio
import collections
import contextlib
import functools
import ipaddress
import json
import logging
import os
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

log = logging.getLogger("crossover_jax.islands")
Head = dict[str, Any]
LONGEST_HEAD = 1 << 20  # bytes
CHUNK = 1 << 18  # bytes that must get through within one time-out
WAITING = 64  # connections that have not said anything yet
OPEN = 512  # connections that are answered at once: a file descriptor each, of which a process often has 1024
HOSTS = 64  # whose refused connections are remembered


class LinkError(OSError):
    """A conversation has ended early: refused, cut, silent for too long, or not in our protocol."""


@runtime_checkable
class Conversation(Protocol):
    """Two islands taking turns, in one connection. `peer` is the name in the other's certificate; None without TLS.

    Both calls raise `LinkError`, at the latest when nothing has moved for the transport's time-out.
    """

    peer: str | None

    async def send(self, head: Head, *body: Any) -> None:
        """Send a message; each part of the body is anything with a contiguous buffer."""

    async def receive(self, longest: int = 0) -> tuple[Head, bytearray]:
        """The next message. One with a longer body than `longest` bytes is refused before it is read."""


@runtime_checkable
class Transport(Protocol):
    """How islands reach each other: what `Island` needs of a network, and what a test can put in its place."""

    async def serve(self, answer: Callable[[Conversation], Awaitable[None]]) -> str:
        """Have every conversation that others begin answered; the address at which they can."""

    def connect(self, address: str, name: str | None) -> contextlib.AbstractAsyncContextManager[Conversation]:
        """Begin a conversation, with the island of this name if one is given."""

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
        whom, task, writer = f"a connection from {host}", asyncio.current_task(), None
        assert task is not None

        def on_head() -> None:
            if self._waiting.pop(task, None):
                self.refused.pop(host, None)

        seconds = 0.0  # nobody waits for one that has said nothing, or when this transport is closed
        try:
            with _as_link_error(whom, self._if_mute):
                reader, writer = await self._opened(sock)
            await answer(_Stream(reader, writer, whom, self.timeout, on_head=on_head))
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
            if writer:
                await _end(writer, seconds)

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
        whom = f"{name} at {address}" if name else address
        with _as_link_error(whom):
            host, port = split_address(address)
            secure = self._secure(server=False, check_name=name is not None)
            secure |= {"server_hostname": name or ""} if self.tls else {}
            async with asyncio.timeout(self.timeout):
                reader, writer = await asyncio.open_connection(host, port, limit=CHUNK, **secure)
        try:
            yield _Stream(reader, writer, whom, self.timeout, self._if_mute)
        finally:
            self._keep(self._ending, _end(writer, self.timeout))

    async def close(self) -> None:
        if self._again:
            self._again.cancel()
        if self._listener:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
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


async def _end(writer: asyncio.StreamWriter, seconds: float) -> None:
    """Send what is still to be sent, but not for ever: the other may not read it."""
    try:
        writer.close()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(seconds):
                await writer.wait_closed()
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class _Stream:
    """A message is two lengths, of head and body, then both."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        whom: str,
        timeout: float,
        if_mute: str = "",
        on_head: Callable[[], Any] = lambda: None,
    ):
        self.reader, self.writer, self.timeout, self.if_mute, self.on_head = reader, writer, timeout, if_mute, on_head
        self.peer = name_of(writer.get_extra_info("peercert"))
        self.whom = self.peer or whom

    async def send(self, head: Head, *body: Any) -> None:
        coded = json.dumps(head).encode()
        views = [memoryview(part).cast("B") for part in body]
        with _as_link_error(self.whom, self.if_mute):
            self.writer.write(struct.pack("!IQ", len(coded), sum(len(view) for view in views)) + coded)
            for view in views:
                for start in range(0, len(view), CHUNK):
                    self.writer.write(view[start : start + CHUNK])
                    async with asyncio.timeout(self.timeout):
                        await self.writer.drain()
            async with asyncio.timeout(self.timeout):
                await self.writer.drain()

    async def receive(self, longest: int = 0) -> tuple[Head, bytearray]:
        with _as_link_error(self.whom, self.if_mute):
            async with asyncio.timeout(self.timeout):
                of_head, of_body = struct.unpack("!IQ", await self.reader.readexactly(12))
            if of_head > LONGEST_HEAD or of_body > longest:
                raise LinkError(f"{self.whom}: a message of {of_head} + {of_body} bytes where {longest} were expected")
            async with asyncio.timeout(self.timeout):
                head = json.loads(await self.reader.readexactly(of_head))
            if not isinstance(head, dict):
                raise LinkError(f"{self.whom}: a message whose head is no JSON object")
            self.on_head()
            self.if_mute = ""
            body = bytearray(of_body)
            for start in range(0, of_body, CHUNK):
                end = min(start + CHUNK, of_body)
                async with asyncio.timeout(self.timeout):
                    body[start:end] = await self.reader.readexactly(end - start)
        return head, body


@contextlib.contextmanager
def _as_link_error(whom: str, if_ended: str = "") -> Iterator[None]:
    try:
        yield
    except LinkError:
        raise
    except TimeoutError as error:
        raise LinkError(f"{whom}: nothing moved for the time-out") from error
    except (EOFError, ConnectionResetError, BrokenPipeError) as error:
        raise LinkError(f"{whom}: the connection has ended{if_ended}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise LinkError(f"{whom}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in (18, 19, 20):  # OpenSSL's words for it depend on what the other has sent
            return "its certificate is refused: it is not of this run's authority"
        return f"its certificate is refused: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.lower().replace("_", " ")
        return f"it has ended TLS: {words}" if "alert" in words else f"no TLS of this run: {words}"
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno).lower()
    return f"{type(error).__name__} {error}"


def name_of(certificate: Any) -> str | None:
    """The island's name in a verified certificate."""
    return next((value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"), None)


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
