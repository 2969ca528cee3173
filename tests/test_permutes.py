"""Programs of permutes on hosts with limited links: what arrives, and what passes the links meanwhile."""

import csv
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.tools
ROOT = pathlib.Path(__file__).parents[1]
SIZE = 60_000
SENT = {  # in vectors
    **dict.fromkeys(("shift/1", "shift/2", "segments/3", "chained/3", "all_to_all", "beside/2", "packed/2"), 1),
    **{"mean": 2 * 3 / 4, "products": 0},
}


def run(program, *args, folder=ROOT):
    command = [sys.executable, "-m", f"benchmarks.network.{program}", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, cwd=folder)


@pytest.fixture
def _allowed():
    done = run("hosts", "--hosts", 1, "--", "true")
    if "error: hosts need" in done.stderr:  # no root, or a kernel or tools that cannot: the line says what is missing
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


def few(*args, **where):
    few_steps = ("--params", SIZE, "--products", 3, "--steps", 2)
    return run("permutes", "--hosts", 4, "--rate", "50mbit", *few_steps, *args, **where)


@pytest.mark.usefixtures("_allowed")
def test_every_arm_brings_what_numpy_does_and_sends_no_more_than_that(tmp_path):
    out = tmp_path / "x.csv"
    done = few("--arms", ",".join(SENT), "--check", "--out", out, "--queued", 20_000, "--after_idle", 0)
    assert done.returncode == 0, done.stderr
    with open(out, newline="") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(SENT)
    for arm, vectors in SENT.items():
        assert float(rows[arm]["payload_bytes"]) == pytest.approx(vectors * 4 * SIZE, rel=1e-4)
        # Headers, acknowledgements and a barrier
        assert vectors * 4 * SIZE <= float(rows[arm]["frame_bytes"]) < 1.1 * vectors * 4 * SIZE + 10_000
        assert float(rows[arm]["shortest"]) <= float(rows[arm]["ratio"]) <= float(rows[arm]["longest"])
    kernel = [(row["congestion"], row["limit_output_bytes"], row["slow_start_after_idle"]) for row in rows.values()]
    assert set(kernel) == {("reno", "20000", "0")}


@pytest.mark.usefixtures("_allowed")
def test_what_arrives_is_compared(tmp_path):
    """A copy of the program whose hosts send the other way."""
    copy = shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks") / "network/permutes.py"
    copy.write_text(copy.read_text().replace("(i, (i + k) % n)", "(i, (i - k) % n)"))
    done = few("--arms", "shift/1", "--check", folder=tmp_path)
    assert done.returncode == 1
    assert "Mismatched elements" in done.stderr


def test_what_cannot_be_is_refused_in_a_line():
    for args, message in (
        (["--arms", "beside"], "error: an arm must be all_to_all, mean, products or, with a number, shift, "),
        (["--arms", "mean/2"], "error: an arm must be "),
        (["--arms", "shift/4"], "error: a shift must be less than the 4 hosts, got 'shift/4'."),
        (["--hosts", 2], "error: `--hosts` must be at least 3"),
        (["--queued", 0], "error: `--queued` must be at least 1, got 0."),
    ):
        done = few(*args)
        assert done.returncode == 1
        assert done.stderr.startswith(message)


@pytest.mark.usefixtures("_allowed")
def test_a_setting_that_the_kernel_does_not_have_is_refused_in_a_line():
    done = few("--congestion", "haste")
    assert done.returncode == 1
    assert done.stderr.startswith("error: `congestion` must be what this kernel has, got 'haste'")
