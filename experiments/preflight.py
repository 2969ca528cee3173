"""Compile the very train step of a config for a pod that is not here, and say what it sends and whether it fits.

    python -m experiments.preflight --config=experiments/configs/fashion_mnist.py --topology=v5e:2x4 --num_slices=4

For TPUs the package libtpu is needed, no TPU. `--platform=cpu --num_devices=8` compiles for CPU devices, and
`--platform=gpu` for the GPUs of this machine. Exit code 0: compiles and fits; 2: does not fit; 1: anything else.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
if not __package__:  # as a script
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app
from absl.flags import DEFINE_bool, DEFINE_enum, DEFINE_integer, DEFINE_string
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from experiments import data, flags, report
from experiments.algorithms import make_algorithm
from experiments.compiled import collectives, in_flight, traffic
from experiments.operations import operations
from experiments.program import Program, batch_spec, make_program, place_workers
from experiments.settings import check_settings

PyTree = Any
PLATFORM = DEFINE_enum("platform", "tpu", ["tpu", "cpu", "gpu"], "What to compile for.")
TOPOLOGY = DEFINE_string("topology", "v5e:2x4", "A slice, as libtpu names it: v5e:16x16, v5p:4x4x4, v6e:16x16.")
NUM_SLICES = DEFINE_integer("num_slices", 1, "Slices, connected by the data centre's network (DCN).")
NUM_DEVICES = DEFINE_integer("num_devices", None, "Devices, for CPUs and GPUs; default: all there are.")
EXCHANGE_ONLY = DEFINE_bool("exchange_only", False, "Compile one round of the exchange, without the training step.")
JSON = DEFINE_bool("json", False, "Print one JSON object; sizes in bytes.")


class DoesNotFit(Exception):
    """The compiler found no room for the program."""


def preflight(config: ml_collections.ConfigDict, devices: list[jax.Device], *, exchange_only: bool) -> dict[str, Any]:
    """What the compiled train step of `config` on `devices` holds and sends, as plain data; sizes in bytes.

    Raises `DoesNotFit` with the compiler's own figures, and `ValueError` for settings that do not fit together.
    """
    check_settings(config)
    mesh = place_workers(config, devices)
    if not isinstance(mesh, Mesh):
        raise ValueError(
            f"`config.simulate` must be 'auto' or 'no' for {len(devices)} devices, got {config.simulate!r}."
        )
    dataset = data.describe(config.dataset.name, sequence=config.dataset.sequence)
    program = make_program(config, dataset, mesh, num_steps=config.steps or 1000)
    assert program.specs is not None
    state = cj.abstract_copies(program.shapes, mesh, specs=program.specs)
    batch = data.batch_shapes(dataset, config.batch_size // config.num_workers)
    if config.period > 1:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((config.period, *x.shape), x.dtype), batch)
    batch = cj.abstract_copies(batch, mesh, specs=batch_spec(mesh, config.period))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    found = {
        "devices": len(devices),
        "workers": config.num_workers,
        "inside": {name: size for name, size in mesh.shape.items() if name != "worker"},
        "memory_bytes_per_chip": available_memory(devices[0]),
        "model_bytes": num_bytes(program.shapes.params),
        "parameter_bytes_per_chip": bytes_per_chip(state.params),
        "optimizer_bytes_per_chip": bytes_per_chip(state.algorithm),
        "batch_bytes_per_chip": bytes_per_chip(batch),
    }
    try:
        found["exchange"] = of_compiled(exchange(config, program, mesh), (state.params, step), mesh)
        if not exchange_only:
            found["step"] = of_compiled(program.step, (state, batch, step), mesh)
    except DoesNotFit as error:
        raise DoesNotFit(f"{error}\n{as_table(found)}") from None
    return found


def exchange(config: ml_collections.ConfigDict, program: Program, mesh: Mesh) -> jax.stages.Wrapped:
    """One round of the config's algorithm and nothing else: its optimizer adds what it is given."""
    assert program.specs is not None
    specs = program.specs.params
    algorithm = make_algorithm(config, optax.identity(), program.shapes.params, specs)

    def mix(params, step):
        # Not zeros, which the compiler folds away; integers, among which an algorithm looks for no NaN.
        updates = jax.tree.map(lambda x: (0 * x).astype(np.int32), params)
        return algorithm.update(updates, algorithm.init(params), params, step)[0]

    return cj.per_worker(mix, mesh, replicated=(1,), out_specs=specs)


