"""The paper's configurations: its numbers, its segments, its bytes; real steps on a few images; machines they fit."""

import importlib
import math
import pathlib

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from crossover_jax.traced import trace_worker
from experiments import csv_rows, data, figures, preflight, train
from experiments.configs import cifar10_resnet, fashion_mnist, fashion_mnist_study
from experiments.program import make_program, place_workers, wire_bytes_per_step
from experiments.settings import check_settings
from experiments.studies import study as study_module
from experiments.studies.study import FINAL, TUNING, Run, run_config
from tests.experiments import stand_ins

PARAMETERS = 25_557_032  # of ResNet-50
ALL_IMAGES = 1_281_167
SENT = {"allreduce": 2 * 7 / 8, "sgp": 1, "crossover": 1, "hierarchical": 1}  # models per worker and step


def imagenet_config(name):
    return importlib.import_module(f"experiments.configs.imagenet_resnet50_{name}").get_config()


def switches(program, config):
    """How many switches one round takes, in the traced program."""

    def update(params, state, step):
        return program.algorithm.update(params, state, params, step)

    state, step = program.shapes, jax.ShapeDtypeStruct((), np.int32)
    traced = trace_worker(update, state.params, state.algorithm, step, axes={"worker": config.num_workers})
    return str(traced.jaxpr).count("cond[")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "hierarchical" else pytest.mark.slow) for name in SENT],
)
def test_imagenet_as_the_paper_ran_it(name):
    config = imagenet_config(name)
    check_settings(config)
    devices = 64 if name == "hierarchical" else 8
    steps = round(config.epochs * ALL_IMAGES / config.batch_size)
    assert steps == 1341
    assert config.batch_size / config.micro_batches / devices == (32 if name == "hierarchical" else 256)
    assert config.schedule.learning_rate == (9 if name in ("allreduce", "sgp") else 11)
    assert round(config.schedule.warmup * 90) == 36
    polynomial = config.schedule.polynomial
    assert (config.schedule.decay, polynomial.power, polynomial.end) == ("polynomial", 2.2, 0.0025)
    assert round(polynomial.tail * 90) == 2
    assert (config.optimizer, config.lars.momentum, config.lars.weight_decay) == ("lars", 0.96, 5e-5)
    assert config.lars.coefficient == 0.0025

    mesh = place_workers(config, jax.devices()[:devices])
    assert mesh.shape["worker"] == 8
    program = make_program(config, data.describe("imagenet2012"), mesh, steps)
    assert sum(x.size for x in jax.tree.leaves(program.shapes.params)) == PARAMETERS
    # Each segment chooses its own permutation, by a switch of its own. (SGP's one segment does too.)
    assert switches(program, config) == {"allreduce": 0, "sgp": 1}.get(name, 18)
    sent = wire_bytes_per_step(program.algorithm, program.shapes.params, config)
    assert sent == pytest.approx(SENT[name] * 4 * PARAMETERS, rel=1e-3)


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    root, *_ = stand_ins.prepare_imagenet(tmp_path_factory.mktemp("imagenet"))
    return root


def check_steps(config, data_dir, workdir, num_classes, devices_each=1, spread=0.0):
    """Two steps with a row for each: the first loss is that of a guess, and every leaf of every worker has moved.

    Logits that spread at random with standard deviation σ guess with a loss of about log(classes) + σ²/2.
    """
    config.dataset.data_dir = str(data_dir)
    devices = jax.devices()[: devices_each * config.num_workers]
    config.steps, config.log_every, config.checkpoint.every, config.eval_batch_size = 2, 1, None, len(devices)
    state, rows = train.train(config, workdir, devices=devices)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(num_classes) + spread**2 / 2, rel=0.15)
    assert np.isfinite(losses).all()
    assert (rows[-1]["consensus_distance"] == 0) == (config.algorithm == "allreduce")
    before = make_program(config, data.describe(config.dataset.name), config.num_workers, 2).init()
    for x, of_all in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True):
        assert (np.asarray(of_all) != np.asarray(x)).reshape(config.num_workers, -1).any(1).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SENT)
