"""LARS against the reference code's equations in numpy, and trust ratios from norms averaged over workers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax.traced import wire_bytes
from experiments.compiled import collectives
from experiments.optimizers import lars, scale_by_trust_ratio

WORKERS, STEPS = 4, 5
ETA, BETA, EPS = 0.0025, 0.96, 1e-9
SHAPES = {"conv": (3, 3, 2, 8), "fc": (8, 4), "scale": (8,), "zero": (2, 2)}
MATRICES = ("conv", "fc", "zero")


def rate(step):
    return 9.0 / (step + 1)


def decay(step):
    return 5e-2 / (step + 1)


def random_tree(seed, *leading):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*leading, *shape)) * (name != "zero") for name, shape in SHAPES.items()}


def as_the_reference_does(params, grads_of, axis):
    """Every worker's parameters `[workers, ...]` after `STEPS` steps; norms are averaged over workers if `axis`."""
    buffers = jax.tree.map(np.zeros_like, params)
    for t in range(STEPS):
        for name, g in grads_of(t).items():
            w, axes = params[name], tuple(range(1, params[name].ndim))
            if name in MATRICES:
                of_w, of_g = (np.sqrt((x**2).sum(axes, keepdims=True)) for x in (w, g))
                if axis:
                    of_w, of_g = (np.mean(x, axis=0, keepdims=True) for x in (of_w, of_g))
                ratio = np.where((of_w == 0) | (of_g == 0), 1, ETA * of_w / (of_g + decay(t) * of_w + EPS))
                g = ratio * (g + decay(t) * w)
            buffers[name] = BETA * buffers[name] + rate(t) * g
            params = {**params, name: w - buffers[name]}
    return params


def run(tx, params, grads_of, where, specs=None):
    """Every worker's parameters after `STEPS` steps without communication but the norms'."""
    state = cj.copies(lambda: tx.init(jax.tree.map(lambda x: jnp.asarray(x[0]), params)), where)

    def one(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = cj.per_worker(one, where, donate=False, out_specs=specs and (specs, None))
    for t in range(STEPS):
        params, state = step(params, state, grads_of(t))
    return params


def grads_of(step):
    return random_tree(step + 1, WORKERS)


def reference(axis):
    return lars(rate, momentum=BETA, weight_decay=decay, coefficient=ETA, eps=EPS, axis=axis)


@pytest.mark.parametrize("axis", [None, "worker"])
def test_it_is_the_references_lars(axis):
    with jax.enable_x64(True):
        start = random_tree(0, WORKERS)
        found = run(reference(axis), jax.tree.map(jnp.asarray, start), grads_of, WORKERS)
        expected = as_the_reference_does(start, grads_of, axis)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
        other = as_the_reference_does(start, grads_of, not axis)
        assert not np.allclose(found["fc"], other["fc"], rtol=1e-3)


def test_without_decay_it_is_optax():
    params, grads = (jax.tree.map(jnp.float32, random_tree(seed)) for seed in (0, 1))
    ours = lars(0.3, momentum=0.9, coefficient=0.01, eps=0.0, nesterov=True)
    mask = {name: name in MATRICES for name in SHAPES}
    theirs = optax.lars(0.3, trust_coefficient=0.01, momentum=0.9, nesterov=True, trust_ratio_mask=mask)
    results = [tx.update(grads, tx.init(params), params)[0] for tx in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_averaged_norms_cost_one_small_all_reduce():
    params = {f"layer{i}": {"w": jnp.ones((64, 64)), "b": jnp.ones(64)} for i in range(54)}  # ResNet-50's number
    sent = {}
    for axis in (None, "worker"):
        algorithm = cj.crossover_sgd(reference(axis), WORKERS)
        update = lambda p, s, a=algorithm: a.update(p, s, p, 0)
        sent[axis] = wire_bytes(update, params, algorithm.init(params), num_workers=WORKERS)
    assert sent["worker"] - sent[None] == 2 * (WORKERS - 1) / WORKERS * 54 * 2 * 4 < 4096

    few = dict(list(params.items())[:9])  # as many as it takes to see that they share one
    mesh = cj.make_mesh(WORKERS, devices=jax.devices()[:WORKERS])
    state = cj.copies(lambda: (few, algorithm.init(few)), mesh)
    step = cj.per_worker(lambda both, t: algorithm.update(both[0], both[1], both[0], t), mesh, replicated=(1,))
    found = collectives(step.lower(state, jnp.int32(0)).compile().as_text())
    assert found["all-reduce"] == 1
    assert found["conditional"] == 0


def test_norms_of_sharded_leaves_are_those_of_whole_ones():
    mesh = cj.make_mesh(WORKERS, {"fsdp": 2}, devices=jax.devices()[: 2 * WORKERS])
    specs = {"conv": P(None, None, None, "fsdp"), "fc": P("fsdp"), "scale": P(), "zero": P()}

    def placed(tree):
        put = lambda x, spec: jax.device_put(np.float32(x), NamedSharding(mesh, P("worker", *spec)))
        return jax.tree.map(put, tree, specs)

    sharded = run(
        reference("worker"), placed(random_tree(0, WORKERS)), lambda t: placed(grads_of(t)), mesh, specs=specs
    )
    whole = as_the_reference_does(random_tree(0, WORKERS), grads_of, "worker")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), sharded, whole)
    assert "fsdp" in str(sharded["fc"].sharding.spec)


def test_parameters_must_be_passed():
    with pytest.raises(ValueError, match="`params` must be passed"):
        scale_by_trust_ratio().update({"w": jnp.ones((2, 2))}, scale_by_trust_ratio().init({}))
