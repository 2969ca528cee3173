"""Conversations between islands: messages of a small JSON head and a body of bytes, over TCP with mutual TLS."""

import asyncio
import contextlib
import json
import ssl
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

Head = dict[str, Any]
LONGEST_HEAD = 1 << 20  # bytes
CHUNK = 1 << 18  # bytes that must get through within one time-out
WAITING = 64  # connections that have not said anything yet


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
    """Files of one run's certificate authority, and of one island's certificate and key (`islands keys` makes them)."""

    ca: str
    certificate: str
    key: str

    def context(self, *, server: bool, check_name: bool = True) -> ssl.SSLContext:
        """TLS 1.3 with certificates of this authority on both sides."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(self.ca)
        context.load_cert_chain(self.certificate, self.key)
        context.check_hostname = check_name and not server
        context.verify_mode = ssl.CERT_REQUIRED
        return context


class Tcp:
    """Conversations over TCP: with mutual TLS, or in plain text where `tls` is None.

    `bind` is "host:port" of one interface, port 0 for any that is free. What nobody reads or sends for `timeout`
    seconds, in pieces of 256 KiB, has failed; a slow link is not a dead one.
    """

    def __init__(self, bind: str, *, tls: Tls | None, timeout: float = 10.0):
        self.host, self.port = split_address(bind)
        if self.host in ("", "0.0.0.0", "::", "*"):
            raise ValueError(
                f"`bind` must name one interface, got {bind!r}, which is all of them: pass the address at which the "
                'other islands reach this one, as "10.0.3.7:7000".'
            )
        self.tls, self.timeout = tls, timeout
        self._server: asyncio.Server | None = None
        self._waiting: dict[asyncio.StreamWriter, None] = {}  # in the order in which they came
        self._open: set[asyncio.StreamWriter] = set()

    async def serve(self, answer: Callable[[Conversation], Awaitable[None]]) -> str:
        async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._open.add(writer)
            self._waiting[writer] = None
            if len(self._waiting) > WAITING:  # of those who connect and say nothing the oldest goes
                oldest = next(iter(self._waiting))
                del self._waiting[oldest]
                oldest.transport.abort()
            try:
                with contextlib.suppress(LinkError):
                    await answer(_Stream(reader, writer, self.timeout, on_head=lambda: self._waiting.pop(writer, None)))
            finally:
                self._waiting.pop(writer, None)
                self._open.discard(writer)
                writer.transport.abort() if writer.transport.is_closing() else writer.close()

        secure: dict[str, Any] = {}
        if self.tls:
            secure = {"ssl": self.tls.context(server=True), "ssl_handshake_timeout": self.timeout}
        self._server = await asyncio.start_server(
            on_connection, self.host, self.port, limit=CHUNK, backlog=1024, **secure
        )
        port = self._server.sockets[0].getsockname()[1]
        return f"{self.host}:{port}"

    @contextlib.asynccontextmanager
    async def connect(self, address: str, name: str | None):
        host, port = split_address(address)
        secure: dict[str, Any] = {}
        if self.tls:
            context = self.tls.context(server=False, check_name=name is not None)
            secure = {"ssl": context, "server_hostname": name or "", "ssl_handshake_timeout": self.timeout}
        with _as_link_error(f"{name or 'nobody'} at {address}"):
            async with asyncio.timeout(self.timeout):
                reader, writer = await asyncio.open_connection(host, port, limit=CHUNK, **secure)
        try:
            yield _Stream(reader, writer, self.timeout)
        finally:
            writer.close()

    async def close(self) -> None:
        if self._server:
            self._server.close()
            for writer in list(self._open):
                writer.transport.abort()


class _Stream:
    """A message is two lengths, of head and body, then both."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        timeout: float,
        on_head: Callable[[], Any] = lambda: None,
    ):
        self.reader, self.writer, self.timeout, self.on_head = reader, writer, timeout, on_head
        self.peer = name_of(writer.get_extra_info("peercert"))

    async def send(self, head: Head, *body: Any) -> None:
        coded = json.dumps(head).encode()
        views = [memoryview(part).cast("B") for part in body]
        with _as_link_error(self.peer or "the peer"):
            self.writer.write(struct.pack("!IQ", len(coded), sum(len(view) for view in views)) + coded)
            for view in views:
                for start in range(0, len(view), CHUNK):
                    self.writer.write(view[start : start + CHUNK])
                    async with asyncio.timeout(self.timeout):
                        await self.writer.drain()
            async with asyncio.timeout(self.timeout):
                await self.writer.drain()

    async def receive(self, longest: int = 0) -> tuple[Head, bytearray]:
        with _as_link_error(self.peer or "the peer"):
            async with asyncio.timeout(self.timeout):
                of_head, of_body = struct.unpack("!IQ", await self.reader.readexactly(12))
            if of_head > LONGEST_HEAD or of_body > longest:
                raise LinkError(f"a message of {of_head} + {of_body} bytes where {longest} were expected")
            async with asyncio.timeout(self.timeout):
                head = json.loads(await self.reader.readexactly(of_head))
            if not isinstance(head, dict):
                raise LinkError("a message whose head is no JSON object")
            self.on_head()
            body = bytearray(of_body)
            view, at = memoryview(body), 0
            while at < of_body:
                async with asyncio.timeout(self.timeout):
                    part = await self.reader.read(min(CHUNK, of_body - at))
                if not part:
                    raise LinkError("the connection ended in the middle of a message")
                view[at : at + len(part)] = part
                at += len(part)
        return head, body


@contextlib.contextmanager
def _as_link_error(whom: str) -> Iterator[None]:
    try:
        yield
    except LinkError:
        raise
    except TimeoutError as error:
        raise LinkError(f"{whom}: nothing moved for the time-out") from error
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise LinkError(f"{whom}: {type(error).__name__} {error}") from error


def name_of(certificate: Any) -> str | None:
    """The island's name in a verified certificate."""
    names = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"]
    return names[0] if names else None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port"; raises `ValueError`."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        raise ValueError(f'an address must be "host:port", got {address!r}.')
    return host.strip("[]"), int(port)