def test_imagenet_takes_real_steps_on_a_stand_in(name, imagenet_dir, tmp_path):
    """Few workers, two micro-batches of two images each; in the hierarchy a worker's two devices have one each.

    More would take longer than the 40 s after which XLA:CPU gives up waiting for a device.
    """
    config = imagenet_config(name)
    config.num_workers, config.micro_batches, devices_each = 4, 2, 1
    if name == "hierarchical":
        config.num_workers, config.model.options.bn_groups, devices_each = 3, 2, 2
    config.batch_size = config.num_workers * 2 * 2
    check_steps(config, imagenet_dir, tmp_path, 1000, devices_each)


@pytest.mark.slow
@pytest.mark.full_compilation
@pytest.mark.parametrize("name", SENT)
def test_imagenet_compiles_for_as_many_accelerators_as_the_paper_had(name):
    """v5p, for 256 images in float32 take 20 GiB; the paper's V100 had 32."""
    topology = "v5p:4x4x4" if name == "hierarchical" else "v5p:2x2x2"
    chips = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    found = preflight.preflight(imagenet_config(name), chips, exchange_only=False)
    assert found["workers"] == 8
    assert found["step"]["peak_bytes_per_chip"] < found["memory_bytes_per_chip"]


STUDIES = sorted(path.stem for path in pathlib.Path(study_module.__file__).parent.glob("[a-z]*.py"))
STUDIES.remove("study")


def study_of(name):
    return importlib.import_module(f"experiments.studies.{name}").get_study()


# The arms of "gap" are traced for the bytes they send: a minute.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "gap" else ()) for name in STUDIES]
)
def test_a_study_can_be_run(name):
    """Every arm has a program, and borrows its learning rate from one that is tuned."""
    study = study_of(name)
    assert study.rates_of is None or study.arms.keys() <= study_of(study.rates_of).arms.keys()
    assert study.before is None or study.arms.keys() <= study.before.arms.keys()
    for arm, (_, _, rate_of) in study.arms.items():
        assert rate_of is None or study.arms[rate_of].rate_of is None
        config = run_config(study, Run(arm, TUNING, 0.1, 0))
        check_settings(config)
        dataset = data.describe(config.dataset.name, sequence=config.dataset.sequence)
        program = make_program(config, dataset, config.num_workers, 10)
        size = sum(x.size for x in jax.tree.leaves(program.shapes.params))
        if name == "gap" and not arm.startswith("allreduce"):  # at most one float32 model per step, and some padding
            sent = wire_bytes_per_step(program.algorithm, program.shapes.params, config)
            assert sent <= 4 * size + 4 * 1024


def test_cifar10_by_16_workers_is_one_model_per_step():
    config = cifar10_resnet.get_config()
    check_settings(config)
    mesh = place_workers(config, jax.devices()[:16])
    program = make_program(config, data.describe("cifar10"), mesh, 10)
    size = sum(x.size for x in jax.tree.leaves(program.shapes.params))
    shortcuts = 16 * 32 + 32 * 64 + 2 * (32 + 64)  # convolutions and their norms, where He et al. pad with zeros
    assert size == 269_722 + shortcuts
    assert wire_bytes_per_step(program.algorithm, program.shapes.params, config) == pytest.approx(4 * size, rel=1e-3)


@pytest.mark.slow
def test_cifar10_takes_real_steps_on_a_stand_in(tmp_path):
    rng = np.random.default_rng(0)
    stand_ins.prepare_cifar10(
        tmp_path, rng.integers(0, 256, (60, 32, 32, 3), np.uint8), np.arange(60, dtype=np.uint8) % 10
    )
    config = cifar10_resnet.get_config()
    config.batch_size = 4 * config.num_workers
    check_steps(config, tmp_path, tmp_path / "run", 10, spread=1.65)  # that of an untrained ResNet-20


