"""Two islands in threads of one process: the second is half as fast as the first, and nobody waits for it.

In life an island is a process on a host of its own, with TLS (docs/islands.md), and the roster a directory that all of
them see. Its step is that of one device: gossip stands outside of it. `clock={}` says that each has its own state, as
out of a checkpoint; without it the second would take the first one's.
"""

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new
from crossover_jax import islands  # new

workers, steps = 2, 300
tx = optax.adam(1e-2)
params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}
roster = islands.directory(tempfile.mkdtemp())  # new


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


@jax.jit
def step(state, x):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss


def train(i):
    key, t, state = jax.random.key(i), 0, (params, tx.init(params))
    island = islands.Island(roster, f"island{i}", like=params, cut=cj.by_size(8), tls=None)  # new
    state = island.join(state, clock={})  # new
    while island.clock < workers * steps:  # was: while t < steps:
        state, _ = step(state, jax.random.normal(jax.random.fold_in(key, t), (128, 16)))
        state = island.exchange(state[0], state), state[1]  # new
        t += 1
        time.sleep(0.004 * (1 + i))  # a step of a real model takes longer
    print(f"island {i} took {t} steps")
    island.leave()  # new
    return state[0]


ends = list(ThreadPoolExecutor().map(train, range(workers)))  # was: model = train(0)
ends = jax.tree.map(lambda *each: jnp.stack(each), *ends)  # new
print(f"workers are {cj.consensus_distance(ends):.3f} apart")  # new
model = cj.mean_over_workers(ends)  # new
print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, 16))):.4f}")
