"""Equinox: the arrays of a model are copied, its functions stay outside of what is trained (`eqx.partition`)."""

import equinox as eqx
import jax
import optax

import crossover_jax as cj  # new

workers, steps = 8, 100
patterns = jax.random.normal(jax.random.key(1), (10, 64))  # one for each of ten classes


def make_batch(i, size=256):
    noise, of_label = jax.random.split(jax.random.key(i))
    label = jax.random.randint(of_label, (size,), 0, 10)
    return patterns[label] + 2 * jax.random.normal(noise, (size, 64)), label


net = eqx.nn.MLP(64, 10, 32, depth=1, key=jax.random.key(0))
arrays, functions = eqx.partition(net, eqx.is_inexact_array)
tx = cj.as_optax(cj.crossover_sgd(optax.adam(1e-2), workers))  # was: tx = optax.adam(1e-2)


def loss_fn(arrays, x, label):
    logits = jax.vmap(eqx.combine(arrays, functions))(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


def train_step(state, x, label):
    arrays, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(arrays, x, label)
    updates, opt_state = tx.update(grads, opt_state, arrays)
    return (optax.apply_updates(arrays, updates), opt_state), loss  # not eqx.apply_updates: bfloat16 stays bfloat16


state = arrays, tx.init(arrays)
state = cj.copies(state, workers)  # new
step = cj.per_worker(train_step, workers)  # was: step = jax.jit(train_step, donate_argnums=0)
for i in range(steps):
    batch = make_batch(i)
    batch = cj.split(batch, workers)  # new
    state, loss = step(state, *batch)
print(f"workers are {cj.consensus_distance(state[0]):.3f} apart")  # new
model = cj.mean_over_workers(state[0])  # was: model = state[0]
x, label = make_batch(steps, 2000)
print(f"accuracy {(jax.vmap(eqx.combine(model, functions))(x).argmax(-1) == label).mean():.4f}")
