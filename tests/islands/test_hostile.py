"""Wrong and hostile ones, on real sockets: refused with a sentence, and two islands that exchange notice nothing."""

import asyncio
import contextlib
import datetime
import itertools
import json
import re
import socket
import ssl
import struct
import time

import jax.numpy as jnp
import numpy as np
import pytest

from crossover_jax.cuts import by_size
from crossover_jax.islands import Island, Superseded, keys, static
from crossover_jax.islands.ledger import Publication
from crossover_jax.islands.payload import Payload
from crossover_jax.islands.stream import LinkError
from crossover_jax.islands.transport import WAITING, Tls, split_address
from tests.islands.sockets import SEGMENTS, SIZE, Peer, exchanges, layout, pair, run, until

PARAMS = {"w": jnp.ones((8, 8))}
WORDS = np.zeros(SIZE).tobytes()


@pytest.fixture(scope="module")
def certified(tmp_path_factory):
    """Keys of the run, of another run, and of an island h whose certificate has expired."""
    root = tmp_path_factory.mktemp("keys")
    keys.make_keys(str(root / "run"), ["a", "b", "c", "h"])
    keys.make_keys(str(root / "other"), ["h"])
    with pytest.MonkeyPatch.context() as patch:
        now = keys._now()
        keys.make_keys(str(root / "expired"), ["x"])
        for name in ("ca.crt", "ca.key"):
            (root / "expired" / name).write_bytes((root / "run" / name).read_bytes())
        patch.setattr(keys, "_now", lambda: now - datetime.timedelta(days=100))
        keys.make_keys(str(root / "expired"), ["h"])
    return root


@pytest.fixture(params=["plain text", "TLS"])
def how(request, certified):
    return {} if request.param == "plain text" else {"keys": certified / "run"}


def said_in(caplog, sentence):
    return any(re.search(sentence, record.getMessage()) for record in caplog.records)


# Certificates


@pytest.mark.parametrize(
    ("authority", "certificate", "server", "client"),
    [
        ("run", "other", "its certificate is refused: it is not of this run's authority", "refused our certificate"),
        ("run", "expired", "its certificate is refused: certificate has expired", "refused our certificate"),
        ("other", "other", "refused our certificate|has ended TLS", "it is not of this run's authority"),
    ],
)
def test_a_certificate_that_does_not_hold_is_refused_on_both_sides(
    certified, authority, certificate, server, client, caplog
):
    async def talk():
        async with pair(keys=certified / "run") as (a, b):
            own = certified / certificate
            tls = Tls(str(certified / authority / "ca.crt"), str(own / "h.crt"), str(own / "h.key"))
            h = await Peer("h", tls=tls).start()
            h.meets(a)
            a.node.links.members["h"] = h.address
            for _ in range(3):
                assert not await h.node.exchange(0, "a")
                assert not await exchange_of(a, "h")
            assert re.search(client, h.node.links.errors["a"])
            await until(lambda: said_in(caplog, f"connection from 127.0.0.1: .*({server})"))
            assert re.search("certificate", a.node.links.errors["h"])  # as the client a has its own sentence
            a.node.links.members.pop("h"), a.node.links.errors.pop("h")
            await h.stop()
            assert h.node.exchanged == 0

    run(talk())


async def exchange_of(peer, name):
    """An exchange of a segment that is on offer."""
    for _ in range(400):
        for segment in range(SEGMENTS):
            if peer.node.ledger.is_offered(segment):
                return await peer.node.exchange(segment, name)
        await asyncio.sleep(0.002)
    raise AssertionError("no segment is on offer")


def test_without_a_certificate_nobody_is_answered(certified, caplog):
    async def talk():
        async with pair(keys=certified / "run") as (a, _):
            context = ssl.create_default_context(cafile=str(certified / "run" / "ca.crt"))
            host, port = split_address(a.address)
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname="a")
            writer.write(framed(hello("b") | {"do": "status"}))
            with contextlib.suppress(OSError):
                assert await reader.read() == b""
            writer.transport.abort()
            await until(lambda: said_in(caplog, "no TLS of this run: peer did not return a certificate"))

    run(talk())


