"""Workers whose model is sharded inside: the same training, the state where it should be, one model between workers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments import data
from experiments.compiled import traffic
from experiments.configs import decoder
from experiments.evaluate import make_evaluate
from experiments.program import make_program, place_workers

WORKERS, BATCH, STEPS = 4, 16, 3
INSIDE = {"data": (1, 1), "fsdp": (4, 1), "tensor": (1, 4), "both": (2, 2), "all": (2, 1)}  # the rest is data parallel


def is_trace(state):
    return isinstance(state, optax.TraceState)


def make(algorithm, fsdp=1, tensor=1, *, devices=WORKERS):
    config = decoder.get_config()
    config.num_workers, config.batch_size, config.eval_batch_size = WORKERS, BATCH, 64
    config.algorithm = algorithm
    config.inner.fsdp, config.inner.tensor = fsdp, tensor
    config.optimizer, config.schedule.learning_rate = "sgd", 0.1
    config.model.options.update({"num_layers": 2, "width": 64, "num_heads": 4, "mlp_width": 128})
    mesh = place_workers(config, jax.devices()[:devices])
    dataset = data.describe("text", sequence=16)
    return make_program(config, dataset, mesh, 10), mesh


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        text = rng.integers(0, 256, (WORKERS, BATCH // WORKERS, 17))
        yield {"image": text[..., :-1].astype(np.uint8), "label": text[..., 1:].astype(np.int32)}


@functools.cache
def whole(algorithm):
    """The same training by workers of one device."""
    return run(*make(algorithm))


def run(program, mesh):
    state = cj.copies(program.init, mesh, specs=program.specs)
    metrics = []
    for t, batch in enumerate(batches()):
        state, of_step = program.step(state, program.place_batch(batch), program.place_step(t))
        metrics.append(jax.device_get(of_step))
    assert program.step._cache_size() == 1
    return state, metrics


# By modules, and whole: where "both" is right, each alone is so too.
@pytest.mark.parametrize(
    ("algorithm", "inside"),
    [
        *(("crossover_paper", inside) for inside in INSIDE),
        *(("sgp", inside) for inside in INSIDE if inside not in ("fsdp", "tensor")),
        *(pytest.param("sgp", inside, marks=pytest.mark.slow) for inside in ("fsdp", "tensor")),
    ],
)
def test_sharding_inside_a_worker_does_not_change_the_training(algorithm, inside):
    state, metrics = whole(algorithm)
    program, mesh = make(algorithm, *INSIDE[inside], devices=4 * WORKERS)
    sharded, same = run(program, mesh)
    for a, b in zip(metrics, same, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4), a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), state.params, sharded.params)
    specs = program.specs.params
    assert any(jax.tree.leaves(specs)) == (inside != "data")
    momenta = next(s.trace for s in jax.tree.leaves(sharded.algorithm, is_leaf=is_trace) if is_trace(s))
    for tree in (sharded.params, momenta):  # still where they were, momenta as their parameters
        jax.tree.map(
            lambda x, spec: (
                x.sharding.is_equivalent_to(NamedSharding(mesh, P("worker", *spec)), x.ndim)
                or pytest.fail(str(x.sharding))
            ),
            tree,
            specs,
        )


@pytest.mark.parametrize("inside", INSIDE)
def test_one_model_leaves_a_worker_in_a_round_and_nothing_is_gathered_between_workers(inside):
    program, mesh = make("crossover", *INSIDE[inside], devices=4 * WORKERS)
    shapes = cj.copies(program.init, mesh, specs=program.specs)
    batch = program.place_batch(next(batches()))
    rows = traffic(program.step.lower(shapes, batch, program.place_step(0)).compile().as_text(), mesh)
    between = [row for row in rows if "worker" in row.axes]
    assert {row.operation for row in between} == {"collective-permute"}
    model = sum(4 * x.size for x in jax.tree.leaves(program.shapes.params))
    # Up to 3 elements of padding per device make its segments equal, and up to 3 make a flat leaf divisible by 4.
    assert model <= sum(row.bytes_per_worker for row in between) <= model + 4 * (4 * 3 + 3 * 12)


def test_what_cannot_be_sharded_as_asked_is_one_sentence():
    with pytest.raises(ValueError, match=r"`config.inner.fsdp` times `config.inner.tensor` must divide the 4 devices"):
        make("crossover", 3, 1, devices=4 * WORKERS)


def test_evaluation_of_sharded_workers_is_that_of_whole_ones():
    rng = np.random.default_rng(1)
    text = rng.integers(0, 256, (3, 64, 17))
    rows = [
        {"image": t[:, :-1].astype(np.uint8), "label": t[:, 1:].astype(np.int32), "mask": np.arange(64) < 60}
        for t in text
    ]
    results = []
    for fsdp, tensor, devices in ((1, 1, WORKERS), (2, 2, 4 * WORKERS), (2, 1, 4 * WORKERS)):
        program, mesh = make("crossover_paper", fsdp, tensor, devices=devices)
        state = cj.copies(program.init, mesh, specs=program.specs)
        shift = lambda s: s._replace(
            params=jax.tree.map(lambda x: x * (1 + 0.1 * jax.lax.axis_index("worker")), s.params)
        )
        state = cj.per_worker(shift, mesh, out_specs=program.specs)(state)
        apply = lambda *args: program.apply(*args, train=False)[0]
        results.append(make_evaluate(apply, program.algorithm, mesh, program.specs)(1, state, rows))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-3)
    assert results[0]["consensus_distance"] > 1
    assert jnp.isfinite(results[0]["eval/mean/loss"])
