"""What a config sends and holds on a pod that is not here, from compiled programs, against counts by hand."""

import json
import re
import time
import types

import jax
import pytest
from jax.experimental import topologies

from experiments import flags, models, preflight
from experiments.configs import decoder_1b, fashion_mnist, imagenet

pytestmark = pytest.mark.full_compilation


@pytest.fixture(scope="module")
def pod():
    return list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4", num_slices=4).devices)


def config(num_workers, **changes):
    found = fashion_mnist.get_config()
    found.num_workers, found.batch_size, found.eval_batch_size = num_workers, 1024, 1024
    found.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return found


def model_bytes(name="resnet8", **options):
    shape = (28, 28, 1) if name == "resnet8" else (224, 224, 3)
    classes = 10 if name == "resnet8" else 1000
    shapes = jax.eval_shape(lambda: models.build(name, num_classes=classes, image_shape=shape, seed=0, **options)[1])
    return sum(4 * x.size for x in jax.tree.leaves(shapes))


RESNET8 = {"width": 16, "stem_stride": 2}


def test_a_worker_of_one_slice_sends_one_model_over_dcn_and_nothing_else(pod):
    found = preflight.preflight(config(4), pod, exchange_only=False)
    model = model_bytes(**RESNET8)
    assert (found["devices"], found["workers"], found["inside"]) == (32, 4, {"data": 8})
    assert found["model_bytes"] == found["parameter_bytes_per_chip"] == model
    for name in ("exchange", "step"):
        rows = found[name]["collectives"]
        assert found[name]["conditionals"] == 0
        over_dcn = [row for row in rows if row["link"] == "DCN"]
        assert [(row["operation"], row["axes"], row["count"]) for row in over_dcn] == [("send", ("worker",), 3)]
        # Padding: less than 8 elements per leaf, and up to 3 per device to make its segments equal.
        assert model <= over_dcn[0]["bytes_per_worker"] <= 1.02 * model
        assert all(row["axes"] == ("data",) for row in rows if row["link"] == "ICI")
    # A batch of 256 images per worker, 32 per chip, as uint8 with an int32 label.
    assert found["batch_bytes_per_chip"] == 32 * (28 * 28 + 4)
    assert found["optimizer_bytes_per_chip"] == model + 4 + 8  # momentum, the schedule's counter, and a note
    assert found["step"]["argument_bytes_per_chip"] >= 2 * model + found["batch_bytes_per_chip"]
    assert found["exchange"]["operations_per_chip"] == 0
    assert found["memory_bytes_per_chip"] == int(15.75 * 2**30)


def test_a_worker_that_is_sharded_holds_and_sends_its_parts(pod):
    options = {"model__name": "mlp", "model__options": {"hidden": (1024,)}, "inner__fsdp": 4}
    found = preflight.preflight(config(4, **options), pod, exchange_only=True)
    kernel, rest = 4 * 784 * 1024, 4 * (1024 + 1024 * 10 + 10)
    assert found["inside"] == {"data": 2, "fsdp": 4}
    assert found["parameter_bytes_per_chip"] == kernel // 4 + rest
    assert found["optimizer_bytes_per_chip"] == kernel // 4 + rest + 4 + 8
    (row,) = (row for row in found["exchange"]["collectives"] if row["link"] == "DCN")
    assert kernel + rest <= row["bytes_per_worker"] <= 1.001 * (kernel + rest)


@pytest.mark.parametrize("overlap", [True, False])
def test_what_is_in_flight_across_a_period_is_a_line_of_its_own(overlap, monkeypatch, capsys):
    """Of a worker of eight chips each sends an eighth of a model and receives one; without overlap none does."""
    options = {"model__name": "mlp", "model__options": {"hidden": (512,)}, "period": 4, "algorithm": "outer"}
    found = config(4, **options, outer__every=4, outer__overlap=overlap)
    flags_of(monkeypatch, found, EXCHANGE_ONLY=False)
    preflight.main([])
    printed = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    (value,) = (value for name, value in printed.items() if "in flight across a loop" in name)
    size = 4 * (784 * 512 + 512 + 512 * 10 + 10) / 2**20
    assert float(re.match(r"([\d.]+) MiB per chip$", value)[1]) == pytest.approx(2 / 8 * size * overlap, rel=1e-2)


def test_operations_are_those_of_the_layers(pod):
    options = {"model__name": "mlp", "model__options": {"hidden": (64,)}}
    found = preflight.preflight(config(4, **options), pod, exchange_only=False)
    forward = 2 * 32 * (784 * 64 + 64 * 10)  # 32 images per chip
    gradients = forward + 2 * 32 * 64 * 10  # of both kernels, and of what the second one reads
    assert found["step"]["operations_per_chip"] == forward + gradients


