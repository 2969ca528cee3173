import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax import mixing
from crossover_jax.mixing import is_channels
from crossover_jax.traced import trace_worker, wire_bytes
from tests.oracles import POOLS, has, mixed_by_matrices, pool_of

ROUNDING = {"rtol": 1e-6, "atol": 1e-6}


def random_tree(num_workers, segments, seed=0):
    """As many leaves as segments, all of one size: `by_size` and `by_module` cut it alike."""
    rng = np.random.default_rng(seed)
    return {f"leaf{s:02d}": rng.normal(size=(num_workers, 2, 3)).astype(np.float32) for s in range(segments)}


@functools.lru_cache(maxsize=4)  # a test that takes several steps compiles once
def compiled(mix, where):
    return cj.per_worker(mix, where, replicated=(1,))


def run(mix, where, tree, step):
    tree = jax.tree.map(jnp.asarray, tree)
    if not isinstance(where, int):
        tree = jax.device_put(tree, NamedSharding(where, P("worker")))
    return compiled(mix, where)(tree, jnp.int32(step))


def places(num_workers):
    return {"mesh": cj.make_mesh(num_workers, devices=jax.devices()[:num_workers]), "simulated": num_workers}


# One, a power of two or none, even or odd, several of a kind: `tests/topology` has the other numbers.
NUMBERS = {1: (), 2: (), 3: pytest.mark.slow, 6: (), 8: (), 33: ()}


@pytest.mark.parametrize(
    ("name", "num_workers"),
    [pytest.param(p, n, marks=marks) for p in POOLS for n, marks in NUMBERS.items() if has(p, n)],
)
def test_gossip_is_the_pools_matrix_on_each_segment_in_both_compiled_forms(name, num_workers):
    pool = pool_of(name, num_workers)
    segments = pool.num_rounds
    tree = random_tree(num_workers, segments)
    table = cj.topology.shuffle(segments, pool.num_rounds, 8, seed=3)
    one = jax.tree.map(lambda x: x[0], tree)
    channels, switch = cj.by_size(segments), cj.by_module(one, lambda name: name)
    assert is_channels(table, channels)
    assert segments == 1 or not is_channels(table, switch)

    def both(tree, step):
        return cj.gossip(pool, channels, table)(tree, step), cj.gossip(pool, switch, table)(tree, step)

    for where in places(num_workers).values():
        for got in run(both, where, tree, 5):
            expected = mixed_by_matrices(tree, 5, pool, channels, table)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_the_table_repeats_with_its_period_in_both_forms(where):
    pool, tree = cj.topology.latin(8, 4), random_tree(8, 4)
    for table in [
        cj.topology.shuffle(4, 4),
        cj.topology.sample(4, 4),
        cj.topology.rotate(4, 4),
        cj.topology.cycle(4, 4),
    ]:
        mix = cj.gossip(pool, cj.by_size(4), table)
        for step in (0, 1, 1023, 1024, 5000):
            got = run(mix, places(8)[where], tree, step)
            expected = mixed_by_matrices(tree, step, pool, cj.by_size(4), table)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("segments", [8, 12])
def test_channels_carry_several_segments_and_leave_those_at_home_bit_for_bit(where, segments):
    pool, cut = cj.topology.latin(8, 2), cj.by_size(segments)
    table = cj.topology.stream(segments, 2, every=2, period=8)
    assert is_channels(table, cut)
    tree, mix = random_tree(8, segments), cj.gossip(pool, cut, table)
    for step in (0, 3):
        got = run(mix, places(8)[where], tree, step)
        expected = mixed_by_matrices(tree, step, pool, cut, table)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)
        segment = cut.segment_of(jax.tree.map(lambda x: x[0], tree))
        home = jax.tree.map(lambda s: table[step][s] < 0, segment)
        assert sum(h.sum() for h in jax.tree.leaves(home)) == segments * 6 // 2
        jax.tree.map(lambda a, b, h: np.testing.assert_array_equal(a[:, h], b[:, h]), got, tree, home)


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_segments_at_home_stay_bit_for_bit_in_switch_form(where):
    pool, cut, tree = cj.topology.latin(8, 3), cj.by_size(5), random_tree(8, 5)
    table = np.array([[0, -1, 2, -1, 1], [-1, 1, 1, 0, 0]], np.int32)
    assert not is_channels(table, cut)
    got = run(cj.gossip(pool, cut, table), places(8)[where], tree, 0)
    expected = mixed_by_matrices(tree, 0, pool, cut, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)
    for home in ("leaf01", "leaf03"):
        np.testing.assert_array_equal(got[home], tree[home])


