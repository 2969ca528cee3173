"""Islands of two hosts each: four processes on real sockets, whose sum is known."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.launch import local
from tests.islands import island_of_hosts
from tests.islands.island_of_hosts import DEVICES, STEPS, ramp

# Processes that talk over sockets: run by `make test-tools`.
pytestmark = pytest.mark.tools

HOSTS = 2
ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("wire", ["", "int8"])
def test_hosts_exchange_each_their_rows_and_hold_the_same_model(tmp_path, wire):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    environment["PYTHONPATH"] = str(ROOT)
    started = {}
    try:
        for name in "ab":
            port = local.free_port()
            for index in range(HOSTS):
                arguments = [str(x) for x in (port, HOSTS, index, name, tmp_path, wire)]
                started[name, index] = subprocess.Popen(
                    [sys.executable, island_of_hosts.__file__, *arguments],
                    env=environment,
                    stderr=subprocess.PIPE,
                    text=True,
                )
        for who, process in started.items():
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, (who, errors[-3000:])
    finally:
        for process in started.values():
            process.kill()
    found = {who: json.loads((tmp_path / f"{who[0]}{who[1]}.json").read_text()) for who in started}
    for name in "ab":
        first, second = found[name, 0], found[name, 1]
        for key in ("life", "start", "end", "places"):
            assert first[key] == second[key], (name, key)
        assert first["places"] == [["d"], []]
        for host in (first, second):
            assert host["away"] == 1
            assert host["status"]["exchanged"] > 20
            assert not host["status"]["errors"]
    assert found["b", 0]["status"]["origin"].startswith("a, at its step")
    for key in ("sharded", "replicated"):
        a, b = (np.array(found[name, 0]["end"][key]) for name in "ab")
        begun = sum(np.array(found[name, 0]["start"][key]) for name in "ab")
        np.testing.assert_allclose(a + b, begun + (1.0 - 2.0) * (STEPS // 2) * ramp(a.shape), atol=2e-3)
        assert np.abs(a - b).max() < (2.0 if wire else 0.1)  # of int8 two steps of 127; 360 apart, had they not met


def test_the_application_trains_islands_of_two_processes_each(tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 123, 200_000, np.uint8).tobytes())
    done = subprocess.run(
        [
            *[
                sys.executable,
                local.__file__,
                "--islands=2",
                f"--processes={HOSTS}",
                f"--devices-per-process={DEVICES}",
            ],
            *["--", f"--workdir={tmp_path}", "--config=experiments/configs/lm.py", "--config.batch_size=16"],
            *["--config.steps=30", "--config.log_every=5", "--config.checkpoint.every=10", "--pace_ms=200"],
            *[f"--config.dataset.data_dir={text}", "--config.dataset.eval_split=validation[0%:5%]"],
            "--config.model.options={'num_layers': 1, 'width': 16, 'num_heads': 2, 'mlp_width': 16}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in "ab":
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["clock"] >= 30 * 16
        assert rows[-1]["bits_per_byte"] < np.log2(256)
        assert len(rows) == len({row["step"] for row in rows})  # the first host alone writes
        assert any(path.name.isdigit() for path in (tmp_path / name / "checkpoints").iterdir())
