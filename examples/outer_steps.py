"""Outer steps for slow links: eight workers take 16 steps alone, then exchange what they have become, once.

`period` makes 16 steps one program with the exchange behind them. The outer optimizer steps along what the inner steps
have changed; with `cj.average()` as the exchange this is DiLoCo.
"""

import jax
import jax.numpy as jnp
import optax

import crossover_jax as cj  # new

workers, steps = 8, 320
length = 16  # inner steps between two exchanges
outer_optimizer = optax.sgd(0.7, momentum=0.5, nesterov=True)  # new
algorithm = cj.outer(optax.adam(1e-2), outer_optimizer, cj.crossover(workers), every=length)  # new
tx = cj.as_optax(algorithm)  # was: tx = optax.adam(1e-2)
params = {"hidden": 0.1 * jax.random.normal(jax.random.key(0), (16, 32)), "out": jnp.zeros((32, 1))}


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - jnp.sin(2 * x[:, :1])) ** 2)


def train_step(state, x, i):  # was: def train_step(state, x):
    params, opt = state
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    updates, opt = tx.update(grads, opt, params, step=i)  # was: updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), loss


state = params, tx.init(params)
state = cj.copies(state, workers)  # new
many_steps = cj.period(train_step, length)  # was: many_steps = lambda *both: jax.lax.scan(train_step, *both)
step = cj.per_worker(many_steps, workers, replicated=[2])  # was: step = jax.jit(many_steps, donate_argnums=0)
for first in range(0, steps, length):
    xs = [jax.random.normal(jax.random.key(i), (256, 16)) for i in range(first, first + length)]
    xs = jnp.stack([cj.split(x, workers) for x in xs], axis=1)  # was: xs = jnp.stack(xs)
    state, losses = step(state, xs, first)  # was: state, losses = step(state, xs)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
print(f"loss {loss_fn(model, jax.random.normal(jax.random.key(steps), (256, 16))):.4f}")
