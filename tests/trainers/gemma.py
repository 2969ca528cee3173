"""The shape of flax's examples/gemma: nnx split into a linen-like TrainState, merged again inside the loss."""

from typing import Any

import jax
import optax
from flax import nnx, struct
from flax.training import train_state

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, text

n, workers, steps = 8, 8, 8


class TrainState(train_state.TrainState):
    graphdef: Any = struct.field(pytree_node=False)


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(32, 16, rngs=rngs)
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.gate = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(16, 32, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(32, 16, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        y = self.norm(x)
        return self.embed.attend(x + self.down(nnx.gelu(self.gate(y)) * self.up(y)))


def setup_initial_state(constructor, tx, rng):
    graphdef, params = nnx.split(constructor(nnx.Rngs(params=rng)))
    return TrainState.create(apply_fn=graphdef.apply, params=params, tx=tx, graphdef=graphdef)


def loss_of(params, graphdef, tokens):
    return cross_entropy(nnx.merge(graphdef, params)(tokens[:, :-1]), tokens[:, 1:])


def train_step(state, tokens, learning_rate_fn):
    loss, grads = jax.value_and_grad(loss_of)(state.params, state.graphdef, tokens)
    return state.apply_gradients(grads=grads), {"loss": loss, "learning_rate": learning_rate_fn(state.step)}


learning_rate_fn = optax.linear_schedule(0.0, 1e-2, 4)
tx, rng = optax.adamw(learning_rate_fn, b2=0.98), jax.random.key(0)
# was: state = setup_initial_state(Transformer, tx, rng)
state = cj.copies(setup_initial_state(Transformer, cj.as_optax(cj.crossover_sgd(tx, n)), rng), workers)
# was: step = jax.jit(train_step, static_argnames=("learning_rate_fn",), donate_argnums=0)
step = cj.per_worker(train_step, workers, static=("learning_rate_fn",))
before = float(loss_of(nnx.state(Transformer(nnx.Rngs(params=rng))), state.graphdef, text(100)))
for i in range(steps):
    tokens = text(i)
    tokens = cj.split(tokens, workers)  # new
    state, metrics = step(state, tokens, learning_rate_fn)
# was: model = state.params
model = cj.mean_over_workers(state.params)
after = float(loss_of(model, state.graphdef, text(100)))