@pytest.mark.parametrize("cut", [cj.whole(), cj.by_size(3)])
def test_a_python_integer_as_step_compiles_only_the_rounds_of_that_step(cut):
    pool, tree, table = cj.topology.latin(8, 4), random_tree(8, 4), cj.topology.sample(cut.num_segments, 4)
    mix = cj.gossip(pool, cut, table)
    step = cj.per_worker(lambda tree: mix(tree, 7), places(8)["mesh"])
    got = step(jax.device_put(tree, NamedSharding(places(8)["mesh"], P("worker"))))
    expected = mixed_by_matrices(tree, 7, pool, cut, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)
    jaxpr = str(trace_worker(lambda x: mix(x, 7), jax.tree.map(lambda x: x[0], tree), axes={"worker": 8}))
    assert jaxpr.count("ppermute") == len(np.unique(table[7]))
    assert "cond" not in jaxpr


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_only_floating_point_leaves_that_where_names_travel(where):
    rng = np.random.default_rng(0)
    tree = {
        "frozen": rng.normal(size=(8, 5)).astype(np.float32),
        "lora": rng.normal(size=(8, 6)).astype(np.float32),
        "count": np.arange(8),
        "flag": np.arange(8) % 2 == 0,
    }
    mix = cj.gossip(
        cj.topology.latin(8, 2), cj.by_size(2), cj.topology.shuffle(2, 2), leaves=lambda name: name != "frozen"
    )
    got = run(mix, places(8)[where], tree, 0)
    only = {"lora": tree["lora"]}
    expected = mixed_by_matrices(only, 0, cj.topology.latin(8, 2), cj.by_size(2), cj.topology.shuffle(2, 2))
    np.testing.assert_allclose(got["lora"], expected["lora"], **ROUNDING)
    for name in ("frozen", "count", "flag"):
        np.testing.assert_array_equal(got[name], tree[name])


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_bfloat16_is_averaged_in_float32_and_each_dtype_travels_by_itself(where):
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=(8, 40)), "b": rng.normal(size=(8, 24)).astype(np.float32)}
    tree["a"] = np.asarray(jnp.asarray(tree["a"], jnp.bfloat16))
    pool, table, cut = cj.topology.exponential(8, 2), cj.topology.shuffle(2, 2), cj.by_size(2)
    got = run(cj.gossip(pool, cut, table), places(8)[where], tree, 1)
    expected = mixed_by_matrices(tree, 1, pool, cut, table)
    # Rounded once: never more than half a unit of bfloat16's 8 bits away. Sums of thirds in bfloat16 miss this.
    half_unit = 2.0 ** (np.floor(np.log2(np.abs(expected["a"]))) - 8)
    assert (np.abs(np.asarray(got["a"]).astype(np.float64) - expected["a"]) <= half_unit * (1 + 1e-4)).all()
    np.testing.assert_allclose(got["b"], expected["b"], **ROUNDING)
    mix = cj.gossip(pool, cut, table)
    one = jax.tree.map(lambda x: x[0], tree)
    jaxpr = str(trace_worker(mix, one, jnp.int32(0), axes={"worker": 8}))
    assert jaxpr.count("ppermute") == 2 * 2 * 2  # rounds × peers × dtypes


