"""The protocol, in virtual time: every run is a function of its seed."""

import asyncio

import numpy as np
import pytest

from crossover_jax.islands.simulated import Network
from crossover_jax.islands.stream import LinkError
from tests.islands.helpers import SIZE, Values, exchange, run, stacked


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_sum_is_kept_and_all_agree(n):
    islands, first = run(exchange(n, 30, num_segments=4))
    found = stacked(islands)
    np.testing.assert_allclose(found.mean(0), first.mean(0), atol=1e-13)
    assert found.std(0).max() < 1e-3


@pytest.mark.parametrize("latency", [0.0, 0.3, 3.0])
def test_delays_of_any_length_neither_move_the_sum_nor_diverge(latency):
    network = Network(latency=latency, timeout=30.0, seed=1)
    islands, first = run(exchange(6, 100, num_segments=2, network=network, patience=100.0))
    np.testing.assert_allclose(stacked(islands).mean(0), first.mean(0), atol=1e-13)
    assert stacked(islands).std(0).mean() < 0.6 * first.std(0).mean()


def test_a_slow_island_costs_itself_only():
    def done(periods):
        islands, first = run(exchange(6, 40, num_segments=2, periods=periods))
        np.testing.assert_allclose(stacked(islands).mean(0), first.mean(0), atol=1e-13)
        return [island.node.exchanged / island.number for island in islands[1:]]

    alike, beside_a_slow_one = done([1.0] * 6), done([5.0] + [1.0] * 5)
    assert np.median(beside_a_slow_one) > 0.85 * np.median(alike)


def test_participation_with_16_islands():
    islands, _ = run(exchange(16, 30, num_segments=4))
    shares, windows = [], []
    for island in islands:
        applied = island.applied[3:-3]
        shares.append(np.mean([len(segments) for segments in applied]) / 4)
        windows += [
            sum(segment in segments for segments in applied[t : t + 10])
            for t in range(len(applied) - 10)
            for segment in range(4)
        ]
    assert np.median(shares) >= 0.7
    assert min(windows) >= 1  # in ten publications each has exchanged every segment


