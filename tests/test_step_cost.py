"""What a step costs, by the benchmark: the ratios are to communication off, and are those of its own times."""

import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tools
ROOT = pathlib.Path(__file__).parents[1]
SMALL = ["--workers", "4", "--examples", "2", "--model", "mlp", "--options", "{'hidden': (8,)}", "--steps", "1"]


def run(*args):
    command = [sys.executable, "-m", "benchmarks.step", *SMALL, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_one_step_of_each_is_compared_with_communication_off():
    for devices in ("1", "4"):
        done = run("--devices", devices, "--arms", "allreduce;three rounds in int8")
        rows = [re.split(r"\s{2,}", line) for line in done.stdout.splitlines()[1:]]
        assert [row[0] for row in rows] == ["communication off", "allreduce", "three rounds in int8"], done.stderr
        off = float(rows[0][1])
        for row in rows:
            ms, ratio, least, most = map(float, row[1:5])
            assert ms > 0
            assert abs(ratio - ms / off) < 0.01 + 0.06 * (1 + ratio) / off  # milliseconds are printed to 0.1
            assert abs(least - ratio) < 0.01
            assert abs(most - ratio) < 0.01
            assert row[5].endswith("MB")
        assert rows[0][2] == "1.000"


def test_an_unknown_arm_is_refused():
    done = run("--arms", "gossip")
    assert done.returncode == 2
    assert "--arms must be among communication off; allreduce;" in done.stderr