def test_a_member_cannot_speak_for_another(certified, caplog):
    async def talk():
        async with pair(keys=certified / "run") as (a, b):
            false = await Peer("b", tls=Tls.of(str(certified / "run"), "c"), incarnation=9).start()
            false.meets(a)
            assert not await false.node.exchange(0, "a")
            sentence = "the certificate is that of 'c', not of 'b'"
            assert false.node.links.errors["a"] == f"refused: {sentence}"
            assert said_in(caplog, sentence)
            a.node.links.members["b"] = false.address  # as of a roster that somebody has written into
            await until(lambda: "not valid for 'b'" in a.node.links.errors.get("b", ""))
            a.meets(b), a.node.links._not_before.clear()
            await until(lambda: "b" not in a.node.links.errors)
            assert a.node.incarnations["b"] == 1
            await false.stop()

    run(talk())


def test_an_answer_in_the_name_of_another_is_not_believed(how):
    """Else one member could say that a newer process has the name of any other, which would then end."""

    async def talk():
        async with pair(**how) as (a, _):
            c = await Peer("c", **how).start()
            honest = c.node.hello
            for name in ("a", "b"):
                c.node.hello = lambda name=name: honest() | {"from": name, "incarnation": 1 << 60}
                a.node.links.members["c"] = c.address
                with pytest.raises(LinkError, match=f"'c' was asked, and {name} has answered"):
                    await a.node.status("c")
                a.node.links.members.pop("c")
            assert a.node.over is None
            assert a.node.incarnations == {"b": 1}
            await c.stop()

    run(talk())


def test_the_observer_may_look_and_nothing_else(certified):
    async def talk():
        async with pair(keys=certified / "run") as (a, _):
            observer = await Peer("observer", keys=certified / "run").start()
            observer.meets(a)
            assert (await observer.node.status("a"))["steps"] == 0
            before = a.node.links.counts["refused"]
            assert not await observer.node.exchange(0, "a")
            assert observer.node.links.errors["a"] == "refused: 'observer' may look, and nothing else"
            with pytest.raises(LinkError, match="may look, and nothing else"):
                await observer.node.fetch("a", "state", 8)
            assert a.node.links.counts["refused"] == before + 2
            await observer.stop()

    run(talk())


# Bytes


