"""Real processes on this machine, over Gloo: the same run as one process, refusals, and ends within bounded time."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import processes, train
from experiments.configs import fashion_mnist
from experiments.launch import local
from experiments.program import make_program
from experiments.settings import fingerprint

# Processes that talk over sockets: run by `make test-tools`.
pytestmark = pytest.mark.tools

FLAGS = [
    "--config.num_workers=8",
    "--config.log_every=1",
    "--config.dataset.eval_split=test[:1024]",
    "--config.batch_size=64",
    "--config.model.name=mlp",
    "--config.model.options={'hidden': (128,)}",
]


def start(num_processes, devices, workdir, data_dir, *flags, own=None):
    """Processes of train.py, by hand; `own` has further flags for some, by process."""
    port = local.free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    flags = [*FLAGS, f"--workdir={workdir}", f"--config.dataset.data_dir={data_dir}", *flags]
    return [
        subprocess.Popen(
            local.command([*flags, *(own or {}).get(i, [])], port, num_processes, i),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]


@pytest.fixture
def cleanup():
    started = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def rows_of(workdir):
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "examples_per_second"} for row in rows]


@pytest.mark.full_compilation  # as the processes compile
@pytest.mark.parametrize(
    ("num_processes", "devices", "flags"),
    [
        (2, 4, {}),
        pytest.param(4, 2, {}, marks=pytest.mark.slow),
        (4, 2, {"num_workers": 2, "inner.fsdp": 2}),  # a worker of two processes, sharded and data parallel
    ],
)
def test_processes_train_as_one_process_does_step_by_step(num_processes, devices, flags, tmp_path, data_dir):
    config = fashion_mnist.get_config()
    config.update_from_flattened_dict(
        {
            "num_workers": 8,
            "log_every": 1,
            "steps": 4,
            "batch_size": 64,
            "dataset.eval_split": "test[:1024]",
            "dataset.data_dir": str(data_dir),
            "model.name": "mlp",
            **flags,
        }
    )
    config.model.options = {"hidden": (128,)}
    train.train(config.lock(), tmp_path / "one", devices=jax.devices()[:8])
    of_flags = [f"--config.{key}={value}" for key, value in flags.items()]
    command = [
        *[sys.executable, local.__file__, f"--processes={num_processes}", f"--devices-per-process={devices}", "--"],
        *[*FLAGS, f"--workdir={tmp_path / 'many'}", f"--config.dataset.data_dir={data_dir}", "--config.steps=4"],
        *of_flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, many = rows_of(tmp_path / "one"), rows_of(tmp_path / "many")
    assert len(one) == 4
    if not flags:  # bit for bit, but for what all devices add up in evaluation, in an order of the machine's own
        assert [without_evaluation(row) for row in many] == [without_evaluation(row) for row in one]
    for row, same in zip(many, one, strict=True):  # Gloo adds gradients up in another order
        assert row == pytest.approx(same, rel=1e-5)
    assert done.stdout.count("accuracy, averaged model") == 1  # only the first process prints
    logs = sorted((tmp_path / "many/logs").iterdir())
    assert [log.name for log in logs] == [f"process-{i}.log" for i in range(num_processes)]
    for i, log in enumerate(logs):
        assert f"process {i} of {num_processes}, {devices} devices" in log.read_text()


def without_evaluation(row):
    return {key: value for key, value in row.items() if not key.startswith("eval/")}


def test_processes_that_differ_are_refused_by_all_of_them_by_field(tmp_path, data_dir, cleanup):
    own = {1: ["--config.seed=5"], 2: ["--config.num_workers=6", "--config.algorithm=sgp"]}
    began = time.monotonic()
    cleanup += start(3, 4, tmp_path, data_dir, own=own)
    for process in cleanup:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        for field in (
            "config.seed is 0 on processes 0, 2 and 5 on process 1",
            "config.num_workers is 8 on processes 0, 1 and 6 on process 2",
            "config.algorithm is crossover on processes 0, 1 and sgp on process 2",
        ):
            assert field in errors
        assert "optimizer" not in errors
    assert time.monotonic() - began < 30
    assert not rows_of(tmp_path)


def test_what_keeps_one_process_from_starting_ends_all(tmp_path, data_dir, cleanup):
    nothing = tmp_path / "nothing"
    nothing.write_text("")  # no folder
    cleanup += start(2, 4, tmp_path / "run", data_dir, own={1: [f"--config.dataset.data_dir={nothing}/x"]})
    errors = [process.communicate(timeout=120)[1] for process in cleanup]
    assert [process.returncode for process in cleanup] == [1, 1]
    assert "process 1 could not start: " in errors[0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_when_a_process_dies_or_hangs_the_others_end_within_the_heartbeat_timeout(how, tmp_path, data_dir, cleanup):
    cleanup += start(2, 4, tmp_path, data_dir, "--config.steps=1000000", "--heartbeat_timeout=10")
    deadline = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len(rows_of(tmp_path)) < 3:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in cleanup), cleanup[0].communicate()[1][-3000:]
        time.sleep(0.2)
    cleanup[1].send_signal(how)
    began = time.monotonic()
    assert cleanup[0].wait(timeout=60) != 0
    assert time.monotonic() - began < 10 + 20  # the timeout, and what XLA takes to notice and abort on a busy machine


def test_reports_that_differ_are_named_by_field_process_and_value():
    alike = {"seed": "0", "code": "abc"}
    assert processes.differences([alike, alike]) == ""
    assert "seed is 0 on process 0 and absent on process 1" in processes.differences([alike, {"code": "abc"}])
    many = [alike] * 20 + [{**alike, "seed": "7"}]
    assert "0 on processes 0, 1, 2, 3, 4, 5, 6, 7, … and 7 on process 20" in processes.differences(many)


def test_the_digests_tell_pools_tables_and_data_apart(data_dir):
    def found(**changes):
        config = fashion_mnist.get_config()
        config.update_from_flattened_dict({"dataset.data_dir": str(data_dir), "model.name": "mlp", **changes})
        config.model.options = {"hidden": (8,)}
        dataset = train.data.load("fashion_mnist", config.dataset.eval_split, data_dir=data_dir)
        program = make_program(config, dataset, config.num_workers, 10)
        return fingerprint(config, program, dataset)

    same = found()
    assert found() == same
    changed = {
        ("pool and cut", "table"): {"crossover.pool_size": 3},
        ("data",): {"dataset.eval_split": "test[:9999]"},
    }
    for fields, change in changed.items():
        other = found(**change)
        assert {name for name in same if same[name] != other[name]} == set(fields)
    other = found(**{"crossover.seed": 1})
    assert other["table"] != same["table"]


def test_flags_that_cannot_be_are_refused_before_anything_is_joined(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("joined"))
    with pytest.raises(ValueError, match="must be given together, got no --process_id"):
        processes.join("localhost:1", 2)
    with pytest.raises(ValueError, match=r"--process_id must be in 0\.\.1, got 2"):
        processes.join("localhost:1", 2, 2)
    processes.join()
    processes.join("localhost:1", 2, 0, distributed="no")


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({}, False),
    ],
)
def test_a_launcher_that_started_several_tasks_is_joined(environment, joins, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: joined.append((args, kwargs)))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.join(heartbeat_timeout=7)
    assert bool(joined) == joins
    if joined:
        ((args, kwargs),) = joined
        assert args == (None, None, None)  # JAX finds the cluster
        assert kwargs["heartbeat_timeout_seconds"] == kwargs["shutdown_timeout_seconds"] == 7


def test_place_is_device_put_without_a_comparison_between_processes():
    mesh = train.cj.make_mesh(4, {"data": 2}, devices=jax.devices()[:8])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("worker", "data")))
    x = np.arange(48.0, dtype=np.float32).reshape(16, 3)
    placed = processes.place({"x": x}, sharding)["x"]
    np.testing.assert_array_equal(placed, x)
    assert placed.sharding == sharding
