"""What 10,000 exchanges on real sockets, delayed at random, do to the sum over islands: no more than rounding does."""

import asyncio
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crossover_jax import by_size
from crossover_jax.islands import Island, directory, stream

# Sockets, for most of a minute: run by `make test-tools`.
pytestmark = pytest.mark.tools

EXCHANGES, SIZE = 10_000, 2000


def exactly(tree):
    return np.asarray(tree["w"], np.float64)


@pytest.mark.parametrize(("num_islands", "rounds"), [(4, 1), (8, 1), (8, 3)])
def test_the_sum_drifts_no_more_than_rounding(num_islands, rounds, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    send = stream.Stream.send

    async def delayed(*args):
        await asyncio.sleep(rng.exponential(0.002))
        await send(*args)

    monkeypatch.setattr(stream.Stream, "send", delayed)
    add = jax.jit(lambda x, u: {"w": x["w"] + u})
    values = [{"w": jnp.asarray(rng.standard_normal(SIZE), jnp.float32)} for _ in range(num_islands)]
    expected, largest, until = sum(map(exactly, values)), 0.0, time.monotonic() + 300
    islands = [
        Island(directory(tmp_path), f"i{k}", like=values[0], cut=by_size(4), tls=None, rounds=rounds)
        for k in range(num_islands)
    ]
    try:
        for k, island in enumerate(islands):
            island.join(values[k], clock={})

        def step(updates):
            nonlocal expected, largest
            for k in rng.permutation(num_islands):
                new = add(values[k], rng.standard_normal(SIZE).astype(np.float32) if updates else np.float32(0))
                expected = expected + exactly(new) - exactly(values[k])  # what the update did, rounding and all
                values[k] = islands[k].exchange(new, new)
                largest = max(largest, np.abs(exactly(values[k])).max())
                time.sleep(rng.exponential(0.001))

        def exchanges():  # both sides count one
            return sum(island._node.exchanged for island in islands) // 2

        while exchanges() < EXCHANGES:
            assert time.monotonic() < until
            step(updates=True)
        for island in islands:
            island._node.ledger.is_offered = lambda segment: False
        while any(island._node.ledger._busy for island in islands):
            step(updates=False)
        step(updates=False)
        drift = np.abs(sum(map(exactly, values)) - expected).max()
        bound = 4 * np.sqrt(exchanges()) * 2.0**-24 * largest
        print(
            f"{num_islands} islands, rounds={rounds}, {exchanges()} exchanges: drift {drift:.3g}, at most {bound:.3g}"
        )
        assert 0 < drift <= bound
    finally:
        for island in islands:
            island.leave()
