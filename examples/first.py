"""Eight workers fit a sine by gossip: no data, any CPU, seconds. Behind `# was:` stands what one device had."""

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new

workers, steps = 8, 200  # simulated on one device; cj.make_mesh(8) instead of 8 gives each a device of its own
tx = cj.as_optax(cj.crossover_sgd(optax.adam(1e-2), workers))  # was: tx = optax.adam(1e-2)
params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


state = cj.copies((params, tx.init(params)), workers)  # was: state = params, tx.init(params)
step = cj.per_worker(train_step, workers)  # was: step = jax.jit(train_step, donate_argnums=0)
for i in range(steps):
    x = jax.random.normal(jax.random.key(i), (256, 16))
    state, loss = step(state, cj.split(x, workers))  # was: state, loss = step(state, x)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, 16))):.4f}")