GARBAGE = {
    "HTTP": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "SMB": bytes.fromhex("00000085ff534d4272000000001853c8") + bytes(120),
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(range(200)),
    "zeros": bytes(5000),
    "ones": b"\xff" * 5000,
    "one byte": b"\0",
    "nothing": b"",
    "noise": np.random.default_rng(0).bytes(100_000),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_bytes_of_a_port_scanner_are_refused_with_a_sentence(how, name, caplog):
    async def talk():
        async with pair(**how) as (a, b):
            for end in (True, False):
                reader, writer = await open_raw(a)
                writer.write(GARBAGE[name])
                if end:
                    writer.write_eof()
                    with contextlib.suppress(OSError):
                        await asyncio.wait_for(reader.read(), 5)
                writer.transport.abort()
            await until(lambda: said_in(caplog, "connection from 127.0.0.2: "))
            await exchanges(a, b)
            assert "127.0.0.2" in a.node.describe()["strangers"]

    run(talk())


async def open_raw(peer):
    """A connection without TLS, from an address of this machine that no island has."""
    host, port = split_address(peer.address)
    return await asyncio.open_connection(host, port, local_addr=("127.0.0.2", 0))


@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"])
def test_a_thousand_silent_connections_hold_up_nobody(how, source):
    async def talk():
        async with pair(**how) as (a, b):
            host, port = split_address(a.address)
            sockets = []

            def connect():
                for _ in range(1000):
                    sockets.append(socket.create_connection((host, port), 5, (source, 0)))

            connecting = asyncio.create_task(asyncio.to_thread(connect))
            await exchanges(a, b)
            await connecting
            assert len(sockets) == 1000
            await exchanges(a, b)
            assert len(a.tcp._waiting) <= WAITING + 1
            assert len(a.tcp._answering) <= WAITING + 2 * SEGMENTS
            for one in sockets:
                one.close()
            a.node.links.errors.clear(), b.node.links.errors.clear()  # one of theirs may have been the oldest

    run(talk())


# Requests


def framed(head, body=b"", of_body=None):
    coded = json.dumps(head).encode()
    return struct.pack("!IQ", len(coded), len(body) if of_body is None else of_body) + coded + body


def hello(name="h", incarnation=7):
    said = layout()
    clock = {f"{name}@{incarnation}": 3.0}
    return {
        "from": name,
        "incarnation": incarnation,
        "model": said.model,
        "fingerprint": said.fingerprint,
        "clock": clock,
    }


NUMBERS = itertools.count()


def request(segment=0, **fields):
    return hello() | {"do": "exchange", "segment": segment, "id": f"h@7:{next(NUMBERS)}"} | fields


async def read_message(reader):
    of_head, of_body = struct.unpack("!IQ", await reader.readexactly(12))
    return json.loads(await reader.readexactly(of_head)), await reader.readexactly(of_body)


async def ask(peer, *messages):
    """Send bytes; the heads of all answers, until the other side ends."""
    reader, writer = await open_raw(peer)
    heads = []
    try:
        for message in messages:
            writer.write(message)
        writer.write_eof()
        while True:
            heads.append((await asyncio.wait_for(read_message(reader), 5))[0])
            if "wait" in heads[-1]:  # for as long as it takes
                return heads
    except (EOFError, OSError):
        return heads
    finally:
        writer.transport.abort()


async def granted(peer, *messages):
    """As `ask`, of a segment that the other has on offer: the answers behind its grant, and its words on the link."""
    for segment in itertools.chain.from_iterable(itertools.repeat(range(SEGMENTS), 50)):
        peer.node.links.errors.pop("h", None)
        heads = await ask(peer, framed(request(segment)), *messages)
        if "granted" in heads[0]:
            return heads[1:], peer.node.links.errors.get("h", "")
        await asyncio.sleep(0.003)
    raise AssertionError("a segment is never granted")


def test_an_honest_request_is_granted():
    """Else the tests below would all pass with a server that refuses everything."""

    async def talk():
        async with pair() as (a, b):
            own = b.values.mean() * np.ones(SIZE)
            before = a.node.exchanged
            heads, error = await granted(a, framed({}, own.tobytes()), framed({"confirm": True}))
            assert heads == [{}, {"outcome": "committed"}]
            assert error == ""
            assert a.node.exchanged > before

    # What h has given and not taken has changed the sum of a and b.
    with pytest.raises(AssertionError, match=r"Mismatched|Not equal"):
        run(talk())


@pytest.mark.parametrize("said", [{"confirm": False}, {"confirm": 1}, {"confirm": "true"}, {}])
def test_without_a_confirmation_neither_side_applies_anything(said):
    async def talk():
        async with pair() as (a, _):
            heads, _ = await granted(a, framed({}, np.ones(SIZE).tobytes()), framed(said))
            assert heads == [{}, {"outcome": "aborted"}]

    run(talk())  # the sum over a and b is what it was


WRONG = [None, True, -1, 1.5, 1e400, 10**400, 1 << 70, "", "x" * 100_000, [], [[]], {}, {"a": {}}, {"a@1": 10**400}]


@pytest.mark.parametrize(
    "field", ["from", "incarnation", "clock", "do", "model", "fingerprint", "segment", "id", "more"]
)
def test_a_field_of_another_type_is_refused_or_without_effect(field):
    async def talk():
        async with pair() as (a, b):
            before = dict(a.node.clock.counts)
            asked = ("exchange", "outcome", "status", "state", "params") if field == "from" else ("exchange", "status")
            for do in asked:
                requests = [request(do=do) | {field: wrong} for wrong in WRONG]
                for (said, *_), wrong in zip(
                    await asyncio.gather(*(ask(a, framed(r)) for r in requests)), WRONG, strict=True
                ):
                    is_status = said.keys() >= {"steps", "total"}
                    assert is_status or said.keys() & {"refused", "busy", "granted", "outcome", "wait"}, (wrong, do)
                    assert len(said.get("refused", "")) < 500
            assert np.isfinite(a.node.clock.total)
            others = {life: count for life, count in a.node.clock.counts.items() if life not in before}
            assert others in ({}, {"h@7": 3.0})
            assert a.node.incarnations.keys() <= {"b", "h", ""}
            assert set(a.node.incarnations.values()) <= {1, 7}
            assert json.dumps(a.node.describe(), allow_nan=False)
            a.node.wanted = {what: [] for what in a.node.wanted}

    run(talk())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": "other"}, "another model: names, shapes or dtypes of its parameters differ"),
        ({"fingerprint": "other"}, "another cut, wire or version of the protocol: fingerprints differ"),
        ({"do": "delete"}, "delete is nothing that can be asked for"),
        ({"segment": SEGMENTS}, "there is no segment 8"),
        ({"segment": -1}, "there is no segment -1"),
        ({"id": "b@1:0"}, "b@1:0 is no exchange of this asker"),
        ({"do": "outcome", "id": "b@1:0"}, "b@1:0 is no exchange of this asker"),
        ({"from": None}, "a message that is not in this protocol"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_a_sentence(fields, sentence, caplog):
    async def talk():
        async with pair() as (a, _):
            (said,) = await ask(a, framed(request() | fields))
            assert said["refused"] == sentence
            assert said_in(caplog, f"a, exchange with .*: it was refused: {re.escape(sentence)}")
            assert sentence in str(a.node.describe()["errors"])

    run(talk())


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (framed({}, WORDS[:-8]), "must have 128 bytes; it has 120"),
        (framed({}), "must have 128 bytes; it has 0"),
        (framed({}, WORDS + WORDS), "a message of 2 + 256 bytes where 128 were expected"),
        (framed({}, b"", 1 << 60), "a message of 2 + 1152921504606846976 bytes where 128 were expected"),
        (
            framed({}, WORDS[:-8], 128),
            "a message of .* where 0 were expected",
        ),  # what came next was taken for words
        (
            framed({}, np.full(SIZE, np.nan).tobytes()),
            "must be finite and at most 100 times as large as our parameters",
        ),
        (framed({}, np.full(SIZE, -np.inf).tobytes()), "must be finite and at most 100 times"),
        (framed({}, np.full(SIZE, 1e30).tobytes()), r"must be finite and at most 100 times .* and has 1e\+30"),
        (framed({}, np.full(SIZE, -5000.0).tobytes()), "must be finite and at most 100 times .* and has 5000"),
        (b"", "must have 128 bytes; it has 0"),  # but the next message, which has none
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_segment_that_is_no_good_is_refused_and_neither_side_applies_it(message, sentence):
    async def talk():
        async with pair() as (a, _):
            heads, error = await granted(a, message, framed({"confirm": True}))
            assert re.search(sentence.replace("+ ", r"\+ "), error), error
            assert {"outcome": "committed"} not in heads
            if "segment" in error:
                assert heads[-1]["refused"] in error

    run(talk())  # the sum over a and b is what it was


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_nan_and_absurdly_large_segments_are_applied_by_neither(how, bad):
    async def talk():
        async with pair(**how) as (a, b):
            h = await Peer("h", **how).start()
            h.meets(a), h.values.fill(bad), h.step()
            end = time.monotonic() + 30
            while not re.search(
                "refused: segment 0 must be finite and at most 100 times", h.node.links.errors.get("a", "")
            ):
                assert time.monotonic() < end
                assert not await h.node.exchange(0, "a")  # it may be busy
                await asyncio.sleep(0.003)
            await until(lambda: "segment 0 must be finite and at most 100 times" in a.node.links.errors.get("h", ""))
            a.node.links.members["h"] = h.address
            assert not await exchange_of(a, "h")
            a.node.links.members.pop("h")
            assert h.step() == 0
            assert np.isfinite(a.values).all()
            await h.stop()

    run(talk())


def test_another_model_wire_or_cut_is_refused_by_name():
    like = {"w": jnp.zeros((30, 40)), "b": jnp.zeros(40)}
    mine = Payload(like, by_size(4), None).layout
    others = {
        "another model": Payload(like | {"b": jnp.zeros(41)}, by_size(4), None),
        "another cut, wire or version": Payload(like, by_size(4), "bfloat16"),
        "another cut, wire": Payload(like, by_size(5), None),
    }

    async def talk():
        a = Peer("a", layout=mine)
        a.address = await a.tcp.serve(a.node.answer)
        for sentence, payload in others.items():
            segments = [tuple(np.zeros(n, dtype) for dtype, n in parts) for parts in payload.layout.segments]
            h = Peer("h", layout=payload.layout)
            h.meets(a), h.node.publish(Publication(1, segments, 0.0))
            assert not await h.node.exchange(0, "a")
            assert h.node.links.errors["a"].startswith(f"refused: {sentence}")
        await a.tcp.close()

    run(talk())


def test_an_exchange_that_nobody_knows_is_aborted_and_stays_so():
    async def talk():
        a = await Peer("a").start()  # all of its segments are on offer
        asked = request(do="outcome")
        (said,) = await ask(a, framed(asked))
        assert said["outcome"] == "aborted"
        (said, *_) = await ask(a, framed(request(id=asked["id"])))
        assert said["busy"] is True  # who was told so must not see it begin later
        (said, *_) = await ask(a, framed(request()))
        assert "granted" in said
        await a.stop()

    run(talk())


def test_nobody_can_decide_on_an_exchange_of_two_others():
    async def talk():
        async with pair() as (a, b):
            for number in range(b.node.exchanged, b.node.exchanged + 2000, 50):
                (said,) = await ask(a, framed(request(do="outcome", id=f"b@1:{number}")))
                assert "is no exchange of this asker" in said["refused"]
            assert "h" not in a.node.ledger._outcomes

    run(talk())


def test_one_who_asks_for_a_state_and_goes_leaves_nothing_behind():
    async def talk():
        async with pair() as (a, _):
            for _ in range(20):
                reader, writer = await open_raw(a)
                writer.write(framed(request(do="state")))
                assert (await read_message(reader))[0]["wait"] is True
                writer.transport.abort()
            await until(lambda: len(a.tcp._answering) <= SEGMENTS, 5.0)  # those are b's

    run(talk())


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([({"ready": True}, b""), ({}, bytes(63))], "state of 64 bytes was asked for, and 63 have come"),
        ([({"ready": True}, b""), ({}, bytes(65))], r"a message of .* \+ 65 bytes where 64 were expected"),
        (
            [({"ready": True}, b""), ({"from": "b", "incarnation": 1 << 60}, bytes(64))],
            "'c' was asked, and b has answered",
        ),
        ([({"wait": True}, b"")] * 1000, "state was asked for, and not handed over within 0.2 s"),
        ([], "the connection has ended"),
    ],
)
def test_a_state_that_is_no_good_is_not_taken(messages, sentence):
    async def talk():
        async def answer(conversation, what):
            await conversation.send(c.node.hello() | {"wait": True})
            for head, body in messages:
                await conversation.send(c.node.hello() | head, body)
                await asyncio.sleep(0.01 if "wait" in head else 0)
            if not messages:
                raise LinkError("it goes away")

        a, c = [await Peer(name, patience=0.2).start() for name in "ac"]
        a.meets(c)
        c.node._answer_fetch = answer
        with pytest.raises(LinkError, match=sentence):
            await a.node.fetch("c", "state", 64)
        assert a.node.incarnations == {"c": 1}
        await a.stop(), await c.stop()

    run(talk())


