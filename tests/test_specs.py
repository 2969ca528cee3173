import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import crossover_jax as cj

MESH = cj.make_mesh(4, {"data": 2, "fsdp": 4}, devices=jax.devices()[:32])
PARAMS = {"big": {"kernel": np.zeros((256, 512)), "bias": np.zeros(512)}, "odd": np.zeros((257, 513)), "scale": 1.0}
SPECS = {"big": {"kernel": P(None, "fsdp"), "bias": P()}, "odd": P(), "scale": P()}


def matrices(params):
    return jax.tree.map(lambda x: np.ndim(x) > 1, params)


def test_big_leaves_are_sharded_along_their_largest_dimension_that_divides():
    assert cj.fsdp_specs(PARAMS, MESH) == SPECS
    assert cj.fsdp_specs({"square": np.zeros((3, 256, 256))}, MESH)["square"] == P(None, "fsdp")
    assert cj.fsdp_specs({"last": np.zeros((510, 256))}, MESH)["last"] == P(None, "fsdp")
    small = cj.fsdp_specs({"big": np.zeros((128, 64))}, MESH, min_size=128 * 64)
    assert small["big"] == P("fsdp")
    without = cj.make_mesh(4, {"data": 2}, devices=jax.devices()[:8])
    assert set(jax.tree.leaves(cj.fsdp_specs(PARAMS, without))) == {P()}


OPTIMIZERS = {
    "momentum": optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9),
    "adamw": optax.adamw(1e-3, mask=matrices),
    "masked": optax.masked(optax.adam(1e-3), matrices),
    "partition": optax.partition(
        {True: optax.adam(1e-3), False: optax.sgd(0.1, momentum=0.9)}, lambda params: matrices(params)
    ),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
}


@pytest.mark.parametrize("wrap", ["optimizer", "crossover", "push_sum", "as_optax"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_mirrors_a_parameter_lies_as_it_does(name, wrap):
    """The oracle: only one parameter is sharded, and nothing but its mirrors has its shape."""
    optimizer = OPTIMIZERS[name]
    wrapped = {
        "optimizer": lambda: optimizer,
        "crossover": lambda: cj.crossover_sgd(optimizer, 4),
        "push_sum": lambda: cj.push_sum(
            optimizer, cj.topology.pull(4, 2).transpose(), cj.whole(), cj.topology.cycle(1, 2)
        ),
        "as_optax": lambda: cj.as_optax(cj.crossover_sgd(optimizer, 4)),
    }[wrap]()
    state = jax.eval_shape(wrapped.init, PARAMS)
    specs = cj.state_specs(state, PARAMS, SPECS)
    by_shape = {(256, 512): P(None, "fsdp")}
    expected = jax.tree.map(lambda x: by_shape.get(x.shape, P()), state)
    assert jax.tree.leaves(specs) == jax.tree.leaves(expected)
    assert P(None, "fsdp") in jax.tree.leaves(specs)


def test_factored_moments_and_equal_shapes_elsewhere_are_not_mistaken_for_parameters():
    params, specs = {"a": np.zeros((256, 512)), "b": np.zeros((256, 512))}, {"a": P("fsdp"), "b": P()}
    factored = jax.eval_shape(optax.adafactor(1e-3).init, params)
    assert set(jax.tree.leaves(cj.state_specs(factored, params, specs))) == {P()}
    momenta = cj.state_specs(jax.eval_shape(optax.adam(1e-3).init, params), params, specs)[0]
    assert momenta.mu == momenta.nu == specs
    assert momenta.count == P()


def test_copies_are_made_in_place_with_the_values_of_one_device():
    def make():
        return {"w": jax.random.normal(jax.random.key(0), (256, 512)), "b": jnp.zeros(3)}

    made = cj.copies(make, MESH, specs={"w": P("fsdp"), "b": P()})
    assert made["w"].sharding.spec == P("worker", "fsdp")
    assert {s.data.shape for s in made["w"].addressable_shards} == {(1, 64, 512)}
    np.testing.assert_array_equal(made["w"], cj.copies(make, 4)["w"])
    placed = cj.copies(make(), MESH, specs={"w": P("fsdp"), "b": P()})
    np.testing.assert_allclose(made["w"], placed["w"], rtol=1e-6)
    assert placed["w"].sharding == made["w"].sharding


def test_local_parts_put_together_are_the_whole_and_blocks_with_holes_are_refused(monkeypatch):
    """Two processes, one of the first 16 devices, one of the others; JAX is told which of them it is."""
    x = np.arange(8 * 16 * 3).reshape(8, 16, 3)
    mesh = cj.make_mesh(8, {"data": 2, "fsdp": 2}, devices=jax.devices()[:32])

    def part_of(devices, spec):
        index = lambda self, shape: {d: i for d, i in self.devices_indices_map(shape).items() if d in devices}
        monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", index)
        found = x[cj.local_part(x.shape, mesh, spec)]
        monkeypatch.undo()
        return found

    devices = list(mesh.devices.flat)
    for spec, per_worker in ((P(("data", "fsdp")), 16), (P("data"), 16), (None, 16)):
        halves = [part_of(devices[:16], spec), part_of(devices[16:], spec)]
        assert halves[0].shape == (4, per_worker, 3)
        np.testing.assert_array_equal(np.concatenate(halves), x)
    inside = [part_of(devices[i : i + 2], P(("data", "fsdp"))) for i in (0, 2)]  # half a worker each
    np.testing.assert_array_equal(np.concatenate(inside, axis=1), x[:1])
    with pytest.raises(ValueError, match="must give this process one block"):
        part_of([devices[0], devices[5]], P(("data", "fsdp")))
    monkeypatch.undo()
    np.testing.assert_array_equal(cj.from_local(x, mesh, P("data")), x)
