"""Two levels: gossip among four neighbours at every step, between the two groups at every fourth.

The axes have names and are simulated here. `cj.make_mesh(2, {"fast": 4})` in place of (2, 4) is two slices of a pod.
"""

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new

workers, steps = (2, 4), 200
axes = ("worker", "fast")  # new
near = cj.crossover(workers[1], axis="fast")  # new
far = cj.every(4, cj.crossover(workers[0], axis="worker"))  # new
tx = cj.as_optax(cj.mix_after(optax.adam(1e-2), cj.chain(near, far)))  # was: tx = optax.adam(1e-2)
params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


state = params, tx.init(params)
state = cj.copies(state, workers, axis=axes)  # new
step = cj.per_worker(train_step, workers, axis=axes)  # was: step = jax.jit(train_step, donate_argnums=0)
for i in range(steps):
    x = jax.random.normal(jax.random.key(i), (256, 16))
    x = cj.split(x, workers, axis=axes)  # new
    state, loss = step(state, x)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, 16))):.4f}")
