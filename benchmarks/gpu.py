"""What one GPU says: of a step beside a plain loop, of a round's packing, of simulated workers; and a pod's schedule.

    python -m benchmarks.gpu images     # ResNet-50 in bfloat16: our step with one worker, and a loop of flax and optax
    python -m benchmarks.gpu pack       # a round on ResNet-50's leaves where one device hears itself, beside a copy
    python -m benchmarks.gpu simulated  # 64 workers of a ResNet-20 on one device, beside one model on all their images
    python -m benchmarks.gpu schedule   # the step of `mix_during` compiled for 2 x 8 H100s: needs jax[cuda12], no GPU

Random images lie on the device. Loops take turns of `--each` steps, sent one after the other and waited for together; a
ratio is of images per second to the first line's in the same turn, and the figures are medians. Without an accelerator
only `--platform=cpu` measures, for a CPU's figures say nothing of a GPU.

`pack` runs all rounds of a turn in one program, so that no launch from Python is in them. A pass reads and writes the
model once, as the copy does; a permute to oneself copies its message, in place of the network.

`schedule` describes the GPUs to the compiler and prints how many permutes are in flight during how many products, in
the program's order. XLA allows `--in_flight` at a time, by default 1, one after the other.
"""

import argparse
import ast
import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import crossover_jax as cj
from crossover_jax import topology
from crossover_jax.text import as_table
from experiments import data, models, program
from experiments.compiled import collectives, schedule
from experiments.configs import fashion_mnist
from experiments.optimizers import make_optimizer
from experiments.settings import check_settings

