"""A data-parallel program with its own mesh and its own `shard_map`: gossip instead of the average of gradients.

The workers are the devices along "data". Parameters were replicated there, now every device has its own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import crossover_jax as cj  # new

jax.config.update("jax_num_cpu_devices", 8)
devices, steps = 8, 200
mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
of_state = P("data")  # was: of_state = P()
mix = cj.crossover(devices, axis="data")  # new
tx = cj.as_optax(cj.mix_after(optax.adam(1e-2), mix))  # was: tx = optax.adam(1e-2)
params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


@partial(jax.jit, donate_argnums=0)
@partial(jax.shard_map, mesh=mesh, in_specs=(of_state, P("data"), P()), out_specs=(of_state, P()), check_vma=False)
def step(state, x, i):
    params, opt_state = jax.tree.map(lambda x: x[0], state)  # was: params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    # was: grads = jax.lax.pmean(grads, "data")
    updates, opt_state = tx.update(grads, opt_state, params, step=i)
    state = optax.apply_updates(params, updates), opt_state
    state = jax.tree.map(lambda x: x[None], state)  # new
    return state, jax.lax.pmean(loss, "data")


state = params, tx.init(params)
state = cj.copies(state, mesh, axis="data")  # was: state = jax.device_put(state, jax.NamedSharding(mesh, P()))
for i in range(steps):
    state, loss = step(state, jax.random.normal(jax.random.key(i), (256, 16)), i)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, 16))):.4f}")
