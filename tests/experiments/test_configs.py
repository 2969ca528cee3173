"""The paper's configurations: its numbers, its segments, its bytes; nothing is trained."""

import importlib
import re

import jax
import pytest

from experiments import data, sweep
from experiments.configs import cifar10_resnet
from experiments.program import check_settings, make_program, place_workers, wire_bytes_per_step

PARAMETERS = 25_557_032  # of ResNet-50
ALL_IMAGES = 1_281_167
SENT = {"allreduce": 2 * 7 / 8, "sgp": 1, "crossover": 1, "hierarchical": 1}  # models per worker and step


@pytest.mark.parametrize("name", SENT)
def test_imagenet_as_the_paper_ran_it(name):
    config = importlib.import_module(f"experiments.configs.imagenet_resnet50_{name}").get_config()
    check_settings(config)
    devices = 64 if name == "hierarchical" else 8
    steps = round(config.epochs * ALL_IMAGES / config.batch_size)
    assert steps == 1341
    assert config.batch_size / config.micro_batches / devices == (32 if name == "hierarchical" else 256)
    optimizer = config.optimizer
    assert optimizer.learning_rate == (9 if name in ("allreduce", "sgp") else 11)
    assert round(optimizer.warmup * 90) == 36
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("lars", 0.96, 5e-5)

    mesh = place_workers(config, jax.devices()[:devices])
    assert mesh.shape["worker"] == 8
    program = make_program(config, data.describe("imagenet2012"), mesh, steps)
    assert sum(x.size for x in jax.tree.leaves(program.shapes.params)) == PARAMETERS
    segments = {int(found[1]) for leaf in program.leaves if (found := re.search(r"\(segment (\d+) of 18\)", leaf))}
    assert segments == (set(range(18)) if name in ("crossover", "hierarchical") else set())
    sent = wire_bytes_per_step(program.algorithm, program.shapes.params, config)
    assert sent == pytest.approx(SENT[name] * 4 * PARAMETERS, rel=1e-3)


@pytest.mark.parametrize("name", ["batch", "workers", "ablations", "lars", "gap", "large"])
def test_a_study_can_be_run(name):
    """Every arm has a program, and borrows its learning rate from one that is tuned."""
    study = importlib.import_module(f"experiments.studies.{name}").get_study()
    dataset = data.describe("fashion_mnist")
    for arm, (_, _, rate_of) in study.arms.items():
        assert rate_of is None or study.arms[rate_of].rate_of is None
        config = sweep.config_of(study, sweep.Run(arm, sweep.TUNING, 0.1, 0))
        check_settings(config)
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
