"""How to take eight simulated workers' gradients of a small ResNet on one CPU device: vmap, lax.map or unrolled.

python -m benchmarks.simulated_convolutions
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import models

WORKERS, IMAGES, REPEATS = 8, 32, 5


def main() -> None:
    graphdef, *one = models.build("resnet8", num_classes=10, image_shape=(28, 28, 1), seed=0, width=16, stem_stride=2)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (WORKERS, *x.shape)), one)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(WORKERS, IMAGES, 28, 28, 1)).astype(np.float32)
    labels = rng.integers(10, size=(WORKERS, IMAGES))

    def gradient(state, images, labels):
        params, statistics = state

        def loss(params):
            logits, moved = models.apply(graphdef, params, statistics, images, train=True, key=None)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), moved

        return jax.grad(loss, has_aux=True)(params)

    def unrolled(*args):
        each = [gradient(*jax.tree.map(lambda x, i=i: x[i], args)) for i in range(WORKERS)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    variants = {"vmap": jax.vmap(gradient), "lax.map": lambda *a: jax.lax.map(lambda own: gradient(*own), a)}
    for name, variant in {**variants, "unrolled": unrolled}.items():
        run, times = jax.jit(variant), []
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            jax.block_until_ready(run(state, images, labels))
            times.append(time.perf_counter() - began)
        print(f"{name:8s} compile and first {times[0]:5.1f} s, median {1e3 * np.median(times[1:]):6.0f} ms", flush=True)


if __name__ == "__main__":
    main()
