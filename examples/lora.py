"""LoRA: the base stays as it is and travels nowhere, only the adapters train and gossip (`leaves=`)."""

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new

workers, steps = 8, 100
width, rank = 64, 4
keys = jax.random.split(jax.random.key(0), 5)
base = jax.random.normal(keys[0], (2, width, width)) / width**0.5
# The task: the base, but changed by a matrix of low rank in each layer.
change = jax.random.normal(keys[1], (2, width, rank)) @ jax.random.normal(keys[2], (2, rank, width)) / width
params = {
    "base": base,
    "lora": {"a": jax.random.normal(keys[3], (2, width, rank)) / width**0.5, "b": jnp.zeros((2, rank, width))},
}


def apply(layers, x):
    return jnp.tanh(x @ layers[0]) @ layers[1]


def loss_fn(params, x):
    layers = params["base"] + params["lora"]["a"] @ params["lora"]["b"]
    return jnp.mean((apply(layers, x) - apply(base + change, x)) ** 2)


tx = optax.multi_transform({"train": optax.adam(1e-2), "keep": optax.set_to_zero()}, {"base": "keep", "lora": "train"})
mix = cj.crossover(workers, leaves=lambda name: "lora" in name)  # new
tx = cj.as_optax(cj.mix_after(tx, mix))  # new


def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


state = params, tx.init(params)
state = cj.copies(state, workers)  # new
step = cj.per_worker(train_step, workers)  # was: step = jax.jit(train_step)
for i in range(steps):
    x = jax.random.normal(jax.random.key(i), (256, width))
    x = cj.split(x, workers)  # new
    state, loss = step(state, x)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, width))):.5f}")
