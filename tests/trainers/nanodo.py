"""The shape of nanodo's train.py: a Trainer holds state and step, a constraint on the batch, MultiSteps, orbax."""

from functools import partial

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, restore_checkpoint, save_checkpoint, text

n, workers, steps, folder = 8, 8, 8, None
# was: mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
mesh = workers if isinstance(workers, jax.sharding.Mesh) else None


class TransformerDo(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 16)(tokens)
        x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm(use_bias=False)(x))))
        return nn.Dense(32, use_bias=False)(x)


def loss_of(params, apply_fn, tokens):
    return cross_entropy(apply_fn({"params": params}, tokens[:, :-1]), tokens[:, 1:])


def train_step(state, tokens, mesh):
    if mesh is not None:
        tokens = jax.lax.with_sharding_constraint(tokens, jax.NamedSharding(mesh, jax.P("data")))
    loss, grads = jax.value_and_grad(loss_of)(state.params, state.apply_fn, tokens)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # The step of the loop, not of the micro batches.
    state = state.replace(step=state.opt_state.gradient_step + 1, params=params, opt_state=opt_state)
    return state, {"train_loss": loss}


class Trainer:
    def __init__(self, state, mesh):
        self.state = state
        # was: self.step_fn = jax.jit(partial(train_step, mesh=mesh), donate_argnames=("state",))
        self.step_fn = cj.per_worker(partial(train_step, mesh=mesh), workers)

    @property
    def step(self):
        # was: return int(self.state.step)
        return int(self.state.step[0])

    def do_step(self, tokens):
        # was: self.state, metrics = self.step_fn(self.state, tokens)
        self.state, metrics = self.step_fn(self.state, cj.split(tokens, workers))
        return metrics


net, opt = TransformerDo(), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, eps=1e-4))
# was: tx = optax.MultiSteps(opt, every_k_schedule=2)
tx = optax.MultiSteps(cj.as_optax(cj.crossover_sgd(opt, n)), every_k_schedule=2)
params = net.init(jax.random.key(0), text(0)[:, :-1])["params"]
before = float(loss_of(params, net.apply, text(100)))
state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
state = cj.copies(state, workers)  # new
trainer = Trainer(restore_checkpoint(folder, state), mesh)
for i in range(trainer.step, steps):
    metrics = [trainer.do_step(text(2 * i + k)) for k in range(2)]
    save_checkpoint(folder, trainer.state, i + 1)
# was: model = trainer.state.params
model = cj.mean_over_workers(trainer.state.params)
after = float(loss_of(model, net.apply, text(100)))
state = trainer.state  # where the tests look for it