def test_unequal_modules_travel_with_their_own_round():
    rng = np.random.default_rng(0)
    tree = {"stem": {"w": rng.normal(size=(8, 3, 3))}, "body": {"w": rng.normal(size=(8, 50)), "b": np.zeros((8, 5))}}
    tree = jax.tree.map(lambda x: x.astype(np.float32), tree)
    cut = cj.by_module(jax.tree.map(lambda x: x[0], tree))
    pool, table = cj.topology.balanced(8, 6), cj.topology.sample(2, 6)
    for where in places(8).values():
        got = run(cj.gossip(pool, cut, table), where, tree, 2)
        expected = mixed_by_matrices(tree, 2, pool, cut, table)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_average_every_and_chain_are_what_they_say(where):
    tree = random_tree(8, 2)
    mean = jax.tree.map(lambda x: np.broadcast_to(x.mean(0), x.shape), tree)
    got = run(cj.average(), places(8)[where], tree, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, mean)

    pool, table, cut = cj.topology.exponential(8), cj.topology.cycle(1, 3), cj.whole()
    sometimes = cj.every(3, cj.gossip(pool, cut, table))
    for step in range(9):  # rounds 0, 1, 2 at steps 2, 5, 8: not three times the same round
        got = run(sometimes, places(8)[where], tree, step)
        expected = mixed_by_matrices(tree, step // 3, pool, cut, table) if step % 3 == 2 else tree
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)

    got = run(cj.chain(cj.gossip(pool, cut, table), sometimes), places(8)[where], tree, 5)
    expected = mixed_by_matrices(mixed_by_matrices(tree, 5, pool, cut, table), 1, pool, cut, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_a_message_that_nobody_wants_poisons_nobody(where):
    pool, tree = cj.topology.pull(8, 2, seed=1), {"w": np.ones((8, 4), np.float32)}
    tree["w"][5] = np.nan
    got = run(cj.gossip(pool, cj.whole(), cj.topology.cycle(1, 2)), places(8)[where], tree, 0)
    hears = pool.matrix(0)[:, 5] > 0
    np.testing.assert_array_equal(np.isnan(got["w"]).all(1), hears)
    assert not np.isnan(got["w"][~hears]).any()


def test_the_axis_may_have_any_name():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ("replica",))
    pool, tree = cj.topology.base(8), random_tree(8, 2)
    mix = cj.gossip(pool, cj.whole(), cj.topology.cycle(1, 3), "replica")
    expected = mixed_by_matrices(tree, 1, pool, cj.whole(), cj.topology.cycle(1, 3))
    for where, stacked in ((8, tree), (mesh, jax.device_put(tree, NamedSharding(mesh, P("replica"))))):
        got = cj.per_worker(mix, where, (1,), axis="replica")(jax.tree.map(jnp.asarray, stacked), jnp.int32(1))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


def test_complex_leaves_travel_and_float8_is_averaged_in_float32():
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(8, 6)) + 1j * rng.normal(size=(8, 6))).astype(np.complex64)
    pool = cj.topology.exponential(8)
    got = run(
        cj.gossip(pool, cj.whole(), cj.topology.cycle(1, 3)),
        8,
        {"z": z, "tiny": jnp.ones((8, 2), jnp.float8_e4m3fn)},
        0,
    )
    np.testing.assert_allclose(got["z"], pool.matrix(0) @ z, rtol=1e-5)
    assert (got["tiny"] == 1).all()


def test_each_segment_compiles_only_the_rounds_its_column_names():
    table = np.array([[0, 2], [1, 3]], np.int32)
    mix = cj.gossip(cj.topology.latin(8, 4), cj.by_size(2), table)
    jaxpr = str(trace_worker(mix, jnp.zeros(6), jnp.int32(0), axes={"worker": 8}))
    assert jaxpr.count("ppermute") == 4


