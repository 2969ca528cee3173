"""Islands in threads of one process, over real sockets of this machine."""

import contextlib
import socket
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from crossover_jax import by_size
from crossover_jax.islands import (
    Island,
    LinkError,
    LongAway,
    NoState,
    Superseded,
    directory,
    dns,
    gather_mean,
    look,
    static,
)
from experiments.launch.local import free_port

N = 3


def params(seed):
    return {"w": jnp.asarray(np.random.default_rng(seed).standard_normal((300, 40)), jnp.float32)}


def state(seed):
    own = params(seed)
    return {"params": own, "opt": optax.adam(1e-3).init(own), "key": jax.random.key(seed), "step": jnp.int32(seed)}


@pytest.fixture
def begin(tmp_path):
    """Make an island; all that were made leave at the end."""
    with contextlib.ExitStack() as stack:

        def make(name, *, roster=None, **keys):
            keys = {"like": params(0), "cut": by_size(4), "tls": None, "timeout": 2.0, "patience": 5.0} | keys
            island = Island(roster or directory(tmp_path / "roster"), name, **keys)
            stack.callback(island.leave)
            return island

        yield make


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.01)


def walk(islands, values, states, seconds=0.0, delivered=1):
    """Call every island's `exchange` once."""
    for i, island in enumerate(islands):
        values[i] = island.exchange(values[i], states[i], delivered=delivered)
    time.sleep(0.005 + seconds)


def test_islands_agree_on_the_mean_that_they_began_with(begin, tmp_path):
    islands, values = [begin(f"i{k}") for k in range(N)], [params(k) for k in range(N)]
    states = [island.join(state(k), clock={}) for k, island in enumerate(islands)]  # as from N checkpoints
    mean = np.mean([v["w"] for v in values], axis=0)

    def agree():
        walk(islands, values, states)
        return np.std([v["w"] for v in values], axis=0).max() < 1e-4

    until(agree)
    for island in islands:
        island._node.ledger.is_offered = lambda segment: False
    until(lambda: not any(island._node.ledger._busy for island in islands))
    walk(islands, values, states)  # what one side has added and the other not yet
    np.testing.assert_allclose(np.mean([v["w"] for v in values], axis=0), mean, atol=1e-5)
    status = islands[0].status()
    assert status["errors"] == {}
    assert status["exchanged"] > 0
    assert islands[0].clock == pytest.approx(sum(island._node.steps for island in islands), rel=0.2)


def test_one_island_founds_the_run_and_the_others_take_its_state(begin):
    first = begin("a")
    own = first.join(state(1))
    assert first.status()["origin"] == "the run's seed"
    values, states = [own["params"]], [own]
    walk([first], values, states, delivered=64)

    second = begin("b", patience=20.0)
    with ticking([first], values, states):
        taken = second.join(state(2))
    assert second.clock >= 64
    assert "a, at its step" in second.status()["origin"]
    for mine, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(own), strict=True):
        assert mine.dtype == theirs.dtype
        if jnp.issubdtype(mine.dtype, jax.dtypes.prng_key):
            mine, theirs = jax.random.key_data(mine), jax.random.key_data(theirs)
        np.testing.assert_array_equal(mine, theirs)


@contextlib.contextmanager
def ticking(islands, values, states):
    import threading

    ended = threading.Event()

    def run():
        while not ended.is_set():
            walk(islands, values, states)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_who_finds_neither_peer_nor_checkpoint_is_refused_once_the_run_has_begun(begin, tmp_path):
    first = begin("a")
    own = first.join(state(1))
    first.exchange(own["params"], own, delivered=64)
    until(lambda: (tmp_path / "roster" / "begun").exists())
    first.leave()
    for name in "ab":  # neither the founder itself nor another may begin it again from the seed
        with pytest.raises(NoState, match="nothing to begin with"):
            begin(name, patience=0.5).join(state(1))
    restored = begin("a").join(state(7), clock={"a@1": 64.0})
    assert int(restored["step"]) == 7


def test_who_has_a_donor_waits_for_its_state_longer_than_patience(begin, monkeypatch):
    first = begin("a", patience=20.0)
    own = first.join(state(1))
    second, tries = begin("b", patience=0.5), []
    fetch = second._node.fetch

    async def fails_at_first(*args):
        tries.append(time.monotonic())
        if tries[-1] - tries[0] < 1.5:  # as while the donor compiles, and its threads get no turn
            raise LinkError("nothing moved for the time-out")
        return await fetch(*args)

    monkeypatch.setattr(second._node, "fetch", fails_at_first)
    with ticking([first], [own["params"]], [own]):
        second.join(state(2))
    assert "a, at its step" in second.status()["origin"]
    assert len(tries) > 1


def test_the_founder_may_begin_again_while_nothing_is_delivered(begin):
    first = begin("a")
    first.join(state(1))
    first.leave()
    again = begin("a")
    assert int(again.join(state(1))["step"]) == 1
    assert again._node.is_founder


def test_a_fresh_process_alone_is_nobodys_donor(begin):
    alone = begin("a", patience=0.5)
    restored = alone.join(state(3), clock={"a@1": 10.0})
    alone.exchange(restored["params"], restored)
    assert not alone.status()["donor"]


