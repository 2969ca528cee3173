"""Links that work, and are worse than the others: they are named, and no others are."""

import logging

import numpy as np
import pytest

from crossover_jax.islands import links as links_module
from crossover_jax.islands.links import TRIED, Links
from crossover_jax.islands.simulated import Network
from tests.islands.helpers import exchange, run
from tests.islands.sockets import run as run_with_sockets
from tests.islands.test_transport import echo, served


class Worse(Network):
    """Whatever `worse` sends takes twice as long."""

    worse = ""

    def delay(self, sender, size):
        return super().delay(sender, 2 * size if sender == self.worse else size)


@pytest.mark.parametrize("worse", ["", "i02"])
def test_a_link_of_half_the_rate_is_named_by_all_others_and_nobody_else_is(worse, monkeypatch):
    monkeypatch.setattr(links_module, "TRIED", 16)
    monkeypatch.setattr(links_module, "KNOWN", 0.63 * 16)
    network = Worse(rate=4e3, timeout=30.0)
    network.worse = worse
    islands, _ = run(exchange(4, 30, num_segments=4, network=network))
    named = {(island.node.name, peer) for island in islands for peer in island.node.links.impaired}
    assert named == {(island.node.name, worse) for island in islands if worse not in ("", island.node.name)}


def counted(links, rng, times, packets=40, lost=0.0):
    """A thousand exchanges of each link, as noisy as on a busy machine; when each was named for the first time."""
    first = {}
    for i in range(1000):
        for peer, mean in times.items():
            again = rng.binomial(packets, lost if peer == "d" else 0.0005)
            links.count(peer, 50_000, mean * rng.lognormal(-0.25, 0.7), (packets, again))
            if peer in links.impaired:
                first.setdefault(peer, i)
    return first


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_named_and_half_of_the_pace_and_lost_packets_soon_are(seed, caplog):
    rng, links = np.random.default_rng(seed), Links("a")
    links.members = dict.fromkeys("bcd", "")
    calm = {"b": 0.01, "c": 0.012, "d": 0.011}
    assert counted(links, rng, calm) == {}
    first = counted(links, rng, calm, lost=0.01)
    assert set(first) == {"d"}
    assert first["d"] < 3 * TRIED
    assert "packets are sent again" in links.impaired["d"]
    assert "Mbit/s" not in links.impaired["d"]
    counted(links, rng, calm)
    assert not links.impaired
    first = counted(links, rng, calm | {"d": 0.027})
    assert set(first) == {"d"}
    assert first["d"] < 5 * TRIED
    assert "of the other links" in links.impaired["d"]
    counted(links, rng, calm)
    assert not links.impaired
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.startswith("a, link to d: ") for text in said] == [True] * 4
    assert [text.endswith("it is as good as others again") for text in said] == [False, True, False, True]


def test_who_has_left_is_nothing_to_compare_with_and_names_without_end_are_forgotten():
    links = Links("a")
    links.members = dict.fromkeys("bc", "")
    for _ in range(2 * TRIED):
        links.count("b", 1000, 0.1, (0, 0)), links.count("c", 1000, 0.01, (0, 0))
    assert set(links.impaired) == {"b"}
    del links.members["c"]
    links.count("b", 1000, 0.1, (0, 0))
    assert not links.impaired
    for i in range(1000):
        links.count(f"stranger {i}", 1000, 0.1, (0, 0))
    assert len(links._sums) < 100


def test_a_connection_says_how_many_packets_it_has_sent_since_it_was_asked_last():
    async def talk():
        async with served(echo) as (tcp, address), tcp.connect(address, None) as conversation:
            found = []
            for size in (1 << 20, 1 << 10):
                await conversation.send({}, bytes(size))
                await conversation.receive(size)
                found.append(conversation.packets())
            return found

    (large, _), (small, again) = run_with_sockets(talk())
    assert large > 2**20 / 2**16  # no packet has more than 64 KiB
    assert 0 < small < large
    assert again == 0
