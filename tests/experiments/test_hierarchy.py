"""Workers of two devices train a network with BatchNorm as their definition says, statistics synchronised or not."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax import topology
from experiments import models
from experiments.compiled import collectives, traffic
from experiments.step import init_state, make_train_step
from tests.oracles import mixed_by_matrices

WORKERS, BATCH, IMAGE, CLASSES, STEPS = 4, 8, (8, 8, 3), 5, 3
RATE, MOMENTUM = 0.1, 0.9
QUICKLY = {"xla_backend_optimization_level": 0}  # half the time to compile, and these programs run for milliseconds
PLACES = {
    "two devices each": lambda: cj.make_mesh(WORKERS, {"device": 2}, devices=jax.devices()[: 2 * WORKERS]),
    "one device each": lambda: cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS]),
    "simulated": lambda: WORKERS,
}


def network(bn_groups=1):
    """The loss of a narrow ResNet-8, its parameters and model state, all in float64."""
    options = {"num_classes": CLASSES, "image_shape": IMAGE, "width": 4, "dtype": "float64", "bn_groups": bn_groups}
    graphdefs, rng = [], np.random.default_rng(0)

    def shapes():
        graphdef, params, model_state = models.build("resnet8", seed=0, **options)
        graphdefs.append(graphdef)
        return params, model_state

    params, model_state = jax.eval_shape(shapes)  # building it would take longer than training it
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 2), params)
    model_state = jax.tree.map(lambda x: jnp.ones(x.shape), model_state)

    def loss_fn(params, model_state, batch, key):
        logits, model_state = models.apply(graphdefs[0], params, model_state, batch["image"], train=True, key=key)
        logits = logits.astype(jnp.float64)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, (model_state, {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()})

    return loss_fn, params, model_state


def pool_table_cut(params):
    pool, cut = topology.latin(WORKERS, 3), cj.by_module(params)  # by_size would cut each device's part
    return pool, cut, topology.sample(cut.num_segments, pool.num_rounds, seed=1)


def batch_at(step):
    rng = np.random.default_rng(step)
    images = rng.normal(size=(WORKERS, BATCH, *IMAGE))
    images[:, BATCH // 2 :] *= 3  # so that half a batch has other statistics than the whole
    return {"image": images, "label": rng.integers(CLASSES, size=(WORKERS, BATCH)).astype(np.int32)}


@functools.cache
def trained(place, bn_groups=1):
    """State after all steps, metrics `[steps, workers]`, and the text of the compiled step."""
    with jax.enable_x64(True):
        where = PLACES[place]()
        loss_fn, params, model_state = network(bn_groups)
        algorithm = cj.mix_after(optax.sgd(RATE, momentum=MOMENTUM), cj.gossip(*pool_table_cut(params)))
        sharding = None if isinstance(where, int) else NamedSharding(where, P(*where.axis_names))
        batches = [jax.device_put(batch_at(t), sharding) for t in range(STEPS)]
        state, metrics = cj.copies(init_state(params, model_state, algorithm), where), []
        step = make_train_step(loss_fn, algorithm, where).lower(state, batches[0], jnp.int32(0)).compile(QUICKLY)
        for t, batch in enumerate(batches):
            state, found = step(state, batch, jnp.int32(t))
            metrics.append(jax.device_get(found))
        return jax.device_get(state), stacked(metrics), step.as_text()


def averaged(trees):
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *trees)


def stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), got, expected)


@pytest.mark.parametrize("other", [pytest.param("one device each", marks=pytest.mark.slow), "simulated"])
def test_workers_of_two_devices_train_as_workers_of_one_with_the_whole_batch(other):
    state, metrics, _ = trained("two devices each")
    expected, expected_metrics, _ = trained(other)
    assert state.params["fc"]["kernel"].dtype == np.float64
    assert_close(state, expected)
    assert_close(metrics, expected_metrics)


@pytest.mark.parametrize("bn_groups", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bn_groups_is_the_loss_on_each_part_alone_with_gradients_and_running_statistics_averaged(bn_groups):
    """One group: what the compiler synchronises. Two: the paper's members, each with the statistics of its device."""
    state, metrics, _ = trained("two devices each", bn_groups)
    with jax.enable_x64(True):
        loss_fn, *one = network()  # ordinary BatchNorm
        mixing = pool_table_cut(one[0])
        gradients = jax.jit(jax.value_and_grad(partial(loss_fn, key=None), has_aux=True), compiler_options=QUICKLY)
        params, model_state = stacked([jax.device_get(one)] * WORKERS)
        velocity = jax.tree.map(np.zeros_like, params)
        for t in range(STEPS):

            def of_part(w, rows):
                own, old, batch = jax.tree.map(lambda x: x[w], (params, model_state, batch_at(t)))
                return jax.device_get(gradients(own, old, jax.tree.map(lambda x: x[rows], batch)))

            parts = np.split(np.arange(BATCH), bn_groups)
            found = stacked([averaged([of_part(w, rows) for rows in parts]) for w in range(WORKERS)])
            (loss, (model_state, _)), grads = found
            velocity = jax.tree.map(lambda v, g: MOMENTUM * v + g, velocity, grads)
            params = jax.tree.map(lambda x, v: x - RATE * v, params, velocity)
            params = mixed_by_matrices(params, t, *mixing)
            np.testing.assert_allclose(metrics["loss"][t], loss, rtol=1e-9)
        assert_close((state.params, state.model_state), (params, model_state))


def test_members_with_their_own_statistics_train_another_model():
    together, alone = (trained("two devices each", groups)[1]["loss"][0] for groups in (1, 2))
    assert (np.abs(together - alone) > 1e-3 * together).all()  # at the first step, so from equal parameters


def test_only_gossip_leaves_a_worker_and_members_reduce_gradients_but_no_statistics():
    reduces = []
    for bn_groups in (1, 2):
        text = trained("two devices each", bn_groups)[2]
        rows = traffic(text, PLACES["two devices each"]())
        assert {(row.operation, row.axes) for row in rows} == {
            ("collective-permute", ("worker",)),
            ("all-gather", ("device",)),
            ("all-reduce", ("device",)),
        }
        reduces.append(collectives(text)["all-reduce"])
    together, alone = reduces
    assert together > 9  # moments forward and their gradients backward, nine norms
    assert 1 <= alone <= 2  # everything at the end, packed
