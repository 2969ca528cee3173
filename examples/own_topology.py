"""A topology of one's own: two racks of four workers, three rounds inside the racks and one across.

A pool is two numpy arrays. Row k of round p says whom each worker hears, and `share` how much of it each takes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import crossover_jax as cj  # new
from crossover_jax.topology import Pool, contraction, cycle  # new

workers, steps = 8, 200
me = np.arange(workers)
rack, place = me // 4 * 4, me % 4
rounds = [rack + (place + 1) % 4, rack + (place + 2) % 4, rack + (place + 3) % 4, (me + 4) % workers]  # new
pool = Pool.from_peers(np.stack(rounds)[:, None], 0.5)  # new
print(f"a round leaves {contraction(pool).worst:.3f} of the squared disagreement, at worst, on average")  # new

mix = cj.gossip(pool, cj.whole(), cycle)  # new
tx = cj.as_optax(cj.mix_after(optax.adam(1e-2), mix))  # was: tx = optax.adam(1e-2)
params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


def train_step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


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
