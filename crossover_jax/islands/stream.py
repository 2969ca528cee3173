"""Messages on one connection: two lengths, of head and body, then both. Nothing is waited for without an end."""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from typing import Any

Head = dict[str, Any]
LONGEST_HEAD = 1 << 20  # bytes
CHUNK = 1 << 18  # bytes that must get through within one time-out
OLDEST = 600.0  # seconds of a connection: then both look at each other's certificate again


class LinkError(OSError):
    """A conversation has ended early: refused, cut, silent for too long, or not in our protocol."""


class Stream:
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
        self._begun = b""  # of the next message
        self._packets = 0, 0
        self._until = asyncio.get_running_loop().time() + OLDEST
        self.peer = name_of(writer.get_extra_info("peercert"))
        self.whom = self.peer or whom

    def can_be_kept(self) -> bool:
        """Whether the other side has not ended it, so far as is known here, and it is not too old."""
        is_old = asyncio.get_running_loop().time() >= self._until
        return not (is_old or self.reader.at_eof() or self.writer.is_closing())

    async def begins(self) -> bool:
        """Whether the other side begins another conversation, before it ends or has been silent for the time-out."""
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self.timeout):
                self._begun = await self.reader.read(1)
        return bool(self._begun)

    async def send(self, head: Head, *body: Any) -> None:
        coded = json.dumps(head).encode()
        views = [memoryview(part).cast("B") for part in body]
        with as_link_error(self.whom, self.if_mute):
            self.writer.write(struct.pack("!IQ", len(coded), sum(len(view) for view in views)) + coded)
            for view in views:
                for start in range(0, len(view), CHUNK):
                    self.writer.write(view[start : start + CHUNK])
                    async with asyncio.timeout(self.timeout):
                        await self.writer.drain()
            async with asyncio.timeout(self.timeout):
                await self.writer.drain()

    async def receive(self, longest: int = 0) -> tuple[Head, bytearray]:
        with as_link_error(self.whom, self.if_mute):
            async with asyncio.timeout(self.timeout):
                begun, self._begun = self._begun, b""
                lengths = begun + await self.reader.readexactly(12 - len(begun))
            of_head, of_body = struct.unpack("!IQ", lengths)
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

    def packets(self) -> tuple[int, int]:
        """Packets that were sent since the last call, and sent again; zeros where the system does not say."""
        try:
            sock = self.writer.get_extra_info("socket")
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 140)
            found = *struct.unpack_from("=I", info, 136), *struct.unpack_from("=I", info, 100)  # of struct tcp_info
        except (AttributeError, OSError, struct.error):  # not Linux
            return 0, 0
        (sent, again), self._packets = self._packets, found
        return found[0] - sent, found[1] - again

    async def end(self, seconds: float) -> None:
        """Send what is still to be sent, but not for ever: the other may not read it."""
        try:
            self.writer.close()
            with contextlib.suppress(OSError):
                async with asyncio.timeout(seconds):
                    await self.writer.wait_closed()
        finally:
            self.writer.transport.abort()
            with contextlib.suppress(OSError):
                await self.writer.wait_closed()


@contextlib.contextmanager
def as_link_error(whom: str, if_ended: str = "") -> Iterator[None]:
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