def test_the_same_seed_is_the_same_run():
    one, two, other = (stacked(run(exchange(4, 10, num_segments=4, seed=seed))[0]) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("loss", [0.01, 0.05])
def test_a_lost_last_word_is_asked_for_so_that_lost_messages_do_not_move_the_sum(loss):
    network = Network(latency=0.02, loss=loss, seed=2)
    islands, first = run(exchange(4, 100, num_segments=4, network=network))
    assert sum(island.node.links.counts["failed"] for island in islands) > 5
    assert sum(island.node.links.counts["outcomes that nobody knew"] for island in islands) == 0
    np.testing.assert_allclose(stacked(islands).mean(0), first.mean(0), atol=1e-12)


class Cutting(Network):
    """Loses the first message for which `is_that` holds, and what follows it."""

    is_that = staticmethod(lambda head: False)
    cuts = 0

    def loses(self, head):
        if self.cuts == 0 and self.is_that(head):
            self.cuts += 1
            return True
        return False


async def pair(network, **keys):
    rng = np.random.default_rng(0)
    first = rng.standard_normal((2, 1, SIZE))
    islands = [Values(network, name, first[k].copy(), ("a", "b"), **keys) for k, name in enumerate("ab")]
    for island in islands:
        await island.node.transport.serve(island.node.answer)
        island.step()
    return islands, first


@pytest.mark.parametrize(
    ("lost", "takes_place"),
    [("do", False), ("granted", False), ("bits", False), ("confirm", False), ("outcome", True)],
)
def test_a_message_that_is_lost_at_any_point_leaves_both_sides_with_the_same_outcome(lost, takes_place):
    async def scene():
        network = Cutting(latency=0.01, timeout=1.0)
        (a, b), first = await pair(network)
        network.is_that = lambda head: (not head) if lost == "bits" else lost in head
        assert await a.node.exchange(0, "b") == takes_place
        assert network.cuts == 1
        await asyncio.sleep(5.0)
        for island in (a, b):
            island.step()
        return stacked((a, b)), first

    found, first = run(scene())
    np.testing.assert_allclose(found.mean(0), first.mean(0), atol=1e-15)
    assert (np.abs(found[0] - found[1]).max() < 1e-15) == takes_place


@pytest.mark.parametrize("when", ["granted", "confirm"])
def test_the_holder_dies_in_the_middle_and_the_segment_is_free_again(when):
    async def scene():
        network = Cutting(latency=0.01, timeout=1.0)
        (a, b), first = await pair(network, patience=3.0)

        def dies(head):
            if when in head:
                network.dead.add("b")
            return False

        network.is_that = dies
        assert not await a.node.exchange(0, "b")
        assert a.node.ledger.is_offered(0)
        assert "b" in a.node.links.errors
        a.step()
        return a.values, first

    values, first = run(scene())
    np.testing.assert_array_equal(values, first[0])


def test_of_two_processes_of_one_name_the_older_is_told_to_end():
    async def scene():
        network = Network(latency=0.01)
        (a, b), _ = await pair(network)
        b.node.incarnations["a"] = 7  # b has met a newer a
        assert not await a.node.exchange(0, "b")
        return a.node.over, b.node.over

    over, other = run(scene())
    assert "must end" in str(over)
    assert other is None


def test_another_fingerprint_is_refused_and_named():
    async def scene():
        network = Network(latency=0.01)
        (a, b), _ = await pair(network)
        a.node.layout = a.node.layout._replace(fingerprint="other")
        assert not await a.node.exchange(0, "b")
        return a.node.links.errors["b"], b.node.exchanged

    error, exchanged = run(scene())
    assert "fingerprints differ" in error
    assert exchanged == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("who", [0, 1])
def test_what_is_not_finite_or_absurdly_large_is_applied_by_neither(bad, who):
    async def scene():
        network = Network(latency=0.01)
        islands, first = await pair(network)
        islands[who].values[0, 3] = bad
        islands[who].step()
        assert not await islands[0].node.exchange(0, "b")
        await asyncio.sleep(1.0)
        good = islands[1 - who]
        good.step()
        assert "finite and at most" in " ".join(
            [*good.node.links.errors.values(), *islands[who].node.links.errors.values()]
        )
        return good.values, first[1 - who]

    values, first = run(scene())
    np.testing.assert_array_equal(values, first)


def test_a_partition_that_heals_is_one_run_again():
    async def scene():
        network = Network(latency=0.02, seed=5, timeout=1.0)
        names = [f"i{k}" for k in range(6)]
        first = np.random.default_rng(5).standard_normal((6, 2, SIZE))
        islands = [await Values(network, name, first[k].copy(), names).start() for k, name in enumerate(names)]
        network.parts = [set(names[:3]), set(names[3:])]
        await asyncio.sleep(60)
        halves = stacked(islands)
        network.parts = []
        await asyncio.sleep(100)
        await asyncio.gather(*(island.settle() for island in islands))
        for island in islands:
            island.stop()
        return first, halves, stacked(islands)

    first, halves, found = run(scene())
    assert halves[:3].std(0).max() < 0.05
    assert np.abs(halves[:3].mean(0) - halves[3:].mean(0)).max() > 0.5
    np.testing.assert_allclose(found.mean(0), first.mean(0), atol=1e-13)
    assert found.std(0).max() < 0.05


def test_clocks_of_all_lives_reach_everybody():
    async def scene():
        network = Network(latency=0.01)
        (a, b), _ = await pair(network)
        a.node.clock.add("a@1", 64)
        b.node.clock.add("b@1", 32)
        await a.node.exchange(0, "b")
        await asyncio.sleep(1.0)
        return a.node.clock.total, b.node.clock.total

    assert run(scene()) == (96, 96)


def test_who_is_not_there_is_an_error_of_the_link_and_is_left_alone_for_a_while():
    async def scene():
        network = Network(latency=0.01)
        (a, _), _ = await pair(network)
        network.dead.add("b")
        assert not await a.node.exchange(0, "b")
        assert "refused" in a.node.links.errors["b"]
        a.step()
        assert a.node._peers(a.number, 0) == []
        with pytest.raises(LinkError, match="not in the roster"):
            await a.node.status("c")

    run(scene())


def test_more_rounds_of_a_publication_keep_the_sum_and_bring_islands_closer():
    def spread(rounds):
        islands, first = run(exchange(8, 6, num_segments=4, rounds=rounds))
        np.testing.assert_allclose(stacked(islands).mean(0), first.mean(0), atol=1e-13)
        return stacked(islands).std(0).mean()

    assert spread(3) < 0.3 * spread(1)
