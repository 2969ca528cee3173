"""An algorithm of one's own, a mix as elastic as a spring: x <- x + k (W x − x) + u, k from 0 to 1.

An `Algorithm` is two pure functions on one worker's values. This one is in the table of tests/test_algorithms.py by one
line, and so keeps the contract of all: the mean is kept, workers come to agree, equal workers stay equal, one
compilation, as many messages as promised, a mesh is its simulation, and one worker is plain optax.
"""

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new

workers, steps = 8, 200


def elastic(optimizer, mix, strength=0.5):
    """Pulled by its peers as strongly as `strength` says, where `mix_during` takes all of the mix."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(grads, state, params, step, **extra):
        updates, state = optimizer.update(grads, state, params, **extra)
        pulled = jax.tree.map(lambda x, mixed: x + strength * (mixed - x), params, mix(params, step))
        return optax.apply_updates(pulled, updates), state

    return cj.Algorithm(optimizer.init, update)


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


if __name__ == "__main__":
    tx = cj.as_optax(elastic(optax.adam(1e-2), cj.crossover(workers)))  # was: tx = optax.adam(1e-2)
    params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}
    state = params, tx.init(params)
    state = cj.copies(state, workers)  # new
    step = cj.per_worker(train_step, workers)  # was: step = jax.jit(train_step, donate_argnums=0)
    for i in range(steps):
        x = jax.random.normal(jax.random.key(i), (256, 16))
        x = cj.split(x, workers)  # new
        state, loss = step(state, x)
    print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
    model = cj.mean_over_workers(state[0])  # was: model = state[0]
    print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, 16))):.4f}")
