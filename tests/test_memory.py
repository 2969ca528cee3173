"""What an exchange alone needs beside the donated parameters, ahead of time for TPU pods that are not here.

Two models are the floor: what is sent and what arrives. Before `mixing` had its barriers these needed 3.2 to 4.4, with
half of the segments at home 2.4; only the model that lies whole on every device of a slice needed no more than now.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj

pytestmark = pytest.mark.full_compilation


def others(*args):
    """Of a kind that another case stands for in `make test`."""
    return pytest.param(*args, marks=pytest.mark.slow)


EVEN = [(16384, 1024)] * 8  # 512 MiB in float32
ODD = [(4099, 4096), (4097,)] * 8  # no leaf, and no segment, begins where a tile does
ONE_SLICE, PODS = ("v5e:4x4", 1), ("v5e:2x4", 4)


def temporaries(where, workers, rounds, shapes, specs, dtype, table=None, in_flight=None, cut=cj.by_size):
    """Bytes of temporaries per device, divided by its part of the parameters."""
    topology, slices = where
    several = {"num_slices": slices} if slices > 1 else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices
    inner = len(devices) // workers
    mesh = cj.make_mesh(workers, {"device": inner} if inner > 1 else None, devices=devices)
    sharding = NamedSharding(mesh, P("worker", *(specs or ())))
    scale = 1 if specs is None else inner
    leaves = [jax.ShapeDtypeStruct((workers, scale * n, *rest), dtype, sharding=sharding) for n, *rest in shapes]
    table = cj.topology.shuffle(rounds, rounds) if table is None else table
    mix = cj.gossip(cj.topology.latin(workers, rounds), cut(table.shape[1]), table, specs=specs, in_flight=in_flight)
    step = cj.per_worker(mix, mesh, replicated=(1,), out_specs=specs)
    t = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    memory = step.lower(leaves, t).compile().memory_analysis()
    part = sum(int(np.prod(shape)) for shape in shapes) * jnp.dtype(dtype).itemsize
    assert memory.alias_size_in_bytes >= part  # donated
    return memory.temp_size_in_bytes / part


@pytest.mark.parametrize(
    ("where", "workers", "rounds", "shapes", "specs", "dtype", "limit"),
    [
        others(ONE_SLICE, 16, 4, EVEN, None, jnp.float32, 2.3),
        others(ONE_SLICE, 16, 7, EVEN, None, jnp.float32, 2.3),
        (ONE_SLICE, 16, 8, ODD, None, jnp.float32, 2.3),
        others(ONE_SLICE, 16, 12, EVEN, None, jnp.bfloat16, 2.3),
        others(("v5p:2x2x2", 1), 8, 7, EVEN, None, jnp.float32, 2.3),
        (PODS, 4, 3, EVEN, P("device"), jnp.float32, 2.1),  # a worker is a slice
        (PODS, 4, 3, [(131072, 1024)], None, jnp.float32, 1.1),  # and holds the model on every device: 1/8 each travels
        # Shifts by less than a slice stay inside for some chips and leave it for others: the compiler receives twice.
        (PODS, 32, 7, EVEN, None, jnp.float32, 2.5),
    ],
)
def test_an_exchange_needs_little_more_than_what_leaves_and_what_arrives(
    where, workers, rounds, shapes, specs, dtype, limit
):
    assert temporaries(where, workers, rounds, shapes, specs, dtype) < limit


def test_half_of_the_segments_need_half_of_the_messages_beside_the_packed_model():
    table = cj.topology.stream(8, 2, every=2)
    assert temporaries(ONE_SLICE, 16, 2, EVEN, None, jnp.float32, table) < 2.2


@pytest.mark.parametrize(("in_flight", "limit"), [(1, 1.3), others(2, 1.6), others(3, 1.8)])
def test_fewer_channels_in_flight_need_less_beside_the_packed_model(in_flight, limit):
    assert temporaries(ONE_SLICE, 16, 8, ODD, None, jnp.float32, in_flight=in_flight) < limit


@pytest.mark.parametrize(
    ("where", "workers", "in_flight", "limit"),
    [
        (ONE_SLICE, 16, 1, 0.4),
        others(ONE_SLICE, 16, 2, 0.75),
        others(ONE_SLICE, 16, None, 2.7),
        others(PODS, 32, 1, 0.4),
        others(PODS, 32, 2, 0.75),
        others(PODS, 32, None, 2.7),
    ],
)
def test_where_nothing_is_packed_little_more_is_needed_than_the_messages(where, workers, in_flight, limit):
    """Of eight channels two eighths of the model for each that is under way, and what comes from two kinds of links."""
    assert temporaries(where, workers, 8, EVEN, None, jnp.float32, in_flight=in_flight, cut=cj.by_rows) < limit


def test_on_cpus_too_rows_are_written_where_they_lie():
    """Two of eight segments leave and two arrive; a copy of a leaf would be seen by itself."""
    mesh = cj.make_mesh(8, devices=jax.devices()[:8])
    mix = cj.gossip(cj.topology.latin(8, 4), cj.by_rows(8), cj.topology.shuffle(8, 4), in_flight=1)
    leaves = cj.copies(lambda: [jnp.zeros((8192, 4)), jnp.zeros((64, 16, 32))], mesh)
    done = cj.per_worker(mix, mesh, replicated=(1,)).lower(leaves, jnp.int32(0)).compile()
    assert done.memory_analysis().temp_size_in_bytes < 1.02 * (2 / 8 + 2 / 8) * (32768 + 32768) * 4
    assert " copy(" not in done.as_text()
