"""What an exchange takes where one device simulates all workers: by index, as `gossip` does, or by a batched ppermute.

    python -m benchmarks.simulated_exchange
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.simulated_exchange

64 workers with a perceptron 784-128-10 each, 26 MB in all; medians, and as a reference a pass over all of it.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

import crossover_jax as cj
from crossover_jax import mixing

WORKERS, SEGMENTS, REPEATS = 64, 16, 30
SHAPES = {"0": {"kernel": (784, 128), "bias": (128,)}, "1": {"kernel": (128, 10), "bias": (10,)}}


def main() -> None:
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda shape: rng.normal(size=(WORKERS, *shape)).astype(np.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )
    print(f"{'one pass over all parameters':40} {measure_ms(lambda tree, t: scale(tree), tree):6.1f} ms")
    by_index = mixing.is_simulated
    for wire in (None, "bfloat16", "int8"):
        mix = cj.gossip(cj.latin(WORKERS, SEGMENTS), cj.shuffle(SEGMENTS, SEGMENTS), cj.by_size(SEGMENTS), wire=wire)
        taken = []
        for form in (by_index, lambda axis: False):
            mixing.is_simulated = form
            taken.append(measure_ms(jax.vmap(mix, in_axes=(0, None), axis_name="worker"), tree))
        line = f"exchange in {wire or 'float32'}: by index, batched ppermute"
        print(f"{line:40} {taken[0]:6.1f} {taken[1]:6.1f} ms, {taken[1] / taken[0]:.1f} times")
    mixing.is_simulated = by_index


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