def of_compiled(run: jax.stages.Wrapped, args: tuple[PyTree, ...], mesh: Mesh) -> dict[str, Any]:
    """What the compiler says of a program and what its text sends. Raises `DoesNotFit`."""
    began = time.perf_counter()
    lowered = run.lower(*args)
    traced = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error).splitlines()[0]) from None
    done = time.perf_counter()
    memory = compiled.memory_analysis()
    assert memory is not None
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:  # jaxlib 0.10 cannot parse loops that libtpu 0.0.52 made asynchronous
        text = None
    return {
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
        "argument_bytes_per_chip": memory.argument_size_in_bytes,
        "temporary_bytes_per_chip": memory.temp_size_in_bytes,
        "peak_bytes_per_chip": getattr(memory, "peak_memory_in_bytes", None),
        "operations_per_chip": operations(run, *args) * mesh.shape["worker"] / mesh.size,  # a worker's, shared evenly
        "in_flight_bytes_per_chip": None if text is None else in_flight(text),  # None too where there is no loop
        "conditionals": None if text is None else collectives(text)["conditional"],
        "collectives": None if text is None else [row._asdict() for row in traffic(text, mesh)],
    }


def num_bytes(tree: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def bytes_per_chip(tree: PyTree) -> int:
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def available_memory(device: jax.Device) -> int | None:
    """What the compiler may use of a TPU's memory, from what it says of a program that needs more; else unknown."""
    if device.platform != "tpu":
        return None
    huge = jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return int(float(found[1]) * 2**30)
    return None


def as_table(found: dict[str, Any]) -> str:
    """The findings for a person."""
    each = " x ".join(f"{size} {name}" for name, size in found["inside"].items()) or "1"
    part = found["parameter_bytes_per_chip"]
    rows = {
        "devices": f"{found['devices']}: {found['workers']} workers of {each}",
        "memory per chip": _mebibytes(found["memory_bytes_per_chip"]),
        "one model": _mebibytes(found["model_bytes"]),
        "per chip": f"parameters {_mebibytes(part)}, optimizer {_mebibytes(found['optimizer_bytes_per_chip'])}, "
        f"batch {_mebibytes(found['batch_bytes_per_chip'])}",
    }
    for name in ("exchange", "step"):
        if name in found:
            rows |= {f"{name}: {key}": value for key, value in _rows(found[name], part).items()}
    return report.table(rows)


def _rows(found: dict[str, Any], part: int) -> dict[str, str]:
    temporary = found["temporary_bytes_per_chip"]
    rows = {
        "compiled in": f"{found['compile_seconds']:.1f} s, after {found['trace_seconds']:.1f} s of tracing",
        "temporaries": f"{_mebibytes(temporary)} per chip, {temporary / part:.2f} of its parameters",
        "peak": f"{_mebibytes(found['peak_bytes_per_chip'])} per chip",
        "matrix operations": f"{found['operations_per_chip']:.4g} per chip",
    }
    if found["collectives"] is None:
        return rows | {"collectives": "unknown: this jaxlib cannot read what libtpu compiled, a newer one can"}
    if found["in_flight_bytes_per_chip"] is not None:
        rows["in flight across a loop"] = f"{_mebibytes(found['in_flight_bytes_per_chip'])} per chip"
    rows["conditionals"] = str(found["conditionals"])
    for row in found["collectives"]:
        name = f"{row['operation']} over {', '.join(row['axes'])}, {row['link']}"
        rows[name] = (
            f"{row['count']}: {_mebibytes(row['bytes_per_chip'])} per chip, "
            f"{_mebibytes(row['bytes_per_worker'])} leave a worker"
        )
    return rows


def _mebibytes(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.4g} MiB"


def devices_of_flags() -> list[jax.Device]:
    """The devices that the flags describe. Raises `ValueError` for more than there are."""
    if PLATFORM.value == "tpu":
        jax.config.update("jax_platforms", "cpu")
        slices = {"num_slices": NUM_SLICES.value} if NUM_SLICES.value > 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value, **slices).devices)
    if PLATFORM.value == "cpu":
        jax.config.update("jax_platforms", "cpu")
        with contextlib.suppress(RuntimeError):  # where JAX is in use already, what there is must do
            jax.config.update("jax_num_cpu_devices", NUM_DEVICES.value or 1)
    devices = jax.devices(PLATFORM.value)
    if len(devices) < (NUM_DEVICES.value or 1):
        raise ValueError(f"--num_devices must be at most {len(devices)} on this machine, got {NUM_DEVICES.value}.")
    return devices[: NUM_DEVICES.value]


def main(argv: list[str]) -> None:
    del argv
    try:
        found = preflight(flags.CONFIG.value, devices_of_flags(), exchange_only=EXCHANGE_ONLY.value)
    except DoesNotFit as error:
        print(f"does not fit: {error}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    memory, step = found["memory_bytes_per_chip"], found.get("step", found["exchange"])
    print(json.dumps(found) if JSON.value else as_table(found))
    if memory is not None and step["peak_bytes_per_chip"] is not None and step["peak_bytes_per_chip"] > memory:
        print("does not fit: the peak is above the chip's memory", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=flags.parse_flags)
