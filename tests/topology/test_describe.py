"""The command `python -m crossover_jax describe`."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import crossover_jax as cj
from crossover_jax.__main__ import TOPOLOGIES, main
from crossover_jax.topology import derangements, exponential, pull
from crossover_jax.topology.describe import describe, draw
from crossover_jax.traced import trace_worker


def run(capsys, *argv):
    code = main(["describe", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("workers", ["1", "2", "16"])
def test_every_topology_is_described_as_text_and_as_the_same_json(name, workers, capsys):
    code, out, err = run(capsys, name, "--workers", workers, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["name"] == name
    assert report["workers"] == int(workers)
    assert report["keeps_agreement"]
    code, text, err = run(capsys, name, "--workers", workers)
    assert (code, err) == (0, "")
    assert f"worst {report['contraction']['worst']:.3f}, mean {report['contraction']['mean']:.3f}" in text


def test_exponential_graph_is_described_with_its_exact_average(capsys):
    report = json.loads(run(capsys, "exponential", "--workers", "64", "--hosts", "8", "--json")[1])
    assert report["rounds"] == report["exact_after"] == report["rounds_to_a_tenth"]["in turn"] == 6
    assert report["rounds_to_a_tenth"]["at random"] == 26  # of six rounds, one turns n/2: (5/6)**26 < 0.01
    assert report["messages"]["worker"] == {"min": 1, "max": 1, "even": True}
    assert report["messages"]["host"] == {"min": 1, "max": 8, "even": True}
    assert "after 6 rounds in turn" in run(capsys, "exponential", "--workers", "64")[1]
    assert describe(exponential(12))["exact_after"] is None


def test_options_reach_the_topology(capsys):
    report = json.loads(run(capsys, "exponential", "--workers", "64", "--peers", "3", "--json")[1])
    assert (report["rounds"], report["peers"], report["exact_after"]) == (3, 3, 3)
    report = json.loads(run(capsys, "base", "--workers", "25", "--peers", "4", "--json")[1])
    assert (report["rounds"], report["peers"], report["exact_after"]) == (2, 4, 2)
    reports = [
        run(capsys, "symmetric", "--workers", "64", "--pool-size", "7", "--slices", "8", "--seed", seed, "--json")[1]
        for seed in "112"
    ]
    assert reports[0] == reports[1] != reports[2]
    assert json.loads(reports[0])["rounds"] == 7
    assert json.loads(reports[0])["messages"]["slice"]["even"]


def test_uneven_load_and_a_moving_average_are_said(capsys):
    text = run(capsys, "pull", "--workers", "64", "--hosts", "8")[1]
    assert "keeps the average     no" in text
    assert text.count("uneven") == 2
    report = describe(pull(64, 8))
    assert report["peers"] == 1  # heard; more are sent
    assert report["messages"]["worker"]["max"] > 1


@pytest.mark.parametrize(("workers", "rounds"), [(8, 7), (9, 8), (11, 8), (64, 12)])
def test_the_pool_that_is_described_is_the_one_that_training_uses(workers, rounds, capsys):
    algorithm, x = cj.crossover_sgd(optax.sgd(0.1), workers), jnp.zeros(1000)
    step = lambda x: algorithm.update(x, algorithm.init(x), x, 0)[0]
    assert str(trace_worker(step, x, axes={"worker": workers})).count(" ppermute[") == rounds
    assert f"workers {workers}, rounds {rounds}, peers 1" in run(capsys, "latin", "--workers", str(workers))[1]


def test_small_latin_pools_are_advised_to_grow(capsys):
    assert "Take --pool-size 12 or more" in run(capsys, "latin", "--workers", "64", "--pool-size", "8")[1]
    assert "--pool-size" not in run(capsys, "latin", "--workers", "64")[1]
    assert "--pool-size" not in run(capsys, "latin", "--workers", "4", "--pool-size", "3")[1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["latn", "--workers", "8"], "'latn' is not a topology; did you mean 'latin'?"),
        (["zzz", "--workers", "8"], f"'zzz' is not a topology; choose from {', '.join(TOPOLOGIES)}."),
        (["ring", "--workers", "8", "--pool-size", "3"], "'ring' takes no `--pool-size`, got 3."),
        (["latin", "--workers", "8", "--peers", "2"], "'latin' takes no `--peers`, got 2."),
        (["hypercube", "--workers", "8", "--seed", "1"], "'hypercube' takes no `--seed`, got 1."),
        (["ring", "--workers", "0"], "`num_workers` must be at least 1, got 0."),
        (["latin", "--workers", "8", "--hosts", "3"], "`hosts` must divide the number of workers, got 3 for 8."),
    ],
)
def test_impossible_requests_are_refused_with_one_sentence(argv, sentence, capsys):
    assert run(capsys, *argv) == (2, "", sentence + "\n")


def test_sixteen_thousand_workers_are_described(capsys):
    code, text, _ = run(capsys, "latin", "--workers", "16384", "--hosts", "2048")
    assert code == 0
    assert "workers 16384, rounds 28" in text


def test_the_picture_has_every_message_and_what_it_brings():
    pool = derangements(6, 4, seed=1)
    who, left, load = draw("derangements", pool, 2, 1).axes
    (lines,) = who.collections
    matrices = [pool.matrix(p) for p in range(4)]
    messages, knows = {}, np.eye(6)[0] > 0  # who has heard of worker 0
    for p, matrix in enumerate(matrices):
        for i, j in np.argwhere(matrix > 0):
            if i != j:
                messages[p, j, p + 1, i] = knows[j]
        knows = (matrix @ knows) > 0
    drawn = [tuple(np.ravel(line).astype(int).tolist()) for line in lines.get_segments()]
    blue = [color[2] > color[0] for color in lines.get_colors()]
    assert dict(zip(drawn, blue, strict=True)) == messages
    in_turn = left.lines[0].get_ydata()[:5]
    projection, so_far = np.eye(6) - 1 / 6, np.eye(6)
    for share, matrix in zip(in_turn, [np.eye(6), *matrices], strict=True):
        so_far = matrix @ so_far
        assert share == pytest.approx(np.linalg.norm(projection @ so_far @ projection, 2))
    out_of_hosts = [sum(i // 3 != j // 3 for q, j, _, i in messages if q == p) / 2 for p in range(4)]
    assert load.lines[1].get_ydata().tolist() == out_of_hosts


def test_a_picture_is_a_file_and_without_matplotlib_a_sentence(capsys, tmp_path, monkeypatch):
    path = tmp_path / "latin.png"
    assert run(capsys, "latin", "--workers", "1", "--plot", str(path))[0] == 0
    assert run(capsys, "latin", "--workers", "8", "--plot", str(path))[0] == 0
    with Image.open(path) as picture:
        assert picture.width > 1000
    assert run(capsys, "latin", "--workers", "8", "--plot", str(tmp_path / "a" / "b.png"))[0] == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(capsys, "latin", "--workers", "8", "--plot", str(path))
    assert (code, out) == (2, "")
    assert err == "`--plot` needs matplotlib, which is missing: `pip install matplotlib`.\n"
