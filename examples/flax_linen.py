"""flax linen without a TrainState: parameters, BatchNorm statistics and a dropout key by hand.

The key is the same for all in the loop; as an argument named in `replicated` every worker gets its own.
"""

import jax
import optax
from flax import linen as nn

import crossover_jax as cj  # new

workers, steps = 8, 100
patterns = jax.random.normal(jax.random.key(1), (10, 64))  # one for each of ten classes


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(32, use_bias=False)(x))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


def make_batch(i, size=256):
    noise, of_label = jax.random.split(jax.random.key(i))
    label = jax.random.randint(of_label, (size,), 0, 10)
    return patterns[label] + 2 * jax.random.normal(noise, (size, 64)), label


net = Net()
tx = cj.as_optax(cj.crossover_sgd(optax.adam(3e-3), workers))  # was: tx = optax.adam(3e-3)


def train_step(state, x, label, key):
    variables, opt_state = state

    def loss_fn(params):
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, new = net.apply(given, x, True, rngs={"dropout": key}, mutable="batch_stats")
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), new

    (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    updates, opt_state = tx.update(grads, opt_state, variables["params"])
    return ({"params": optax.apply_updates(variables["params"], updates), **new}, opt_state), loss


variables = net.init(jax.random.key(0), patterns, False)
state = variables, tx.init(variables["params"])
state = cj.copies(state, workers)  # new
step = cj.per_worker(train_step, workers, replicated=["key"])  # was: step = jax.jit(train_step, donate_argnums=0)
for i in range(steps):
    batch = make_batch(i)
    batch = cj.split(batch, workers)  # new
    state, loss = step(state, *batch, jax.random.key(i))
print(f"workers are {cj.consensus_distance(state[0]['params']):.3f} apart")  # new
state = cj.mean_over_workers(state)  # new
model = state[0]["params"]
x, label = make_batch(steps, 2000)
print(f"accuracy {(net.apply(state[0], x, False).argmax(-1) == label).mean():.4f}")