def test_exchange_before_join_and_after_a_long_stop(begin):
    island = begin("a", patience=0.3)
    with pytest.raises(RuntimeError, match="`join` must be called before"):
        island.exchange(params(0), state(0))
    own = island.join(state(0))
    value = island.exchange(own["params"], own)
    time.sleep(0.5)
    with pytest.raises(LongAway, match="call `join` again"):
        island.exchange(value, own)
    again = island.join(own, clock=island.counts)
    island.exchange(again["params"], again)


def test_the_newer_of_two_processes_of_one_name_goes_on(begin):
    older = begin("a")
    own = older.join(state(0))
    newer = begin("a")
    newer.join(own, clock={})

    until(lambda: older._node.over is not None)
    with pytest.raises(Superseded, match="newer process"):
        older.exchange(own["params"], own)
    newer.exchange(own["params"], own)


def test_the_mean_of_all_is_taken_from_outside_and_changes_nothing(begin, tmp_path):
    roster = directory(tmp_path / "roster")
    islands, values = [begin(f"i{k}", every=1000) for k in range(N)], [params(k) for k in range(N)]
    states = [island.join(state(k), clock={}) for k, island in enumerate(islands)]
    for island in islands:
        island.every = 1
        island._node.ledger.is_offered = lambda segment: False  # nobody exchanges
    with ticking(islands, values, states):
        mean = gather_mean(roster, like=params(9), tls=None)
        seen = look(roster, tls=None)
    np.testing.assert_allclose(mean["w"], np.mean([params(k)["w"] for k in range(N)], axis=0), atol=1e-6)
    for k in range(N):
        np.testing.assert_array_equal(values[k]["w"], params(k)["w"])
    assert sorted(seen) == ["i0", "i1", "i2"]
    assert seen["i1"]["steps"] > 0


def test_a_dns_name_is_a_roster_whose_addresses_learn_their_names(begin, monkeypatch):
    port, hosts = free_port(), [f"127.0.7.{i}" for i in (2, 3, 4, 5)]  # at the last one nobody listens

    def getaddrinfo(host, port, *, type):
        assert host == "trainers"
        return [(socket.AF_INET, type, 6, "", (address, port)) for address in hosts]

    roster = dns(f"trainers:{port}")
    monkeypatch.setattr(
        "crossover_jax.islands.roster.socket", types.SimpleNamespace(getaddrinfo=getaddrinfo, SOCK_STREAM=1)
    )
    islands = [begin(name, roster=roster, bind=f"{host}:{port}") for name, host in zip("abc", hosts, strict=False)]
    values, states = [None] * 3, [state(k) for k in range(3)]
    states[0] = islands[0].join(states[0], found=True)
    values[0] = states[0]["params"]
    with ticking(islands[:1], values, states):
        for k in (1, 2):
            states[k] = islands[k].join(states[k])
            values[k] = states[k]["params"]
            assert islands[k].status()["origin"].startswith("a, at its step")
    for island, others in zip(islands, (["b", "c"], ["a", "c"], ["a", "b"]), strict=True):
        until(
            lambda own=island, others=others: walk(islands, values, states) or sorted(own._node.links.members) == others
        )
    until(lambda: walk(islands, values, states) or all(island._node.exchanged > 10 for island in islands))
    assert list(look(roster, tls=None, timeout=1.0)) == [f"127.0.7.5:{port}", "a", "b", "c"]


def test_a_path_that_creates_no_file_exclusively_is_a_roster_whose_founder_is_named(begin, tmp_path):
    roster = directory(epath.Path(tmp_path / "bucket"))  # local, but of etils: as of a bucket
    first, second = begin("a", roster=roster), begin("b", roster=roster, patience=1.0)
    with pytest.raises(NoState, match="`found=True` on one island"):
        second.join(state(2))
    values, states = [params(1)], [first.join(state(1), found=True)]
    with ticking([first], values, states):
        second.join(state(2))
    assert second.status()["origin"].startswith("a, at its step")


def test_another_model_cannot_join(begin):
    first = begin("a")
    own = first.join(state(1))
    values, states = [own["params"]], [own]
    with ticking([first], values, states):
        other = begin("b")
        with pytest.raises(ValueError, match="names, shapes and dtypes"):
            other.join({**state(2), "step": jnp.float32(0)})


def test_a_state_with_a_nan_in_it_is_taken_by_nobody(begin):
    first, second = begin("a"), begin("b", patience=1.0)
    own = first.join(state(1))
    own["opt"][0].nu["w"] = own["opt"][0].nu["w"].at[3, 4].set(jnp.nan)
    with ticking([first], [own["params"]], [own]), pytest.raises(NoState):
        second.join(state(2), found=False)
    assert second.status()["errors"]["the state of a"] == "it has a NaN in it, and was not taken"


def test_bad_arguments_are_one_sentence(tmp_path):
    keys = {"like": params(0), "cut": by_size(2), "tls": None}
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        Island(static({}), "a", every=0, **keys)
    with pytest.raises(ValueError, match="lower-case"):
        Island(static({}), "A_b", **keys)
    with pytest.raises(ValueError, match="`bind` must name one interface"):
        Island(static({}), "a", bind="0.0.0.0:7000", **keys)
    with pytest.raises(ValueError, match='"host:port"'):
        Island(static({}), "a", bind="localhost", **keys)
    with pytest.raises(TypeError, match="tls"):
        Island(static({}), "a", like=params(0), cut=by_size(2))