def test_an_error_is_shown_until_the_link_works_again_whoever_asks():
    async def talk():
        a, b = [await Peer(name).start() for name in "ab"]
        b.meets(a)
        a.node.links.errors["b"] = "it was refused: another model"
        assert await b.node.exchange(0, "a")
        assert a.node.links.errors == {}
        await a.stop(), await b.stop()

    run(talk())


# Two processes of one name


def test_of_two_processes_of_one_name_the_older_ends(certified):
    def island(name, addresses):
        tls = Tls.of(str(certified / "run"), name)
        return Island(static(addresses), name, like=PARAMS, cut=by_size(8), tls=tls, timeout=2.0, patience=5.0)

    state = {"w": PARAMS}
    b = island("b", {})
    b.join(state, found=True)
    older, newer = (island("a", {"b": b._address}) for _ in range(2))
    assert newer._node.incarnation > older._node.incarnation
    islands = [b, older, newer]
    try:
        for one in (older, newer):
            one.join(state, clock={})
        end = time.monotonic() + 20
        while older._node.over is None:
            assert time.monotonic() < end
            for one in islands:
                one.exchange(PARAMS, state)
            time.sleep(0.002)
        with pytest.raises(Superseded, match=r"a newer process has the name 'a' .*: this one must end"):
            older.exchange(PARAMS, state)
        newer.exchange(PARAMS, state)
        b.exchange(PARAMS, state)
    finally:
        for one in islands:
            one.leave()
