import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossover_jax import by_module, by_rows, by_size, whole
from crossover_jax.islands.ledger import Arrival
from crossover_jax.islands.payload import Payload
from crossover_jax.wire import Wire

WIRES = (None, "bfloat16", "float16", "int8", "int4")


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "a": {"kernel": jnp.asarray(rng.standard_normal((64, 33)), dtype), "bias": jnp.asarray(rng.standard_normal(7))},
        "b": {"kernel": jnp.asarray(rng.standard_normal((32, 32)), dtype), "count": jnp.int32(3)},
        "c": jnp.zeros((0, 4)),
    }


CUTS = {
    "whole": lambda: whole(),
    "size": lambda: by_size(4),
    "padded": lambda: by_size(3, align=16),
    "rows": lambda: by_rows(4, align=16),
    "modules": lambda: by_module(tree(0)),
}


def on_host(segments):
    return [tuple(np.asarray(bits) for bits in segment) for segment in segments]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("cut", CUTS)
def test_both_sides_add_half_of_the_difference_to_the_segments_that_arrived(cut, wire):
    cut, x, y = CUTS[cut](), tree(1), tree(2)
    payload = Payload(x, cut, wire)
    mine, theirs = on_host(payload.pack(x)), on_host(payload.pack(y))
    for k, (segment, bits) in enumerate(zip(mine, payload.layout.segments, strict=True)):
        assert [(b.dtype, b.size) for b in segment] == list(bits)
        body = bytearray(b"".join(b.tobytes() for b in segment))
        assert len(body) == payload.layout.size(k)
        for there, back in zip(segment, payload.layout.split(k, body), strict=True):
            np.testing.assert_array_equal(there, back)

    arrived = list(range(0, cut.num_segments, 2))
    moved, squares = payload.add(x, [Arrival(k, mine[k], theirs[k]) for k in arrived])
    back, _ = payload.add(y, [Arrival(k, theirs[k], mine[k]) for k in arrived])

    belongs, segment_of = [0.0] * cut.num_segments, cut.segment_of(x)
    for name in ("a/kernel", "a/bias", "b/kernel"):
        before, other, after, other_after, of = (
            np.asarray(np.float64(at(t, name)) if t is not segment_of else at(t, name))
            for t in (x, y, moved, back, segment_of)
        )
        takes_part = np.isin(of, arrived)
        np.testing.assert_array_equal(after[~takes_part], before[~takes_part])
        if not takes_part.any():
            continue
        np.testing.assert_allclose((after + other_after)[takes_part], (before + other)[takes_part], atol=1e-6)
        if wire is None:
            np.testing.assert_allclose(after[takes_part], ((before + other) / 2)[takes_part], atol=1e-6)
        else:  # Q is at most a block's step away
            step = {"bfloat16": 2**-8, "float16": 2**-10, "int8": 1 / 127, "int4": 1 / 7}[wire] * 4
            assert np.abs(after - (before + other) / 2)[takes_part].max() < step
            assert np.abs(after - (before + other) / 2)[takes_part].max() > 0
        for k in arrived:
            belongs[k] += np.sum((other - before)[of == k] ** 2)
    if wire is None:
        np.testing.assert_allclose(squares, belongs, rtol=1e-4)
    assert moved["b"]["count"] == 3


