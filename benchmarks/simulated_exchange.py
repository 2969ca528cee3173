"""What an exchange takes where one device simulates all workers: by index, as `gossip` does, or by a batched ppermute.

    python -m benchmarks.simulated_exchange
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.simulated_exchange

64 workers with a perceptron 784-128-10 each, 26 MB in all; medians, and as a reference a pass over all of it.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import crossover_jax as cj
from crossover_jax import topology
from crossover_jax.lowering import exchange_by_channels, traced_channels
from crossover_jax.packing import map_packed
from crossover_jax.wire import Wire

WORKERS, SEGMENTS, REPEATS = 64, 16, 30
SHAPES = {"0": {"kernel": (784, 128), "bias": (128,)}, "1": {"kernel": (128, 10), "bias": (10,)}}


def main() -> None:
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda shape: rng.normal(size=(WORKERS, *shape)).astype(np.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )
    print(f"{'one pass over all parameters':40} {measure_ms(lambda tree, t: scale(tree), tree):6.1f} ms")
    pool, cut = topology.latin(WORKERS, SEGMENTS), cj.by_size(SEGMENTS)
    for wire in (None, "bfloat16", "int8"):
        by_index, by_permutes = (
            measure_ms(jax.vmap(mix, in_axes=(0, None), axis_name="worker"), tree)
            for mix in (cj.gossip(pool, cut, wire=wire), make_mesh_exchange(pool, cut, wire))
        )
        line = f"exchange in {wire or 'float32'}: by index, batched ppermute"
        print(f"{line:40} {by_index:6.1f} {by_permutes:6.1f} ms, {by_permutes / by_index:.1f} times")


def make_mesh_exchange(pool: topology.Pool, cut: cj.Cut, wire: str | None) -> Callable:
    """What `gossip` compiles to on a mesh."""
    table = topology.shuffle(SEGMENTS, SEGMENTS)

    def exchange(arrays, pieces, step):
        channels = traced_channels(table, step)
        return exchange_by_channels(arrays, pieces, channels, pool, "worker", Wire(wire), None)

    return lambda tree, step: map_packed(exchange, tree, cut, "worker", None, None, step)


def scale(tree):
    return jax.tree.map(lambda x: 1.001 * x, tree)


def measure_ms(function, tree) -> float:
    run = jax.jit(function, donate_argnums=0)
    tree = jax.block_until_ready(run(jax.tree.map(jnp.array, tree), jnp.int32(0)))
    taken = []
    for t in range(REPEATS):
        began = time.perf_counter()
        tree = jax.block_until_ready(run(tree, jnp.int32(t)))
        taken.append(time.perf_counter() - began)
    return 1e3 * float(np.median(taken))


if __name__ == "__main__":
    main()