def test_a_small_step_counter_wraps_at_the_period_not_before():
    mix = cj.gossip(cj.topology.latin(8, 4), cj.by_size(4), cj.topology.shuffle(4, 4))
    x = jnp.asarray(random_tree(8, 4)["leaf00"])
    run_step = cj.per_worker(mix, 8, (1,), donate=False)
    np.testing.assert_array_equal(run_step(x, jnp.uint8(200)), run_step(x, jnp.int32(200)))


def test_leaves_of_an_average_travel_in_buckets_with_the_bits_that_each_has_alone(monkeypatch):
    rng, limit = np.random.default_rng(0), 4 * 100
    tree = {"a": (8, 10, 10), "b": (8, 7), "c": (8, 101), "d": (8, 0), "e": (8,)}
    tree = {name: rng.normal(size=shape).astype(np.float32) for name, shape in tree.items()}
    tree |= {"half": jnp.asarray(tree["b"], jnp.bfloat16), "halves": jnp.asarray(tree["a"], jnp.bfloat16)}
    found = {}
    for bucket, messages in ((limit, 4), (-1, len(tree))):  # a; b, d and e; c; the halves
        monkeypatch.setattr(mixing, "BUCKET_BYTES", bucket)
        found[bucket] = run(cj.average(), places(8)["mesh"], tree, 0)
        jaxpr = str(trace_worker(cj.average(), jax.tree.map(lambda x: x[0], tree), 0, axes={"worker": 8}))
        assert jaxpr.count("psum") == messages
    for name, x in tree.items():
        np.testing.assert_array_equal(found[limit][name], found[-1][name])
        mean = np.asarray(x, np.float64).mean(0)
        np.testing.assert_allclose(np.asarray(found[limit][name], np.float64)[3], mean, rtol=4e-3, atol=1e-6)


def test_average_leaves_out_what_where_leaves_out():
    tree = random_tree(8, 2)
    got = run(cj.average(leaves=lambda name: name == "leaf00"), 8, tree, 0)
    np.testing.assert_array_equal(got["leaf01"], tree["leaf01"])
    np.testing.assert_allclose(got["leaf00"][0], tree["leaf00"].mean(0), **ROUNDING)


def test_every_and_chain_with_a_python_integer_are_what_they_are_with_a_traced_one():
    pool, table = cj.topology.exponential(8), cj.topology.cycle(1, 3)
    mix = cj.every(2, cj.gossip(pool, cj.whole(), table))
    chained = cj.chain(mix, lambda tree, step: jax.tree.map(lambda x: x * x, tree))  # does not commute with mixing
    tree = jax.tree.map(jnp.asarray, random_tree(8, 2))
    any_step = cj.per_worker(chained, 8, (1,), donate=False)
    for step in range(6):
        static = cj.per_worker(lambda tree, step=step: chained(tree, step), 8, donate=False)(tree)
        traced = any_step(tree, jnp.int32(step))
        mixed = mixed_by_matrices(tree, step // 2, pool, cj.whole(), table) if step % 2 else tree
        for got in (static, traced):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b**2, rtol=1e-5), got, mixed)


MOST = {"int8": 127, "int4": 7}


def said_in(wire, tree, toward_zero=False):
    """What messages say of a tree, in float64; of integers each leaf `[workers, ...]` is a segment of its own."""
    if wire in MOST:
        return jax.tree.map(lambda x: said_in_blocks(x, np.trunc if toward_zero else np.rint, MOST[wire]), tree)

    def said(x):
        nearest = x.astype(jnp.dtype(wire))
        further = np.abs(nearest.astype(np.float64)) > np.abs(x)  # than x from zero
        whole = np.dtype(f"u{nearest.dtype.itemsize}")
        bits = nearest.view(whole) - (further & toward_zero).astype(whole)
        return bits.view(jnp.dtype(wire)).astype(np.float64)

    return jax.tree.map(said, tree)


