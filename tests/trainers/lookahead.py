"""The shape of optax's lookahead_mnist: fast and slow parameters, and of these the slow ones are evaluated."""

import jax
import optax
from flax import linen as nn

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, digits

n, workers, steps = 8, 8, 8
net = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(32), nn.relu, nn.Dense(10)])


def loss_of(params, batch):
    return cross_entropy(net.apply({"params": params}, batch["image"]), batch["label"])


solver = optax.lookahead(optax.adam(1e-2), sync_period=4, slow_step_size=0.5)
solver = cj.as_optax(cj.crossover_sgd(solver, n))  # new


# was: @jax.jit
@lambda step: cj.per_worker(step, workers, donate=(0, 1))
def step(params, solver_state, batch):
    loss, grads = jax.value_and_grad(loss_of)(params.fast, batch)
    updates, solver_state = solver.update(grads, solver_state, params)
    return optax.apply_updates(params, updates), solver_state, loss


params = net.init(jax.random.key(0), digits(0)["image"])["params"]
before = float(loss_of(params, digits(100, 256)))
params = optax.LookaheadParams.init_synced(params)
# was: solver_state = solver.init(params)
params, solver_state = cj.copies((params, solver.init(params)), workers)
for i in range(steps):
    # was: params, solver_state, loss = step(params, solver_state, digits(i))
    params, solver_state, loss = step(params, solver_state, cj.split(digits(i), workers))
state = params, solver_state
# was: model = params.slow
model = cj.mean_over_workers(params.slow)
after = float(loss_of(model, digits(100, 256)))
