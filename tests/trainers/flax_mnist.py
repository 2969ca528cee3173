"""The shape of flax's examples/mnist: nnx, BatchNorm, dropout and metrics, updated in place under `nnx.jit`."""

import optax
from flax import nnx

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, digits

n, workers, steps = 8, 8, 8


class CNN(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1)
        self.head = nnx.Linear(8 * 16, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.dropout(x.reshape(len(x), -1), rngs=rngs))


def loss_fn(net, rng, batch):
    logits = net(batch["image"], rng)
    return cross_entropy(logits, batch["label"]), logits


@nnx.jit
def train_step(net, optimizer, metrics, rng, batch):
    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(net, rng, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(net, grads)


def evaluate(net):
    net.eval()
    loss, _ = loss_fn(net, None, digits(100, 256))
    net.train()
    return float(loss)


net, rng = CNN(nnx.Rngs(0)), nnx.Rngs(1)
before = evaluate(net)
metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
tx = optax.sgd(0.05, momentum=0.9)
# was: optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
state = cj.copies((net, nnx.Optimizer(net, cj.as_optax(cj.crossover_sgd(tx, n)), wrt=nnx.Param), metrics, rng), workers)
step = cj.per_worker(cj.in_place(train_step), workers)  # new
for i in range(steps):
    # was: train_step(net, optimizer, metrics, rng, digits(i))
    state, _ = step(state, cj.split(digits(i), workers))
net, _, metrics, _ = cj.mean_over_workers(state)  # new
model, history, after = net, metrics.compute(), evaluate(net)
