"""flax nnx, with BatchNorm and dropout: a step that updates model and optimizer in place goes through `in_place`.

Random streams (`nnx.Rngs`) are part of the state: `copies` gives every worker its own.
"""

import jax
import optax
from flax import nnx

import crossover_jax as cj  # new

workers, steps = 8, 100
patterns = jax.random.normal(jax.random.key(1), (10, 64))  # one for each of ten classes


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(64, 32, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))


def make_batch(i, size=256):
    noise, of_label = jax.random.split(jax.random.key(i))
    label = jax.random.randint(of_label, (size,), 0, 10)
    return patterns[label] + 2 * jax.random.normal(noise, (size, 64)), label


def loss_fn(net, x, label):
    return optax.softmax_cross_entropy_with_integer_labels(net(x), label).mean()


def train_step(net, optimizer, x, label):
    loss, grads = nnx.value_and_grad(loss_fn)(net, x, label)
    optimizer.update(net, grads)
    return loss


net = Net(nnx.Rngs(0))
tx = cj.as_optax(cj.crossover_sgd(optax.adam(3e-3), workers))  # was: tx = optax.adam(3e-3)
optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
state = cj.copies((net, optimizer), workers)  # new
step = cj.per_worker(cj.in_place(train_step), workers)  # was: step = nnx.jit(train_step)
for i in range(steps):
    batch = make_batch(i)
    state, loss = step(state, *cj.split(batch, workers))  # was: loss = step(net, optimizer, *batch)
print(f"workers are {cj.consensus_distance(nnx.state(state[0], nnx.Param)):.3f} apart")  # new
net = cj.mean_over_workers(state[0])  # new
net.eval()
model = nnx.state(net, nnx.Param)
x, label = make_batch(steps, 2000)
print(f"accuracy {(net(x).argmax(-1) == label).mean():.4f}")