@pytest.mark.tools  # a time, which other tests beside it would change
@pytest.mark.parametrize(("num_workers", "over"), [(64, "flat"), pytest.param(16384, "all", marks=pytest.mark.slow)])
def test_the_exchange_of_resnet50_compiles_for_16384_chips_in_20_seconds(num_workers, over):
    """64 workers of a slice of 256 chips each, and as many workers as chips."""
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16", num_slices=64).devices)
    resnet50 = imagenet.get_config()
    resnet50.num_workers, resnet50.batch_size, resnet50.eval_batch_size = num_workers, 131072, 16384
    began = time.process_time()
    found = preflight.preflight(resnet50, devices, exchange_only=True)
    assert time.process_time() - began < 20
    model = model_bytes("resnet50")
    assert found["exchange"]["conditionals"] == 0
    rows = [row for row in found["exchange"]["collectives"] if "worker" in row["axes"]]
    assert {row["operation"] for row in rows} <= {"send", "collective-permute"}
    assert model <= max(row["bytes_per_worker"] for row in rows) or num_workers == 16384
    assert sum(row["bytes_per_worker"] for row in rows if row["link"] == "DCN") <= 1.01 * model


@pytest.mark.slow
def test_a_decoder_of_a_billion_parameters_fits_workers_of_16_chips():
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4").devices)
    found = preflight.preflight(decoder_1b.get_config(), devices, exchange_only=False)
    assert (found["workers"], found["inside"]) == (4, {"fsdp": 16})
    assert found["model_bytes"] == 4 * 1_028_737_024
    assert found["parameter_bytes_per_chip"] < 1.01 * found["model_bytes"] / 16  # norms lie whole
    assert found["step"]["peak_bytes_per_chip"] < found["memory_bytes_per_chip"]
    # 6 operations per parameter and token, 8 where layers are computed again, and attention; 8192 bytes per chip.
    assert 8 < found["step"]["operations_per_chip"] / (1.0267e9 * 8192) < 9.5
    programs = [found["exchange"], found["step"]]
    if jax.__version_info__ < (0, 11):
        assert found["step"]["collectives"] is None  # its jaxlib cannot read them
        programs.pop()
    for program in programs:
        assert program["conditionals"] == 0
        between = [row for row in program["collectives"] if "worker" in row["axes"]]
        assert {row["operation"] for row in between} == {"collective-permute"}
        assert sum(row["bytes_per_worker"] for row in between) == pytest.approx(found["model_bytes"], rel=2e-3)


@pytest.mark.slow
def test_the_step_of_resnet50_compiles_for_a_pod():
    devices = list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices)
    resnet50 = imagenet.get_config()
    found = preflight.preflight(resnet50, devices, exchange_only=False)
    assert found["step"]["conditionals"] == 0
    assert found["step"]["peak_bytes_per_chip"] < found["memory_bytes_per_chip"]
    # 4.09e9 multiply-adds per image of 224 x 224, forward; nearly thrice that with both gradients.
    assert found["step"]["operations_per_chip"] == pytest.approx(3 * 2 * 4.09e9 * 32, rel=0.02)


@pytest.mark.slow
def test_gossip_does_not_make_compiling_much_slower(pod):
    """In processor seconds, best of two: this machine is shared."""

    def seconds(name):
        def once():
            jax.clear_caches()
            began = time.process_time()
            preflight.preflight(config(4, algorithm=name), pod, exchange_only=False)
            return time.process_time() - began

        return min(once() for _ in range(2))

    assert seconds("crossover") < 1.3 * seconds("alone")


def flags_of(monkeypatch, found, **values):
    defaults = {"EXCHANGE_ONLY": True, "JSON": False, "NUM_SLICES": 4, "TOPOLOGY": "v5e:2x4", "PLATFORM": "tpu"}
    for name, value in {**defaults, "NUM_DEVICES": None, **values}.items():
        monkeypatch.setattr(preflight, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(flags, "CONFIG", types.SimpleNamespace(value=found))


def test_the_command_prints_a_table_or_json_and_tells_by_its_exit_code(monkeypatch, capsys):
    flags_of(monkeypatch, config(4))
    preflight.main([])
    assert "exchange: send over worker, DCN" in capsys.readouterr().out
    flags_of(monkeypatch, config(4), JSON=True)
    preflight.main([])
    assert json.loads(capsys.readouterr().out)["workers"] == 4
    flags_of(monkeypatch, config(3))
    with pytest.raises(SystemExit, match="must divide the number of devices, 32, got 3"):
        preflight.main([])
    flags_of(monkeypatch, config(8), PLATFORM="cpu", NUM_DEVICES=8)
    preflight.main([])
    out = capsys.readouterr().out
    assert "8: 8 workers of 1" in out
    assert "collective-permute over worker" in out
    flags_of(monkeypatch, config(8), PLATFORM="cpu", NUM_DEVICES=1000)
    with pytest.raises(SystemExit, match=r"--num_devices must be at most 64 on this machine, got 1000"):
        preflight.main([])


def test_what_does_not_fit_ends_with_2_the_compilers_words_and_the_bytes_that_shapes_tell(monkeypatch, capsys):
    """A layer of 2 × 10^9 parameters: 8 GB, and as much of momentum, on chips of 15.75 GiB."""
    options = {"model__name": "mlp", "model__options": {"hidden": (2_500_000,)}}
    flags_of(monkeypatch, config(32, **options))
    with pytest.raises(SystemExit) as end:
        preflight.main([])
    assert end.value.code == 2
    errors = capsys.readouterr().err
    assert "does not fit: RESOURCE_EXHAUSTED" in errors
    assert "available HBM (15.75G)" in errors
    size = 2_500_000 * (784 + 1 + 10) + 10
    assert f"optimizer {(4 * size + 12) / 2**20:.4g} MiB" in errors
