"""Conversations over TCP, in plain text and with mutual TLS: they arrive whole, or end in time and say why."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import re
import socket
import struct
import time
import tracemalloc

import pytest

from crossover_jax.islands import keys
from crossover_jax.islands.stream import CHUNK, LONGEST_HEAD, LinkError
from crossover_jax.islands.transport import WAITING, Tcp, Tls, split_address
from tests.islands.sockets import run, until


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    keys.make_keys(str(directory), ["a", "b", "c"])
    return directory


@pytest.fixture(params=["plain text", "TLS"])
def tls_of(request, certified):
    return (lambda name: None) if request.param == "plain text" else (lambda name: Tls.of(str(certified), name))


@contextlib.asynccontextmanager
async def served(answer, tls=None, timeout=2.0):
    tcp = Tcp("127.0.0.1:0", tls=tls, timeout=timeout)
    address = await tcp.serve(answer)
    try:
        yield tcp, address
    finally:
        await tcp.close()


def framed(head, body=b"", of_body=None):
    coded = json.dumps(head).encode()
    return struct.pack("!IQ", len(coded), len(body) if of_body is None else of_body) + coded + body


async def echo(conversation):
    head, body = await conversation.receive(1 << 30)
    await conversation.send(head | {"peer": conversation.peer}, body[: len(body) // 2], body[len(body) // 2 :])


async def send_bytes(address, data):
    """Send bytes as they are, and read to the end."""
    host, port = split_address(address)
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(data)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_messages_arrive_whole(tls_of, size):
    async def talk():
        async with served(echo, tls_of("a")) as (_, address):
            client = Tcp("127.0.0.1:0", tls=tls_of("b"))
            body = os.urandom(size)
            async with client.connect(address, "a") as conversation:
                await conversation.send({"number": 1.5, "text": "µ"}, body)
                head, found = await conversation.receive(size)
            assert head == {"number": 1.5, "text": "µ", "peer": "b" if client.tls else None}
            assert found == body
            assert conversation.peer == ("a" if client.tls else None)
            await client.close()

    run(talk())


def test_many_conversations_at_once(tls_of):
    async def talk():
        async with served(echo, tls_of("a")) as (tcp, address):
            client = Tcp("127.0.0.1:0", tls=tls_of("b"))

            async def one(k):
                async with client.connect(address, "a") as conversation:
                    await conversation.send({"k": k}, bytes([k]) * 100_000)
                    head, body = await conversation.receive(100_000)
                    return head["k"] == k and body == bytes([k]) * 100_000

            assert all(await asyncio.gather(*map(one, range(50))))
            await client.close()
            await until(lambda: not tcp._answering and not client._ending)  # nothing is left open

    run(talk())


def test_a_connection_is_kept_for_the_next_conversation_and_no_longer_than_half_of_the_timeout(tls_of, monkeypatch):
    """A new connection costs a round trip, two with TLS."""

    async def talk():
        opened = []

        async def answer(conversation):
            opened.append(conversation)
            await echo(conversation)

        async def ask(k):
            async with client.connect(address, "a") as conversation:
                await conversation.send({"k": k}, bytes([k]) * 1000)
                head, body = await conversation.receive(1000)
                assert (head["k"], body) == (k, bytes([k]) * 1000)

        async with served(answer, tls_of("a"), timeout=2.0) as (tcp, address):
            client = Tcp("127.0.0.1:0", tls=tls_of("b"), timeout=2.0)
            for k in range(5):
                await ask(k)
            assert len({id(one) for one in opened}) == len(tcp._answering) == 1
            await asyncio.gather(*map(ask, range(3)))
            assert len({id(one) for one in opened}) == len(tcp._answering) == 3  # one conversation at a time on each
            with pytest.raises(RuntimeError):
                async with client.connect(address, "a"):
                    raise RuntimeError  # whatever has not come to its end is not gone on with
            await until(lambda: len(tcp._answering) == 2)
            await until(lambda: not tcp._answering and not client._kept, 4.0)
            await ask(6)
            before = len({id(one) for one in opened})
            monkeypatch.setattr("crossover_jax.islands.stream.OLDEST", 0.0)
            for stream in client._kept:
                stream._until = 0.0
            await ask(7)
            await ask(8)
            assert len({id(one) for one in opened}) == before + 2  # since each one before was too old
            monkeypatch.undo()
            monkeypatch.setattr("crossover_jax.islands.transport.KEPT", 3)
            await asyncio.gather(*map(ask, range(6)))
            assert len(client._kept) == 3
            await client.close()
            await until(lambda: not tcp._answering)

    run(talk())


def test_a_kept_connection_that_the_other_side_has_ended_is_opened_anew(tls_of):
    async def talk():
        client, address = Tcp("127.0.0.1:0", tls=tls_of("b")), "127.0.0.1:0"
        for _ in range(3):
            tcp = Tcp(address, tls=tls_of("a"))
            address = await tcp.serve(echo)
            async with client.connect(address, "a") as conversation:
                await conversation.send({"k": 1})
                assert (await conversation.receive())[0]["k"] == 1
            await tcp.close()  # and is there again under the same address
            await until(lambda: not any(stream.can_be_kept() for stream in client._kept))
        await client.close()

    run(talk())


def test_an_island_is_who_its_certificate_says(certified):
    async def talk():
        async with served(echo, Tls.of(str(certified), "a")) as (tcp, address):
            client = Tcp("127.0.0.1:0", tls=Tls.of(str(certified), "c"))
            with pytest.raises(LinkError, match=r"^b at .*: its certificate is refused: .*not valid for 'b'"):
                async with client.connect(address, "b"):
                    pass
            await until(lambda: "refused our certificate" in tcp.refused.get("127.0.0.1", ""))
            async with client.connect(address, None) as conversation:  # whose name is not known beforehand
                assert conversation.peer == "a"

    run(talk())


def test_a_certificate_that_is_renewed_is_used_at_once(tmp_path):
    keys.make_keys(str(tmp_path), ["a", "b"])

    async def talk():
        serials = []

        async def answer(conversation):
            serials.append(conversation.writer.get_extra_info("peercert")["serialNumber"])
            await echo(conversation)

        async with served(answer, Tls.of(str(tmp_path), "a")) as (_, address):
            client = Tcp("127.0.0.1:0", tls=Tls.of(str(tmp_path), "b"))
            for _ in range(2):
                async with client.connect(address, "a") as conversation:
                    await conversation.send({})
                    await conversation.receive()
                keys.make_keys(str(tmp_path), ["b"])
        assert len(set(serials)) == 2

    run(talk())


@pytest.mark.parametrize("of_body", [1, 11, 1 << 30, 1 << 60, (1 << 64) - 1])
def test_a_longer_body_than_expected_is_refused_before_it_is_read_or_has_memory(of_body):
    async def talk():
        errors = []

        async def answer(conversation):
            try:
                await conversation.receive(10 if of_body > 10 else 0)
            except LinkError as error:
                errors.append(str(error))
                raise

        async with served(answer) as (_, address):
            tracemalloc.start()
            await send_bytes(address, framed({"do": "exchange"}, b"", of_body))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        (error,) = errors
        assert f"{of_body} bytes where" in error
        assert peak < 1 << 22

    run(talk())


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (struct.pack("!IQ", LONGEST_HEAD + 1, 0), r"a message of 1048577 \+ 0 bytes"),
        (struct.pack("!IQ", 3, 0) + b"\xff\xfe{", "UnicodeDecodeError"),
        (struct.pack("!IQ", 5, 0) + b"hello", "JSONDecodeError"),
        (struct.pack("!IQ", 0, 0), "JSONDecodeError"),
        (struct.pack("!IQ", 100_000, 0) + b"[" * 100_000, "RecursionError"),
        (struct.pack("!IQ", 60_000, 0) + b'{"a":' * 12_000, "RecursionError"),
        (struct.pack("!IQ", 5000, 0) + b"7" * 5000, "ValueError"),
        (framed([1, 2]), "a message whose head is no JSON object"),
        (framed("text"), "a message whose head is no JSON object"),
        (b"\0\0", "the connection has ended"),
        (framed({}, b"", 10)[:-1], "the connection has ended"),
        (framed({}, b"12345", 10), "the connection has ended"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "a message of 1195725856"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_not_in_the_protocol_is_refused_with_a_sentence(data, error, caplog):
    async def talk():
        async def answer(conversation):
            await conversation.receive(10)

        async with served(answer) as (tcp, address):
            host, port = split_address(address)
            _, writer = await asyncio.open_connection(host, port)
            writer.write(data)
            writer.write_eof()
            await until(lambda: tcp.refused or caplog.records or not tcp._answering)
            await until(lambda: not tcp._answering)
            writer.close()
            return tcp.refused.get("127.0.0.1", "")

    said = run(talk())
    if b"12345" not in data:  # of one that has told its name, it is the island that says what was wrong
        assert said.startswith("a connection from 127.0.0.1: ")
        assert re.search(error, said)


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 999]
)
def test_what_is_not_tls_is_refused_with_a_sentence(data, certified, caplog):
    async def talk():
        async with served(echo, Tls.of(str(certified), "a")) as (tcp, address):
            for _ in range(3):
                host, port = split_address(address)
                _, writer = await asyncio.open_connection(host, port)
                writer.write(data)
                writer.write_eof()
                await until(lambda: "127.0.0.1" in tcp.refused)
                await until(lambda: not tcp._answering)
                writer.close()
            client = Tcp("127.0.0.1:0", tls=Tls.of(str(certified), "b"))
            said = tcp.refused["127.0.0.1"]
            async with client.connect(address, "a") as conversation:
                await conversation.send({})
                await conversation.receive()
            assert not tcp.refused  # since one from there was in order
            return said

    with caplog.at_level(logging.WARNING):
        said = run(talk())
    assert [record.getMessage() for record in caplog.records] == [said]  # once, however often it is tried


def test_a_link_on_which_nothing_moves_fails_in_time(tls_of):
    async def talk():
        async def mute(conversation):
            await asyncio.sleep(60.0)

        async with served(mute, tls_of("a"), timeout=0.3) as (_, address):
            client, begin = Tcp("127.0.0.1:0", tls=tls_of("b"), timeout=0.3), time.monotonic()
            async with client.connect(address, "a") as conversation:
                with pytest.raises(LinkError, match="nothing moved for the time-out"):
                    await conversation.receive()
                with pytest.raises(LinkError, match="nothing moved for the time-out"):
                    await conversation.send({}, bytes(50_000_000))  # which nobody reads
            assert 0.5 < time.monotonic() - begin < 10.0
            own = conversation.writer.get_extra_info("socket")
            await until(lambda: own.fileno() < 0, 10.0)  # what nobody reads does not keep the connection open

    run(talk())


def test_who_drips_bytes_does_not_hold_a_conversation(certified):
    async def talk():
        errors = []

        async def answer(conversation):
            begin = time.monotonic()
            with pytest.raises(LinkError) as error:
                await conversation.receive(100)
            errors.append((str(error.value), time.monotonic() - begin))

        async with served(answer, timeout=0.4) as (_, address):
            host, port = split_address(address)
            _, writer = await asyncio.open_connection(host, port)
            writer.write(framed({}, b"", 100))
            for _ in range(40):
                if errors:
                    break
                writer.write(b"x")
                await asyncio.sleep(0.05)
            writer.close()
        ((error, seconds),) = errors
        assert "nothing moved" in error
        assert seconds < 1.5

    run(talk())


def test_a_slow_link_is_not_a_dead_one():
    async def talk():
        found = []

        async def answer(conversation):
            found.append(len((await conversation.receive(4 * CHUNK))[1]))

        async with served(answer, timeout=0.4) as (_, address):
            host, port = split_address(address)
            _, writer = await asyncio.open_connection(host, port)
            writer.write(framed({}, b"", 4 * CHUNK))
            for _ in range(8):  # 0.8 s in all, twice the time-out
                writer.write(bytes(CHUNK // 2))
                await asyncio.sleep(0.1)
            await until(lambda: found)
            writer.close()
        assert found == [4 * CHUNK]

    run(talk())


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:99999", "127.0.0.1:²", "a\0b:1", f"{'x' * 300}.com:1", ":"])
def test_an_address_that_is_none_is_a_failed_link(address):
    async def talk():
        with pytest.raises(LinkError):
            async with Tcp("127.0.0.1:0", tls=None).connect(address, "a"):
                pass

    run(talk())


def test_a_key_that_is_missing_for_a_while_is_a_failed_link(tmp_path):
    keys.make_keys(str(tmp_path), ["a"])
    tls = Tls.of(str(tmp_path), "a")
    (tmp_path / "a.key").unlink()

    async def talk():
        with pytest.raises(LinkError, match="no such file"):
            async with Tcp("127.0.0.1:0", tls=tls).connect("127.0.0.1:1", "a"):
                pass

    run(talk())


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "0:0", ":0", "[::]:0", "*:0"])
def test_all_interfaces_are_never_bound(bind):
    with pytest.raises(ValueError, match="`bind` must name one interface"):
        run(Tcp(bind, tls=None).serve(echo))


def test_an_address_of_ipv6_can_be_connected_to():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")

    async def talk():
        tcp = Tcp("[::1]:0", tls=None)
        address = await tcp.serve(echo)
        assert address.startswith("[::1]:")
        async with tcp.connect(address, None) as conversation:
            await conversation.send({"k": 1})
            assert (await conversation.receive())[0]["k"] == 1
        await tcp.close()

    run(talk())


def test_a_fault_of_ours_ends_one_conversation_and_is_logged(caplog):
    async def talk():
        async def answer(conversation):
            head, _ = await conversation.receive()
            await conversation.send({"half": 1 / head["k"]})

        async with served(answer) as (tcp, address):
            for k in (0, 2):
                with contextlib.suppress(LinkError):
                    async with tcp.connect(address, None) as conversation:
                        await conversation.send({"k": k})
                        found = (await conversation.receive())[0]
            assert found == {"half": 0.5}

    with pytest.raises(AssertionError, match="ZeroDivisionError"):  # `run` sees what is logged as an error
        run(talk())


def test_of_those_who_say_nothing_the_host_with_most_loses_its_oldest(tls_of):
    async def talk():
        async with served(echo, tls_of("a"), timeout=5.0) as (tcp, address):
            host, port = split_address(address)
            honest = await asyncio.open_connection(host, port, local_addr=("127.0.0.1", 0))
            await until(lambda: len(tcp._waiting) == 1)
            crowd = [await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0)) for _ in range(2 * WAITING)]
            await until(lambda: len(tcp._waiting) == WAITING and len(tcp._answering) == WAITING)
            assert "127.0.0.1" in tcp._waiting.values()  # though it is the oldest of all
            read = [asyncio.create_task(reader.read()) for reader, _ in crowd]
            await until(lambda: sum(task.done() for task in read) == WAITING + 1)
            assert all(task.done() for task in read[:WAITING])  # they have been ended, and not only forgotten
            await asyncio.gather(*(tcp_end(task) for task in read if task.done()))
            for _, writer in (honest, *crowd):
                writer.close()
            for task in read:
                task.cancel()
            await asyncio.gather(*read, return_exceptions=True)

    run(talk())


async def tcp_end(task):
    with contextlib.suppress(ConnectionError):
        assert await task == b""


def test_whoever_is_closed_while_another_connects_leaves_no_socket_open(tls_of):
    """At whatever turn of the event loop: asyncio leaves open what is cancelled before its handshake."""

    async def talk(turns):
        async def answer(conversation):
            await asyncio.sleep(1)

        async def ask():
            async with Tcp("127.0.0.1:0", tls=tls_of("b"), timeout=2.0).connect(address, "a"):
                await asyncio.sleep(1)

        async with served(answer, tls_of("a")) as (_, address):
            asking = asyncio.create_task(ask())
            for _ in range(turns):
                await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    for turns in range(16):
        run(talk(turns))
        gc.collect()  # an open socket that nobody holds is a warning, and a warning is an error