def said_in_blocks(x, rounded=np.rint, most=127):
    flat = x.reshape(len(x), -1).astype(np.float64)
    said = np.zeros_like(flat)
    for start in range(0, flat.shape[1], 256):
        block = flat[:, start : start + 256]
        scale = np.abs(block).max(1, keepdims=True) / most
        # The least that float32 scales are moved by, so that so many of them are no more than the largest value.
        scale = scale * (1 - 2**-22) if rounded is np.trunc else scale
        said[:, start : start + 256] = rounded(block / np.where(scale, scale, 1)) * scale
    return said.reshape(x.shape)


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("name", ["latin", "pull", "exponential2", "base"])
def test_a_narrow_wire_takes_out_what_was_sent_in_both_compiled_forms(name, wire):
    pool = pool_of(name, 8)
    segments = pool.num_rounds
    tree, table = random_tree(8, segments), cj.topology.shuffle(segments, pool.num_rounds, 8, seed=3)
    channels = cj.by_size(segments)
    switch = cj.by_module(jax.tree.map(lambda x: x[0], tree), lambda name: name)
    said = said_in(wire, tree, toward_zero=pool.share[:, 0].min() < 0.5)
    mixed = mixed_by_matrices(said, 5, pool, channels, table)
    expected = jax.tree.map(lambda x, q, m: x + (m - q), tree, said, mixed)
    assert not np.allclose(expected["leaf00"], mixed["leaf00"], **ROUNDING)
    for where in places(8).values():
        for cut in (channels, switch):
            got = run(cj.gossip(pool, cut, table, wire=wire), where, tree, 5)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)


