"""The shape of purejaxrl's ppo.py: environment, rollouts and updates are scans inside one compiled function."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import crossover_jax as cj  # new

n, workers, steps = 8, 8, 8
ENVS, LENGTH, MINIBATCHES, GAMMA, LAMBDA, CLIP = 16, 4, 2, 0.9, 0.9, 0.2
TARGETS = jax.random.normal(jax.random.key(9), (4, 3))  # the environment: which action is right for an observation


class Transition(NamedTuple):
    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    value: jax.Array
    log_prob: jax.Array


class ActorCritic(nn.Module):
    @nn.compact
    def __call__(self, obs):
        x = nn.tanh(nn.Dense(16)(obs))
        return nn.log_softmax(nn.Dense(3)(x)), nn.Dense(1)(x)[..., 0]


def chosen(log_probs, action):
    return jnp.take_along_axis(log_probs, action[..., None], -1)[..., 0]


def env_step(rng, obs, action):
    return jax.random.normal(rng, obs.shape), (action == (obs @ TARGETS).argmax(-1)).astype(jnp.float32)


def loss_fn(params, apply_fn, batch):
    old, advantage, target = batch
    log_probs, value = apply_fn(params, old.obs)
    ratio = jnp.exp(chosen(log_probs, old.action) - old.log_prob)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    actor = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantage).mean()
    return 0.5 * jnp.square(value - target).mean() - actor


def make_train():
    def train(rng):
        net = ActorCritic()
        rng, init_rng, env_rng = jax.random.split(rng, 3)
        obs = jax.random.normal(env_rng, (ENVS, 4))
        # was: params = net.init(init_rng, obs)
        params = jax.tree.map(lambda x: jax.lax.all_gather(x, "worker")[0], net.init(init_rng, obs))
        tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
        tx = cj.as_optax(cj.crossover_sgd(tx, n))  # new
        state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

        def update_step(carry, _):
            def rollout(carry, _):
                state, obs, rng = carry
                rng, action_rng, env_rng = jax.random.split(rng, 3)
                log_probs, value = net.apply(state.params, obs)
                action = jax.random.categorical(action_rng, log_probs)
                new_obs, reward = env_step(env_rng, obs, action)
                return (state, new_obs, rng), Transition(obs, action, reward, value, chosen(log_probs, action))

            def advantages(carry, seen):
                advantage, next_value = carry
                advantage = seen.reward + GAMMA * next_value - seen.value + GAMMA * LAMBDA * advantage
                return (advantage, seen.value), advantage

            def update_minibatch(state, batch):
                loss, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, batch)
                return state.apply_gradients(grads=grads), loss

            (state, obs, rng), seen = jax.lax.scan(rollout, carry, None, LENGTH)
            last = net.apply(state.params, obs)[1]
            _, advantage = jax.lax.scan(advantages, (jnp.zeros_like(last), last), seen, reverse=True)
            rng, order_rng = jax.random.split(rng)
            order = jax.random.permutation(order_rng, LENGTH * ENVS).reshape(MINIBATCHES, -1)
            batches = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[2:])[order], (seen, advantage, advantage + seen.value)
            )
            state, loss = jax.lax.scan(update_minibatch, state, batches)
            return (state, obs, rng), {"loss": loss.mean(), "reward": seen.reward.mean()}

        (state, _, _), metrics = jax.lax.scan(update_step, (state, obs, rng), None, steps)
        return state, metrics

    return train


def evaluate(params):
    """How often the most likely action is a wrong one."""
    obs = jax.random.normal(jax.random.key(8), (512, 4))
    return float((ActorCritic().apply(params, obs)[0].argmax(-1) != (obs @ TARGETS).argmax(-1)).mean())


before = evaluate(ActorCritic().init(jax.random.key(0), jnp.zeros((1, 4))))
# was: step = jax.jit(make_train())
step = cj.per_worker(make_train(), workers, replicated=("rng",))
state, metrics = step(jax.random.key(1))
# was: model = state.params
model = cj.mean_over_workers(state.params)
after = evaluate(model)
