"""flax's TrainState: gossip is its `tx`, and the training step does not change at all."""

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import crossover_jax as cj  # new

workers, steps = 8, 100
patterns = jax.random.normal(jax.random.key(1), (10, 64))  # one for each of ten classes
net = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])


def make_batch(i, size=256):
    noise, of_label = jax.random.split(jax.random.key(i))
    label = jax.random.randint(of_label, (size,), 0, 10)
    return patterns[label] + 2 * jax.random.normal(noise, (size, 64)), label


def train_step(state, x, label):
    def loss_fn(params):
        return optax.softmax_cross_entropy_with_integer_labels(state.apply_fn(params, x), label).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


# Clipping and the schedule belong inside: what stands after `as_optax` would clip or scale the exchange.
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps)))
tx = cj.as_optax(cj.crossover_sgd(tx, workers))  # new
state = TrainState.create(apply_fn=net.apply, params=net.init(jax.random.key(0), patterns), tx=tx)
state = cj.copies(state, workers)  # new
step = cj.per_worker(train_step, workers)  # was: step = jax.jit(train_step, donate_argnums=0)
for i in range(steps):
    batch = make_batch(i)
    batch = cj.split(batch, workers)  # new
    state, loss = step(state, *batch)
print(f"workers are {cj.consensus_distance(state.params):.3f} apart")  # new
state = cj.mean_over_workers(state)  # new
model = state.params
x, label = make_batch(steps, 2000)
print(f"accuracy {(state.apply_fn(model, x).argmax(-1) == label).mean():.4f}")