@pytest.mark.parametrize("where", ["mesh", "simulated"])
@pytest.mark.parametrize("wire", MOST)
def test_scales_belong_to_256_values_each(where, wire):
    """A large value spoils its own block, no other; the last block may be shorter."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 600)).astype(np.float32)
    x[:, 300] = 1e4
    x[0, :256] = 0.0
    pool, table, cut = cj.topology.latin(8, 1), cj.topology.cycle(1, 1), cj.whole()
    got = run(cj.gossip(pool, cut, table, wire=wire), places(8)[where], {"x": x}, 0)["x"]
    x, q = x.astype(np.float64), said_in_blocks(x, most=MOST[wire])
    np.testing.assert_allclose(got, x + pool.matrix(0) @ q - q, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.mean(0), x.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wire", "sent_as", "share"), [("bfloat16", "u16", 1 / 2), ("int8", "u8", 65 / 256), ("int4", "u8", 33 / 256)]
)
def test_narrow_messages_are_so_long(wire, sent_as, share):
    mesh = places(8)["mesh"]
    tree = {"w": np.random.default_rng(0).normal(size=(8, 4, 512)).astype(np.float32)}
    mixes = [
        cj.gossip(cj.topology.latin(8, 4), cj.by_size(4), cj.topology.shuffle(4, 4), wire=each) for each in (None, wire)
    ]
    one = jax.tree.map(lambda x: x[0], tree)
    sent = [wire_bytes(lambda x, mix=mix: mix(x, 0), one, num_workers=8) for mix in mixes]
    assert sent[1] == share * sent[0]
    placed = jax.device_put(tree, NamedSharding(mesh, P("worker")))
    text = cj.per_worker(mixes[1], mesh, (1,)).lower(placed, jnp.int32(0)).compile().as_text()
    # In the program, not only where it was traced.
    assert re.findall(r"= (\w+)\[\d+\]\S* collective-permute\(", text) == [sent_as] * 4


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("num_workers", "wire"),
    [
        *((8, wire) for wire in ("bfloat16", "int8", "int4")),
        (64, "int4"),
        *(pytest.param(64, wire, marks=pytest.mark.slow) for wire in ("bfloat16", "int8")),
    ],
)
def test_ten_thousand_narrow_rounds_keep_the_sum_and_leave_workers_a_rounding_apart(wire, num_workers):
    """Nothing moves once all messages say the same, so when all values lie within one step Δ of the wire, with a
    variance of at most (Δ/2)², and Δ²/12 if they lie there anywhere alike."""
    x, rounds = np.random.default_rng(0).normal(size=(num_workers, 1024)).astype(np.float32), 10_000
    mix = cj.gossip(cj.topology.latin(num_workers, 4), cj.by_size(4), cj.topology.shuffle(4, 4), wire=wire)
    one_round = jax.vmap(mix, in_axes=(0, None), axis_name="worker")
    run_all = jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda t, x: one_round(x, t), x))
    mixed = np.asarray(run_all(jnp.asarray(x)), np.float64)
    half_ulp = 2.0**-24 * np.abs(x).max()  # of the largest value, at each of so many roundings, in either direction
    kept = np.abs(mixed.sum(0) - x.sum(0, dtype=np.float64)).max()
    assert kept < 4 * half_ulp * np.sqrt(num_workers * rounds)
    mean = mixed.mean(0)
    if wire in MOST:
        step = np.repeat(np.abs(mixed).reshape(num_workers, -1, 256).max((0, 2)) / MOST[wire], 256)
    else:
        step = 2.0 ** (np.floor(np.log2(np.abs(mixed).max(0))) - 7)  # bfloat16 has 8 bits
    deviation = np.sqrt(((mixed - mean) ** 2).mean(0))
    assert (deviation / step).max() < 1 / 2
    assert 0.6 < np.sqrt(np.mean((deviation / step) ** 2)) * np.sqrt(12) < 1


def test_what_is_no_wider_than_the_wire_goes_as_it_is():
    tree = {"half": np.float16(random_tree(8, 1)["leaf00"]), "complex": random_tree(8, 1)["leaf00"] * (1 + 2j)}
    pool, table, cut = cj.topology.latin(8, 2), cj.topology.shuffle(2, 2), cj.by_size(2)
    as_it_is, narrow = (run(cj.gossip(pool, cut, table, wire=wire), 8, tree, 3) for wire in (None, "bfloat16"))
    jax.tree.map(np.testing.assert_array_equal, as_it_is, narrow)


def test_float64_goes_in_any_narrower_wire_and_keeps_the_sum():
    with jax.enable_x64(True):
        tree = {"w": np.random.default_rng(0).normal(size=(8, 512))}
        pool, table, cut = cj.topology.latin(8, 1), cj.topology.cycle(1, 1), cj.whole()
        for wire in ("float32", "bfloat16", "int8", "int4"):
            q = said_in(wire, tree)["w"]
            expected = tree["w"] + pool.matrix(0) @ q - q
            for where in places(8).values():
                got = run(cj.gossip(pool, cut, table, wire=wire), where, tree, 0)["w"]
                assert got.dtype == np.float64
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(got.sum(0), tree["w"].sum(0), atol=1e-12)


def test_repeat_takes_the_next_rounds_of_the_table():
    pool, table = cj.topology.exponential(8), cj.topology.cycle(1, 3)
    mix, tree = cj.repeat(2, cj.gossip(pool, cj.whole(), table)), random_tree(8, 2)
    for step in range(4):
        once = mixed_by_matrices(tree, 2 * step, pool, cj.whole(), table)
        twice = mixed_by_matrices(once, 2 * step + 1, pool, cj.whole(), table)
        static = cj.per_worker(lambda tree, step=step: mix(tree, step), 8, donate=False)
        for got in (run(mix, 8, tree, step), static(jax.tree.map(jnp.asarray, tree))):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, twice)


ROWS = {"kernel": (3, 8, 5), "matrix": (12, 4), "vector": (40,), "odd": (7, 3), "bias": (5,), "scalar": ()}
TABLES = {
    "channels": cj.topology.shuffle(4, 4, seed=1),
    "switch": cj.topology.sample(4, 4, seed=1),
    "stream": cj.topology.stream(4, 2, every=2),
}


@pytest.mark.parametrize("options", [{}, {"in_flight": 1}, {"in_flight": 3}, {"wire": "bfloat16"}], ids=str)
@pytest.mark.parametrize("form", TABLES)
def test_rows_of_every_large_leaf_travel_with_their_segment(form, options):
    rng, cut, table = np.random.default_rng(0), cj.by_rows(4, align=5), TABLES[form]
    tree = {name: rng.normal(size=(8, *shape)).astype(np.float32) for name, shape in ROWS.items()}
    pool = cj.topology.latin(8, int(table.max()) + 1)
    mix = cj.gossip(pool, cut, table, **options)
    assert is_channels(table, cut) == (form != "switch")
    for step in (0, 3):
        said = said_in(options["wire"], tree) if "wire" in options else tree
        mixed = mixed_by_matrices(said, step, pool, cut, table)
        expected = jax.tree.map(lambda x, q, m: x + (m - q), tree, said, mixed)
        for where in places(8).values():
            got = run(mix, where, tree, step)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), got, expected)
    static = cj.per_worker(lambda tree: mix(tree, 3), places(8)["mesh"], donate=False)
    placed = jax.device_put(tree, NamedSharding(places(8)["mesh"], P("worker")))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **ROUNDING), static(placed), expected)


@pytest.mark.parametrize("form", ["channels", "switch"])
@pytest.mark.parametrize("wire", [None, "int8", "int4"])
def test_long_messages_of_rows_are_filled_up_to_whole_blocks(form, wire):
    """Of 16,384 values and more: what is filled up belongs to no leaf."""
    rng, shapes = np.random.default_rng(0), {"a": (4, 16390), "b": (500, 8), "c": (3, 8)}
    tree = {name: rng.normal(size=(8, *shape)).astype(np.float32) for name, shape in shapes.items()}
    pool, table, cut = cj.topology.latin(8, 4), TABLES[form], cj.by_rows(4)
    said = jax.tree.map(lambda x: x.astype(np.float64), tree)
    if wire:
        of_segment = cut.segment_of(jax.tree.map(lambda x: x[0], tree))
        for s in range(4):  # packed leaves first
            own = {name: of_segment[name] == s for name in "bca"}
            message = said_in_blocks(np.concatenate([tree[name][:, own[name]] for name in own], 1), most=MOST[wire])
            for name, mask in own.items():
                said[name][:, mask], message = np.split(message, [mask.sum()], 1)
    expected = jax.tree.map(lambda x, q, m: x + (m - q), tree, said, mixed_by_matrices(said, 5, pool, cut, table))
    mix = cj.gossip(pool, cut, table, wire=wire)
    for where in places(8).values():
        got = run(mix, where, tree, 5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    if form == "channels":
        sent = wire_bytes(lambda x: mix(x, 5), jax.tree.map(lambda x: x[0], tree), num_workers=8)
        assert sent == 4 * 68 * {None: 1024, "int8": 260, "int4": 132}[wire]  # 16,390 + 1006 values are 67.95 blocks


@pytest.mark.full_compilation
@pytest.mark.parametrize(
    ("table", "wire"),
    [(cj.topology.shuffle(12, 4, seed=1), "int8"), (cj.topology.stream(12, 4, every=2), None)],
    ids=["all", "some at home"],
)
def test_channels_in_groups_exchange_the_same_bits_as_all_at_once(table, wire):
    mesh = places(8)["mesh"]
    tree = jax.device_put(random_tree(8, 12), NamedSharding(mesh, P("worker")))

    def exchanged(in_flight):
        mix = cj.gossip(cj.topology.latin(8, 4), cj.by_size(12), table, wire=wire, in_flight=in_flight)
        step = cj.per_worker(mix, mesh, (1,), donate=False)
        return [step(tree, jnp.int32(t)) for t in (0, 5)]

    at_once = exchanged(None)
    for in_flight in (1, 4, 9):  # the last leaves some over
        jax.tree.map(np.testing.assert_array_equal, exchanged(in_flight), at_once)


MISTAKES = {
    "`wire` must be None or one of float32, bfloat16, float16, int8, int4, got 'int2'": lambda: cj.gossip(
        cj.topology.latin(8, 2), cj.by_size(2), cj.topology.shuffle(2, 2), wire="int2"
    ),
    "`in_flight` must be None or at least 1, got 0": lambda: cj.gossip(
        cj.topology.latin(8, 2), cj.by_size(2), cj.topology.shuffle(2, 2), in_flight=0
    ),
    "`k` must be at least 1, got -1": lambda: cj.repeat(-1, cj.average()),
    "for 4 workers, but axis 'worker' has 8": lambda: run(
        cj.gossip(cj.topology.latin(4, 2), cj.by_size(2), cj.topology.shuffle(2, 2)), 8, random_tree(8, 2), 0
    ),
    "`table` is for 3 segments, but the cut makes 2": lambda: cj.gossip(
        cj.topology.latin(8, 3), cj.by_size(2), cj.topology.shuffle(3, 3)
    ),
    "rounds 0..1 of the pool or -1, got values from 0 to 2": lambda: cj.gossip(
        cj.topology.latin(8, 2), cj.by_size(3), cj.topology.rotate(3, 3)
    ),
    "must make at most as many segments as elements travel (from each device), 12, but it makes 13": lambda: run(
        cj.gossip(cj.topology.latin(8, 1), cj.by_size(13), cj.topology.shuffle(13, 1)), 8, random_tree(8, 2), 0
    ),
    "axis 'worker' is not bound": lambda: cj.gossip(cj.topology.latin(8, 2), cj.by_size(2), cj.topology.shuffle(2, 2))(
        random_tree(8, 2), 0
    ),
    "`pool` must keep agreement": lambda: cj.gossip(
        cj.topology.pull(8, 2).transpose(), cj.whole(), cj.topology.cycle(1, 2)
    ),
    "`k` must be at least 1, got 0": lambda: cj.every(0, cj.average()),
    "leaf 'other' is in none of the modules": lambda: run(
        cj.gossip(cj.topology.latin(8, 2), cj.by_module({"w": np.zeros(3)}), cj.topology.cycle(1, 2)),
        8,
        {"other": np.zeros((8, 3))},
        0,
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_value_and_the_requirement(message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        MISTAKES[message]()
    sentence, *rest = str(error.value).split("\n")
    assert message in sentence
    assert not rest or rest[0].startswith("-----")  # JAX's own note on tracebacks


@pytest.mark.parametrize("where", ["mesh", "simulated"])
def test_a_step_that_differs_between_workers_is_refused_where_it_could_hang(where):
    switch = cj.gossip(cj.topology.latin(8, 2), cj.whole(), cj.topology.cycle(1, 2))
    channels = cj.gossip(cj.topology.latin(8, 2), cj.by_size(2), cj.topology.shuffle(2, 2))
    x = jnp.zeros((8, 4))
    if where == "mesh":
        x = jax.device_put(x, NamedSharding(places(8)["mesh"], P("worker")))
    own_step = lambda mix: cj.per_worker(lambda x: mix(x, x[0].astype(int)), places(8)[where])
    with pytest.raises(ValueError, match="`step` must be the same on all workers"):
        own_step(switch)(x)
    with pytest.raises(ValueError, match="`step` must be the same on all workers"):
        own_step(cj.every(2, channels))(x)
    with pytest.raises(ValueError, match="`step` must be the same on all workers"):  # it would not hang, but overwrite
        own_step(channels)(x)