NO_ACCELERATOR = "JAX finds no accelerator here; --platform=cpu measures the CPU instead."
NO_COMPILER = "this jaxlib cannot compile for GPUs: install jax[cuda12], which needs no GPU for it."
# What XLA asks of a GPU that is not here: the data sheet of the H100 SXM, and CUDA's limits for 9.0.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100"
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 85899345920 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
}
runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 8 }
"""


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("--platform", choices=["cpu"], help="measure this machine's CPU, knowingly")
    parser.add_argument("--dataset", default="imagenet2012", help="whose shapes the images have")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--options", type=ast.literal_eval, default={"dtype": "bfloat16"}, help="of the model")
    parser.add_argument("--examples", type=int, default=256, help="of each worker")
    parser.add_argument("--workers", type=int, default=64, help="simulated")
    parser.add_argument("--turns", type=int, default=15, help="of each loop")
    parser.add_argument("--each", type=int, default=5, help="steps of a turn")
    parser.add_argument("--rounds", type=int, default=200, help="of a turn of `pack`")
    parser.add_argument("--segments", type=int, default=8, help="of `pack`")
    parser.add_argument("--hosts", type=int, default=2, help="of `schedule`")
    parser.add_argument("--gpus", type=int, default=8, help="of each host")
    parser.add_argument("--in_flight", type=int, default=1, help="permutes, at most")
    if "simulated" in argv:
        parser.set_defaults(dataset="cifar10", model="resnet20", options={}, examples=32)
    args = parser.parse_args(argv)
    if args.platform or args.what == "schedule":  # which compiles for what is not here
        jax.config.update("jax_platforms", "cpu")
    try:
        if not args.platform and args.what != "schedule" and jax.default_backend() == "cpu":
            raise ValueError(NO_ACCELERATOR)
        print(WHAT[args.what](args))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


class Loop:
    """A step `(state, t) -> (state, loss)` with its state in place."""

    def __init__(self, step: Callable[[Any, int], tuple[Any, Any]], state: Any):
        self._step, self.state, self.loss, self._t = step, state, None, 0

    def turn(self, count: int) -> float:
        """Seconds of a step, of `count` that are waited for together."""
        began = time.perf_counter()
        for _ in range(count):
            self.state, self.loss = self._step(self.state, self._t)
            self._t += 1
        jax.block_until_ready((self.state, self.loss))
        return (time.perf_counter() - began) / count


def take_turns(loops: Sequence[Loop], turns: int, each: int) -> list[tuple[float, ...]]:
    """Seconds of a step, by loop and turn; a turn before them, longer by a step, is to compile and to warm up."""
    for loop in loops:
        loop.turn(each + 1)
    return list(zip(*([loop.turn(each) for loop in loops] for _ in range(turns)), strict=True))


def as_text(device: jax.Device, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"{device.device_kind} ({device.platform}), JAX {jax.__version__}\n{as_table(header, rows)}"


def compare(loops: dict[str, Loop], images: int, args: argparse.Namespace) -> str:
    """A line for each loop of so many images a step."""
    seconds = take_turns(list(loops.values()), args.turns, args.each)
    rows = []
    for name, own in zip(loops, seconds, strict=True):
        ratios, median = [a / b for a, b in zip(seconds[0], own, strict=True)], statistics.median(own)
        rates = (f"{statistics.median(ratios):.3f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}")
        rows.append((name, f"{1e3 * median:.2f}", f"{images / median:.0f}", *rates))
    return as_text(jax.devices()[0], ("", "ms", "images/s", "ratio", "from", "to"), rows)


def make_config(args: argparse.Namespace, workers: int, examples: int, **keys: Any) -> ml_collections.ConfigDict:
    config = fashion_mnist.get_config()
    config.num_workers, config.batch_size = workers, workers * examples
    config.eval_batch_size = config.batch_size
    config.dataset.name, config.model.name = args.dataset, args.model
    config.model.options = ml_collections.ConfigDict(args.options)
    config.update(keys)
    check_settings(config)
    return config


def make_batch(dataset: data.Dataset, examples: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(examples, *dataset.image_shape), dtype=np.uint8)
    return {"image": image, "label": rng.integers(dataset.num_classes, size=examples, dtype=np.int32)}


def make_library_loop(config: ml_collections.ConfigDict) -> Loop:
    """The step of `train.py`: one worker on a mesh of one device, more of them simulated."""
    dataset = data.describe(config.dataset.name)
    config.simulate = "no" if config.num_workers == 1 else "yes"
    where = program.place_workers(config, jax.devices()[:1])
    setup = program.make_program(config, dataset, where, 1000)
    batch = make_batch(dataset, config.batch_size)
    placed = setup.place_batch([{k: x.reshape(config.num_workers, -1, *x.shape[1:]) for k, x in batch.items()}])
    return Loop(lambda state, t: setup.step(state, placed, setup.place_step(t)), cj.copies(setup.init, where))


def make_plain_loop(config: ml_collections.ConfigDict) -> Loop:
    """The same model, optimizer and batch without workers, axes or any metric but the loss."""
    dataset = data.describe(config.dataset.name)
    graphdef, params, statistics = build_model(dataset, config.model.name, config.model.options)
    optimizer = make_optimizer(config, 1000)
    placed = jax.device_put(make_batch(dataset, config.batch_size))

    def loss(params, statistics, batch):
        model = nnx.merge(graphdef, params, statistics, copy=True)
        logits = model(program.normalised(batch["image"], dataset.mean, dataset.std), train=True, key=None)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return value, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, statistics, inner = state
        (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(params, statistics, batch)
        updates, inner = optimizer.update(grads, inner, params)
        return (optax.apply_updates(params, updates), statistics, inner), value

    return Loop(lambda state, t: step(state, placed), (params, statistics, optimizer.init(params)))


def build_model(dataset: data.Dataset, name: str, options: Mapping[str, Any]) -> tuple[nnx.GraphDef, Any, Any]:
    shape = {"num_classes": dataset.num_classes, "image_shape": dataset.image_shape}
    return models.build(name, **shape, seed=0, **options)


def compare_images(args: argparse.Namespace) -> str:
    config = functools.partial(make_config, args, 1, args.examples)
    loops = {"plain": make_plain_loop(config())}
    loops |= {f"ours, {name}": make_library_loop(config(algorithm=name)) for name in ("alone", "allreduce")}
    return compare(loops, args.examples, args)


def compare_simulated(args: argparse.Namespace) -> str:
    total = args.workers * args.examples
    loops = {"one model": make_library_loop(make_config(args, 1, total, algorithm="alone"))}
    for name in ("alone", "crossover"):
        loops[f"{args.workers} workers, {name}"] = make_library_loop(
            make_config(args, args.workers, args.examples, algorithm=name)
        )
    return compare(loops, total, args)


def measure_packing(args: argparse.Namespace) -> str:
    shapes = jax.eval_shape(lambda: build_model(data.describe(args.dataset), args.model, args.options)[1])
    num_bytes = sum(4 * x.size for x in jax.tree.leaves(shapes))
    mesh = cj.make_mesh(1, devices=jax.devices()[:1])
    mixes: dict[str, cj.Mix] = {"copy": lambda x, t: x + 1}
    for wire in ("float32", "bfloat16", "int8"):
        mixes[f"round in {wire}"] = make_round_to_oneself(args.segments, wire)
    loops = []
    for name, mix in mixes.items():
        one = jax.ShapeDtypeStruct((num_bytes // 4,), np.float32) if name == "copy" else shapes
        state = cj.copies(lambda one=one: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), one), mesh)
        run = cj.per_worker(repeat(mix, args.rounds), mesh)
        loops.append(Loop(lambda state, t, run=run: (run(state), None), state))
    copy, *_ = medians = [statistics.median(own) / args.rounds for own in take_turns(loops, args.turns, 1)]
    rows = [
        (name, f"{1e3 * own:.4f}", f"{2 * num_bytes / own / 1e9:.1f}", f"{own / copy:.2f}")
        for name, own in zip(mixes, medians, strict=True)
    ]
    leaves = f"{num_bytes} bytes in {len(jax.tree.leaves(shapes))} leaves"
    return as_text(mesh.devices.flat[0], (leaves, "ms", "GB/s, as one pass", "passes"), rows)


def make_round_to_oneself(segments: int, wire: str) -> cj.Mix:
    """A round on `segments` channels in which the only worker hears itself."""
    pool = topology.Pool.from_peers(np.zeros((segments, 1, 1), int), 0.5)
    return cj.gossip(pool, cj.by_size(segments), wire=wire)


def repeat(mix: cj.Mix, count: int) -> Callable[[Any], Any]:
    return lambda tree: lax.fori_loop(0, count, lambda t, tree: mix(tree, t), tree)


def count_in_flight(args: argparse.Namespace) -> str:
    workers = args.hosts * args.gpus
    devices = describe_gpus(args)
    config = make_config(args, workers, args.examples, crossover={"during": True})
    mesh = cj.make_mesh(workers, devices=devices)
    dataset = data.describe(args.dataset)
    setup = program.make_program(config, dataset, mesh, 1000)
    state = cj.abstract_copies(setup.init, mesh, specs=setup.specs)
    batch = cj.abstract_copies(data.batch_shapes(dataset, args.examples), mesh)
    step = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P()))
    limit = {} if args.platform else {"xla_gpu_experimental_parallel_collective_overlap_limit": args.in_flight}
    text = setup.step.lower(state, batch, step).compile(compiler_options=limit).as_text() or ""
    header = (f"in flight, of {collectives(text)['collective-permute']} permutes", "products")
    return as_text(devices[0], header, products_in_flight(schedule(text)))


def describe_gpus(args: argparse.Namespace) -> list[jax.Device]:
    """GPUs that are not here, or virtual devices of this CPU. Raises `RuntimeError` where JAX cannot describe GPUs."""
    count = args.hosts * args.gpus
    if args.platform:
        with contextlib.suppress(RuntimeError):  # where JAX is in use already, what there is must do
            jax.config.update("jax_num_cpu_devices", count)
        return jax.devices()[:count]
    pod = {"topology": f"1x{args.hosts}x{args.gpus}", "target_config": H100}
    try:
        return list(topologies.get_topology_desc(platform="cuda", **pod).devices)
    except NotImplementedError:
        raise RuntimeError(NO_COMPILER) from None


def products_in_flight(order: Sequence[str]) -> list[tuple[str, ...]]:
    """How many permutes are in flight, and how many products run until that changes.

    >>> start, done = "collective-permute-start", "collective-permute-done"
    >>> products_in_flight(["matmul", start, "matmul", "fusion", "matmul", done])
    [('0', '1'), ('1', '2')]
    """
    change = {"collective-permute-start": 1, "collective-permute-done": -1}
    in_flight = itertools.accumulate(change.get(operation, 0) for operation in order)
    products = (n for n, operation in zip(in_flight, order, strict=True) if operation == "matmul")
    return [(str(n), str(len(list(run)))) for n, run in itertools.groupby(products)]


WHAT = {
    "images": compare_images,
    "pack": measure_packing,
    "simulated": compare_simulated,
    "schedule": count_in_flight,
}

if __name__ == "__main__":
    main(sys.argv[1:])
