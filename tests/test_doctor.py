"""The doctor: it finds nothing where all is well, and what was broken on purpose."""

import copy
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import crossover_jax as cj
from crossover_jax import doctor, mixing, plan
from crossover_jax.__main__ import main
from experiments.launch import local

GOOD = {
    "title": "4 workers of 1 device(s), x, JAX y",
    "platform": "gpu",
    "hosts": ["a", "b"],
    "workers": [[[i, i // 2, 0]] for i in range(4)],
    "link": {"rate": 1e9, "latency": 1e-5},
    "exchanges": [
        {
            "name": name,
            "error": 0.0,
            "worker": 0,
            "allowed": 1e-5,
            "seconds": seconds,
            "planned": seconds,
            "permutes": 3,
            "compiled": {**dict.fromkeys(doctor.COUNTED, 0), "collective-permute-start": 3},
        }
        for name, seconds in [("crossover", 1e-2), ("crossover in int8", 3e-3)]
    ],
    "beside": {"hidden": 0.9},
}


@pytest.fixture(scope="module", params=[1, 2])
def report(request):
    mesh = cj.make_mesh(4, {"device": request.param}, devices=jax.devices()[: 4 * request.param])
    return doctor.examine(mesh, megabytes=0.1, turns=1)


def test_every_kind_of_exchange_is_its_matrices_and_channels_are_permutes(report):
    found = {x["name"]: x for x in report["exchanges"]}
    assert len(found) == 6
    assert all(x["error"] <= x["allowed"] for x in found.values())
    assert found["crossover in int8"]["error"] > 1e-4  # it was rounded
    for name in ("crossover", "crossover in int8", "d_psgd"):
        permutes = found[name]["compiled"]["collective-permute"]
        assert permutes == found[name]["permutes"] == {"d_psgd": 2}.get(name, 3)
        assert not found[name]["compiled"]["conditional"]
    assert found["crossover_sgd_paper"]["compiled"]["conditional"] == 4
    assert json.loads(json.dumps(report)) == report
    assert "crossover_sgd_paper" in doctor.as_text(report)


def test_an_exchange_that_does_not_exchange_is_found(monkeypatch):
    monkeypatch.setattr(mixing, "exchange_by_channels", lambda arrays, *args: arrays)
    monkeypatch.setattr(doctor.Trial, "beside", lambda *args: {"hidden": 1.0})
    said = [*doctor.findings(doctor.examine(cj.make_mesh(4, devices=jax.devices()[:4]), megabytes=0.1, turns=1))]
    for name in ("crossover", "crossover in int8", "d_psgd"):
        assert any(text.startswith(f"`{name}` is 0.") and "do not train" in text for text in said)
        assert any(text.startswith(f"`{name}` should be") for text in said)
    assert not any("sgp` is" in text or "allreduce_sgd` is" in text for text in said)


def test_a_link_s_rate_and_latency_are_those_of_the_messages(monkeypatch):
    def seconds(self, run, state):
        return 3e-4 + state[0].nbytes / 4 / 2e8

    monkeypatch.setattr(doctor.Trial, "seconds", seconds)
    link = doctor.Trial(cj.make_mesh(4, devices=jax.devices()[:4]), 1).link(1.0, 1)
    assert link == pytest.approx(plan.Link(2e8, 3e-4), rel=1e-3)


def test_the_time_that_is_planned_is_plan_s():
    link = plan.Link(1e8, 1e-3)
    planned = {kind.name: kind.planned(10**6, link, 4) for kind in doctor.kinds(4)}
    assert planned["crossover"] == plan.gossip_seconds(4e6, link)
    assert planned["crossover in int8"] == plan.gossip_seconds(65 / 64 * 1e6, link)
    assert planned["d_psgd"] == plan.gossip_seconds(8e6, link)
    assert planned["allreduce_sgd"] == plan.allreduce_seconds(4e6, 4, link)


def changed(path, value):
    report = copy.deepcopy(GOOD)
    *inside, last = path
    place = report
    for key in inside:
        place = place[key]
    place[last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["hosts"], ["a", "a"], "all 2 processes are on a, and no link is between them: start some on another host"),
        (["workers", 1], [[2, 0, 0], [3, 1, 0]], "workers [1] span slow links"),
        (["exchanges", 0, "error"], float("nan"), "`crossover` is nan off its matrices at worker 0, process 0 on a:"),
        (["exchanges", 0, "error"], 0.1, "`crossover` is 0.1 off its matrices"),
        (["exchanges", 0, "compiled", "conditional"], 1, "`crossover` should be 3 permutes alone, but is"),
        (["exchanges", 0, "compiled", "all-gather"], 1, "`crossover` should be 3 permutes alone, but is"),
        (["exchanges", 0, "seconds"], 2e-2, "`crossover` takes 2.0 times what `plan` expects: try `in_flight=1`"),
        (["exchanges", 1, "seconds"], 2e-2, "`crossover in int8` takes 2.0 times as long as float32"),
        (["beside", "hidden"], 0.2, "an exchange hides little beside products: take `mix_after`"),
    ],
)
def test_each_finding_says_what_to_do(path, value, said):
    assert [*doctor.findings(GOOD)] == []
    assert doctor.as_text(GOOD).endswith(
        "All is well.\n\n"
        "What to take: python -m crossover_jax plan --workers 4 --dcn-gbps 8 --dcn-us 10 --params P --compute-ms T"
    )
    (text,) = doctor.findings(changed(path, value))
    assert text.startswith(said)
    assert len(text.split(": ", 1)[1]) > 10


def test_a_worker_of_a_tpu_s_slice_may_span_hosts():
    report = changed(["platform"], "tpu")
    report["workers"] = [[[0, 0, 0], [1, 1, 0]], [[2, 2, 1], [3, 3, 1]]]
    report["hosts"] = ["a", "b", "c", "d"]
    assert [*doctor.findings(report)] == []
    report["platform"], report["hosts"] = "gpu", ["a", "a", "b", "b"]  # a process for each GPU
    assert [*doctor.findings(report)] == []
    report["hosts"] = ["a", "b", "a", "b"]
    assert next(doctor.findings(report)).startswith("workers [0, 1] span slow links")


def test_what_cannot_be_is_refused_in_a_line(capsys):
    assert main(["doctor", "--workers", "1"]) == 2
    assert capsys.readouterr().err == "`mesh` must have at least 2 workers, got 1: on a CPU pass `--devices 8`.\n"
    assert main(["doctor", "--megabytes", "0"]) == 2
    assert capsys.readouterr().err == "`--megabytes` must be positive, got 0.\n"
    assert main(["doctor", "--workers", "-3"]) == 2
    assert capsys.readouterr().err.startswith("`num_workers` must be at least 1, got -3.")


@pytest.mark.tools
def test_two_processes_examine_together(tmp_path):
    command = [
        sys.executable,
        "-m",
        "crossover_jax",
        "doctor",
        "--megabytes",
        "0.1",
        "--devices",
        "2",
        "--processes",
        "2",
    ]
    command += ["--coordinator", f"127.0.0.1:{local.free_port()}", "--out", str(tmp_path / "doctor.json")]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, "--process", str(i)], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        first, second = (process.communicate(timeout=600)[0] for process in started)
    finally:
        [process.kill() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert "4 workers of 1 device(s)" in first
    assert "all 2 processes are on" in first
    assert second.endswith("process 1 is done; the first one tells.\n")
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert [place for ((_, place, _),) in report["workers"]] == [0, 0, 1, 1]
    assert all(x["error"] <= x["allowed"] for x in report["exchanges"])
    assert np.isfinite(report["link"]["rate"])