def at(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("wire", WIRES)
def test_a_difference_is_what_wire_says(wire):
    x, y = ({"w": tree(seed)["a"]["kernel"]} for seed in (1, 2))
    payload = Payload(x, whole(), wire)
    mine, theirs = on_host(payload.pack(x)), on_host(payload.pack(y))
    moved, _ = payload.add(x, [Arrival(0, mine[0], theirs[0])])
    q = [np.asarray(Wire(wire).quantize(v["w"].reshape(-1)), np.float64).reshape(64, 33) for v in (x, y)]
    np.testing.assert_allclose(moved["w"], np.float64(x["w"]) + (q[1] - q[0]) / 2, atol=1e-6)


@pytest.mark.parametrize("wire", WIRES)
def test_the_largest_magnitude_is_read_from_the_bits(wire):
    x = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32).at[123].set(-9.0)}
    payload = Payload(x, by_size(2, align=8), wire)
    found = [payload.largest(k, segment) for k, segment in enumerate(on_host(payload.pack(x)))]
    assert found[0] == pytest.approx(9.0, rel=2**-7)
    assert found[1] == pytest.approx(float(jnp.abs(x["w"][504:]).max()), rel=2**-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wire", WIRES)
def test_what_is_not_finite_is_seen_in_the_bits(wire, bad):
    x = {"w": jnp.ones(512, jnp.float32)}
    payload = Payload(x, whole(), wire)
    (segment,) = on_host(payload.pack(x))
    kind = np.dtype({None: np.float32, "bfloat16": jnp.bfloat16, "float16": np.float16}.get(wire, np.float32))
    bits = segment[0].copy()
    bits[-4:].view(np.uint8)[-kind.itemsize :] = np.array([bad], kind).view(np.uint8)  # the last number, or scale
    if bits.dtype != np.uint8:
        bits = segment[0].copy()
        bits[-1:] = np.array([bad], kind).view(bits.dtype)
    assert not np.isfinite(payload.largest(0, (bits,)))
    assert "finite" in payload.layout.problem(0, (bits,), 1.0, 100.0)


def test_absurdly_large_is_a_problem_and_a_segment_that_was_zero_may_change():
    x = {"a": jnp.zeros(300), "b": jnp.ones(300)}
    payload = Payload(x, by_module(x), None)
    zero, ones = on_host(payload.pack(x))
    assert not payload.layout.problem(0, ones, payload.layout.scale([zero, ones]), 100.0)
    huge = (np.full(300, 200.0, np.float32),)
    assert "at most 100 times" in payload.layout.problem(0, huge, 1.0, 100.0)


def test_fingerprints_differ_where_bits_would_be_misread():
    x, cut = tree(0), by_size(4)
    fingerprints = {
        "": Payload(x, cut, None),
        "wire": Payload(x, cut, "int8"),
        "cut": Payload(x, by_size(5), None),
        "dtype": Payload(tree(0, jnp.bfloat16), cut, None),
        "name": Payload({"z": x["a"], **{k: v for k, v in x.items() if k != "a"}}, cut, None),
    }
    assert len({payload.layout.fingerprint for payload in fingerprints.values()}) == len(fingerprints)
    assert Payload(tree(5), by_size(4), None).layout.fingerprint == fingerprints[""].layout.fingerprint
    assert fingerprints["wire"].layout.model == fingerprints[""].layout.model != fingerprints["dtype"].layout.model


def test_parameters_may_be_donated_after_they_were_packed():
    x = {"w": jnp.arange(4096.0)}
    payload = Payload(x, by_size(2), None)
    packed = payload.pack(x)
    jax.jit(lambda t: jax.tree.map(lambda v: v * 0 - 1, t), donate_argnums=0)(x)
    np.testing.assert_array_equal(np.concatenate([bits for (bits,) in on_host(packed)]), np.arange(4096.0))


def test_nothing_that_travels_is_refused():
    with pytest.raises(ValueError, match="nothing would travel"):
        Payload({"count": jnp.int32(0)}, whole(), None)


@pytest.mark.parametrize("wire", WIRES)
def test_what_is_offered_next_is_what_both_will_be(wire):
    x, y = ({"w": tree(seed)["a"]["kernel"]} for seed in (1, 2))
    payload = Payload(x, by_size(2, align=16), wire)
    mine, theirs = on_host(payload.pack(x)), on_host(payload.pack(y))
    quantized = lambda segment, k: np.asarray(
        Wire(wire).decode(jnp.asarray(segment[0]), payload._says[0][k]), np.float64
    )
    for k in range(2):
        mixed = payload.mixed(k, mine[k], mine[k], theirs[k])
        assert [bits.dtype for bits in mixed] == [bits.dtype for bits in mine[k]]
        expected = (quantized(mine[k], k) + quantized(theirs[k], k)) / 2
        step = {None: 2**-22, "bfloat16": 2**-7, "float16": 2**-9, "int8": 1 / 100, "int4": 1 / 5}[wire] * 4
        assert np.abs(quantized(mixed, k) - expected).max() < step
    once = Arrival(0, mine[0], theirs[0])
    again = Arrival(0, payload.mixed(0, mine[0], mine[0], theirs[0]), theirs[0])
    both, _ = payload.add(x, [once, again])
    first, _ = payload.add(x, [once])
    second, _ = payload.add(first, [again])
    np.testing.assert_array_equal(both["w"], second["w"])
