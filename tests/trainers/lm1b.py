"""The shape of flax's examples/lm1b: linen, `jit` with static arguments, a dropout key that all steps share, resume."""

import dataclasses

import jax
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import crossover_jax as cj  # new
from tests.trainers.common import cross_entropy, restore_checkpoint, save_checkpoint, text

n, workers, steps, folder = 8, 8, 8, None


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 16
    dropout_rate: float = 0.1
    deterministic: bool = False


class TransformerLM(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        x = nn.Embed(32, c.width)(tokens)
        y = nn.relu(nn.Dense(2 * c.width)(nn.LayerNorm()(x)))
        x = x + nn.Dense(c.width)(nn.Dropout(c.dropout_rate, deterministic=c.deterministic)(y))
        return nn.Dense(32)(x)


def loss_of(params, tokens, config, rngs=None):
    logits = TransformerLM(config).apply({"params": params}, tokens[:, :-1], rngs=rngs)
    return cross_entropy(logits, tokens[:, 1:])


def train_step(state, tokens, config, learning_rate_fn, dropout_rng):
    dropout_rng = jax.random.fold_in(dropout_rng, state.step)
    loss, grads = jax.value_and_grad(loss_of)(state.params, tokens, config, {"dropout": dropout_rng})
    return state.apply_gradients(grads=grads), {"loss": loss, "learning_rate": learning_rate_fn(state.step)}


config, eval_config = Config(), Config(deterministic=True)
learning_rate_fn = optax.linear_schedule(0.0, 1e-2, 4)
net = TransformerLM(eval_config)
params = net.init(jax.random.key(0), text(0)[:, :-1])["params"]
before = float(loss_of(params, text(100), eval_config))
tx = optax.adamw(learning_rate_fn, b2=0.98, weight_decay=0.1)
tx = cj.as_optax(cj.crossover_sgd(tx, n))  # new
state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)
state = cj.copies(state, workers)  # new
state = restore_checkpoint(folder, state)
# was: start = int(state.step)
start = int(state.step[0])
# was: step = jax.jit(train_step, static_argnums=(2, 3), donate_argnums=0)
step = cj.per_worker(train_step, workers, replicated=("dropout_rng",), static=(2, 3))
dropout_rng = jax.random.key(1)
for i in range(start, steps):
    tokens = text(i)
    tokens = cj.split(tokens, workers)  # new
    state, metrics = step(state, tokens, config, learning_rate_fn, dropout_rng)
    save_checkpoint(folder, state, i + 1)
# was: model = state.params
model = cj.mean_over_workers(state.params)
after = float(loss_of(model, text(100), eval_config))
