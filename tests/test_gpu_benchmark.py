"""The GPU benchmark, on the CPU: its loops take the same steps, its sums are right, and it takes no CPU for a GPU."""

import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crossover_jax as cj
from benchmarks import gpu
from experiments.models import resnet

pytestmark = pytest.mark.tools
ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--platform", "cpu", "--dataset", "fashion_mnist", "--model", "mlp", "--options", "{'hidden': (8,)}"]
QUICK = [*SMALL, "--examples", "4", "--workers", "4", "--turns", "2", "--each", "1", "--rounds", "3"]


def printed(capsys, *args):
    gpu.main(args)
    device, header, *rows = capsys.readouterr().out.splitlines()
    assert device.startswith("cpu (cpu), JAX ")
    return [re.split(r"\s{2,}", line.strip()) for line in (header, *rows)]


def tiny_resnet(*, image_shape, **options):
    stem = functools.partial(resnet.Stem, size=3, stride=2, pool=True)
    layers = {"block": resnet.BasicBlock, "norm": "batch", "bn_groups": 1, "zero_init": False, "dtype": "float32"}
    return resnet.ResNet([1], stem=stem, width=2, channels=image_shape[-1], **layers, **options)


@pytest.mark.parametrize("name", ["alone", "allreduce"])
def test_our_step_of_one_worker_and_the_plain_loop_make_the_same_model(name, monkeypatch):
    monkeypatch.setitem(gpu.models.MODELS, "tiny", tiny_resnet)
    config = gpu.fashion_mnist.get_config()
    config.num_workers, config.batch_size, config.algorithm = 1, 4, name
    config.model.name, config.model.options = "tiny", gpu.ml_collections.ConfigDict()
    ours, plain = gpu.make_library_loop(config), gpu.make_plain_loop(config)
    start = jax.device_get(plain.state[0])
    for loop in (ours, plain):
        loop.turn(2)
    params, statistics, _ = jax.device_get(plain.state)
    own = jax.tree.map(lambda x: x[0], jax.device_get((ours.state.params, ours.state.model_state)))
    assert all(np.abs(x - y).max() > 1e-4 for x, y in zip(*map(jax.tree.leaves, (params, start)), strict=True))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), own, (params, statistics))
    np.testing.assert_allclose(ours.loss["loss"][0], plain.loss, rtol=1e-5)


def test_rates_and_ratios_are_those_of_the_times(capsys):
    for what, images, names in (
        ("images", 4, ["plain", "ours, alone", "ours, allreduce"]),
        ("simulated", 16, ["one model", "4 workers, alone", "4 workers, crossover"]),
    ):
        _, *rows = printed(capsys, what, *QUICK)
        assert [row[0] for row in rows] == names
        for _, ms, rate, *ratios in rows:
            assert abs(float(rate) * float(ms) / 1e3 / images - 1) < 0.6 / float(rate) + 0.006 / float(ms)
            assert float(ratios[1]) - 0.01 <= float(ratios[0]) <= float(ratios[2]) + 0.01
        assert rows[0][3:] == ["1.000", "1.00", "1.00"]


def test_a_pass_reads_and_writes_every_parameter_once(capsys):
    header, copy, *rounds = printed(capsys, "pack", *QUICK, "--segments", "2")
    num_bytes = 4 * (784 * 8 + 8 + 8 * 10 + 10)
    assert header[0] == f"{num_bytes} bytes in 4 leaves"
    assert [row[0] for row in rounds] == ["round in float32", "round in bfloat16", "round in int8"]
    assert copy[3] == "1.00"
    for _, ms, rate, passes in (copy, *rounds):
        assert abs(float(rate) - 2 * num_bytes / float(ms) / 1e6) < 0.06 + 6e-5 * float(rate) / float(ms)
        assert abs(float(passes) - float(ms) / float(copy[1])) < 0.006 + 1e-4 * (1 + float(passes)) / float(copy[1])


@pytest.mark.parametrize(("wire", "tolerance"), [("float32", 0), ("bfloat16", 1e-6), ("int8", 1e-6)])
def test_who_hears_himself_keeps_what_he_has(wire, tolerance):
    tree = {"w": jax.random.normal(jax.random.key(0), (1, 30, 5)), "b": jnp.ones((1, 7))}
    run = cj.per_worker(
        gpu.repeat(gpu.make_round_to_oneself(4, wire), 3), cj.make_mesh(1, devices=jax.devices()[:1]), donate=False
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), run(tree), tree)
    assert "ppermute" in str(jax.make_jaxpr(run)(tree))


def test_the_schedule_counts_the_products_of_a_step(capsys):
    header, *rows = printed(capsys, "schedule", *QUICK, "--hosts", "2", "--gpus", "2")
    assert re.fullmatch(r"in flight, of [1-9]\d* permutes", header[0])
    assert rows == [["0", "5"]]  # forward x W1, h W2; backward both weights' gradients and h's; CPUs wait for a permute


def test_permutes_in_flight_beside_products():
    start, done = "collective-permute-start", "collective-permute-done"
    order = [start, "matmul", start, "matmul", "fusion", "matmul", done, "matmul", done, "matmul"]
    assert gpu.products_in_flight(order) == [("1", "1"), ("2", "2"), ("1", "1"), ("0", "1")]


@pytest.mark.parametrize("what", ["images", "pack", "simulated"])
def test_a_cpu_is_not_taken_for_a_gpu(what):
    with pytest.raises(SystemExit, match=r"^error: JAX finds no accelerator here; --platform=cpu measures the CPU"):
        gpu.main([what])


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is not None, reason="this JAX compiles for GPUs")
def test_without_a_compiler_for_gpus_one_line_says_what_is_missing():
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "schedule"],
        capture_output=True,
        text=True,
        timeout=300,
        env=env,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: this jaxlib cannot compile for GPUs: install jax[cuda12]")