@pytest.mark.slow
@pytest.mark.full_compilation
def test_cifar10_compiles_for_16_accelerators_on_four_hosts():
    chips = list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices)
    found = preflight.preflight(cifar10_resnet.get_config(), chips, exchange_only=False)
    assert (found["workers"], found["inside"], found["step"]["conditionals"]) == (16, {}, 0)
    assert found["step"]["peak_bytes_per_chip"] < found["memory_bytes_per_chip"]


@pytest.mark.slow  # that a study's run is train's `test_sweep` shows; this one that a row in `results/` comes again
@pytest.mark.parametrize("which", ["gap/allreduce", "gap/three rounds in int8"])
def test_an_arm_s_run_by_train_is_the_row_of_the_study(which, data_dir, tmp_path):
    config = fashion_mnist_study.get_config(which)
    config.dataset.data_dir, config.checkpoint.every, config.eval_every = str(data_dir), None, 10.0
    _, rows = train.train(config, tmp_path)
    arm = (which.removeprefix("gap/"), FINAL, 0)
    rows_of_study = csv_rows.read(figures.PAPER.parent / "gap.csv")
    *_, row = (row for row in rows_of_study if (row["arm"], row["stage"], row["seed"]) == arm)
    assert rows[-1]["step"] == row["step"]
    assert rows[-1]["wire_bytes_per_step"] == row["wire_bytes_per_step"]
    assert rows[-1]["consensus_distance"] == pytest.approx(row["consensus_distance"], rel=0.05)
    assert 100 * rows[-1]["eval/mean/accuracy"] == pytest.approx(row["accuracy"], abs=0.15)  # three times the rounding


def test_a_study_or_an_arm_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"must begin with one of ablations, batch, gap, .* got 'gaps/crossover'"):
        fashion_mnist_study.get_config("gaps/crossover")
    with pytest.raises(ValueError, match=r"must be among allreduce, .* got 'crossing'"):
        fashion_mnist_study.get_config("gap/crossing")
    with pytest.raises(ValueError, match=r"must be of a study whose runs begin anew, got 'lm_after/allreduce'"):
        fashion_mnist_study.get_config("lm_after/allreduce")


def test_rows_and_a_reference_are_as_the_config_says():
    config = fashion_mnist.get_config()
    config.num_workers, config.simulate, config.model.name, config.model.options = 8, "yes", "mlp", {"hidden": (256,)}
    config.crossover.update(cut="rows", segments=7, pool_size=7, renew_every=10, in_flight=2)
    check_settings(config)
    dataset = data.describe("fashion_mnist")
    program = make_program(config, dataset, place_workers(config, jax.devices()[:1]), 100)
    size = sum(x.size for x in jax.tree.leaves(program.shapes.params))
    sent = wire_bytes_per_step(program.algorithm, program.shapes.params, config)
    message = 114 * 256  # 784 · 256 / 7 numbers of the kernel and 404 others, in whole blocks
    assert sent == pytest.approx(4 * (7 * message + size * 2 * 7 / 8 / 10))
    for workers in (8, 64):  # as many rounds as workers allow, 7 and 12, would divide no layer
        config.num_workers = workers
        config.crossover.update(segments=None, pool_size=None)
        chosen = make_program(config, dataset, place_workers(config, jax.devices()[:1]), 100)
        sent = wire_bytes_per_step(chosen.algorithm, chosen.shapes.params, config)  # by a switch it would be more
        assert sent == pytest.approx(4 * size * (1 + 2 * (1 - 1 / workers) / 10), rel=1e-2)


def with_segments(segments):
    config = fashion_mnist.get_config()
    config.num_workers, config.simulate, config.model.name, config.model.options = 64, "yes", "mlp", {"hidden": (32,)}
    config.crossover.segments = segments
    return make_program(config, data.describe("fashion_mnist"), 64, 10), config


@pytest.mark.parametrize("segments", [12, 13, 26])
def test_segments_alone_get_a_pool_that_divides_them(segments):
    program, config = with_segments(segments)
    assert switches(program, config) == 0  # which each segment would have by a pool of another size


def test_segments_that_no_good_pool_divides_are_refused_with_those_that_one_does():
    with pytest.raises(ValueError, match="got 29: take 28 or 30"):
        with_segments(29)
