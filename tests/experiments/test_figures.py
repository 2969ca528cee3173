"""Intervals against Student's table, what is compared with what, and pictures that show something."""

import csv
import itertools

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from experiments import csv_rows, figures, frontier, sweep
from experiments.studies.study import FINAL, TUNING

SEEDS = 5


def write(path, arms):
    """Final runs with these accuracies by seed, and a tuning run and a row of a curve that must not count."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sweep.COLUMNS)
        writer.writeheader()
        for arm, accuracies in arms.items():
            common = {"arm": arm, "learning_rate": 0.1, "step": 1}
            writer.writerow({**common, "stage": TUNING, "seed": 1000, "accuracy": 1.0})
            for seed, accuracy in enumerate(accuracies):
                writer.writerow({**common, "stage": FINAL, "seed": seed, "accuracy": ""})
                writer.writerow({**common, "stage": FINAL, "seed": seed, "accuracy": accuracy})


def accuracies(mean, seed):
    return (mean + 0.1 * np.random.default_rng(seed).normal(size=SEEDS)).tolist()


STUDIES = {
    "batch": [f"{name} {batch}" for batch in (512, 2048) for name in ("allreduce", "sgp", "crossover")],
    "workers": ["allreduce", "crossover 4", "crossover 8", "crossover 64", "sgp 1 peer 8", "sgp 2 peers 8"],
    "ablations": [f"{name} {n}" for n in (8, 64) for name in ("crossover", *figures.ABLATIONS, "phases")],
    "lars": ["allreduce", "own norms 8", "averaged norms 8"],
    "gap": ["allreduce", "crossover", "two rounds in bfloat16"],
    "large": ["allreduce", "crossover", "allreduce with warm-up 0.5"],
    "large_lars": ["allreduce", "crossover with warm-up 0"],
}


@pytest.mark.parametrize("study", figures.STUDIES)
def test_every_study_has_a_picture_and_a_table(study, tmp_path, capsys):
    write(tmp_path / f"{study}.csv", {arm: accuracies(88 - i / 10, i) for i, arm in enumerate(STUDIES[study])})
    assert figures.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / f"{study}.png") as image:
        assert image.width > 500
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    printed = capsys.readouterr().out
    assert printed.count("no results") == len(figures.STUDIES) - 1
    assert all(f"  {arm} " in printed for arm in STUDIES[study])


def write_bits(path, arms):
    """Final runs of text that end with these bits and bytes per step; and what must not count."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sweep.COLUMNS)
        writer.writeheader()
        for arm, (sent, bits) in arms.items():
            common = {"arm": arm, "learning_rate": 0.016, "accuracy": 50.0, "wire_bytes_per_step": sent}
            writer.writerow({**common, "stage": TUNING, "seed": 1000, "bits_per_byte": 9.0})
            for seed, own in enumerate(bits):
                writer.writerow({**common, "stage": FINAL, "seed": seed, "bits_per_byte": ""})
                writer.writerow({**common, "stage": FINAL, "seed": seed, "bits_per_byte": own})


BITS = {
    "lm_frontier": {
        "allreduce": (1_063_104, [2.01, 2.02, 2.03]),
        "three rounds in int8": (462_848, [2.04, 2.05, 2.06]),
        "three rounds in int8 corrected": (462_848, [2.047, 2.049, 2.051]),  # whose name would cover the other
        "DiLoCo 16": (66_560, [2.1, 2.11, 2.12]),
        "gossip outer 16": (38_400, [2.12, 2.125, ""]),  # one diverged
    },
    "lm_others": {"NoLoCo 16": (76_800, [2.13, 2.14, 2.15]), "no arm of the study": (1, [1.0, 1.0, 1.0])},
}


def test_the_frontier_is_bits_per_byte_against_bytes_per_token_with_a_name_at_each_point(tmp_path, capsys):
    for study, arms in BITS.items():
        write_bits(tmp_path / f"{study}.csv", arms)
    assert figures.main(["--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    with Image.open(tmp_path / "out" / "frontier.png") as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(2**24)) > 50
    printed = capsys.readouterr().out
    assert "  three rounds in int8         2.0500 ± 0.0248   3 seeds   to allreduce: +0.0300 ± 0.0000" in printed
    assert "  gossip outer 16              2.1225 ± 0.0318   2 seeds" in printed

    others = frontier.bytes_per_token(
        csv_rows.read(tmp_path / "lm_others.csv"), figures.FRONTIER["lm_others"].get_study()
    )
    assert others == {"NoLoCo 16": 76_800 / 512}
    arms = {arm: own for of_study in BITS.values() for arm, own in of_study.items() if arm != "no arm of the study"}
    bits = {arm: dict(enumerate(x for x in own if x)) for arm, (_, own) in arms.items()}
    sent = {arm: sent / (64 / 8 * 64) for arm, (sent, _) in arms.items()}  # 8 windows of 64 bytes a worker
    figure = frontier.draw_frontier(bits, sent)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    points = {container.lines[0].get_xydata().tobytes() for container in axes.containers}
    assert points == {np.array([[sent[arm], np.mean(list(own.values()))]]).tobytes() for arm, own in bits.items()}
    bars = [container.lines[2][0].get_segments()[0] for container in axes.containers]  # from below to above
    halves = [(high - low) / 2 for (_, low), (_, high) in bars]
    assert halves == pytest.approx([figures.interval(list(own.values())).half for own in bits.values()])
    figure.draw_without_rendering()
    names = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert list(names) == list(arms)
    for (a, of_a), (b, of_b) in itertools.combinations(names.items(), 2):
        assert not of_a.overlaps(of_b), f"{a} covers {b}"


def test_arms_are_compared_seed_by_seed_with_the_allreduce_of_their_batch(tmp_path):
    arms = {"allreduce 512": [80.0, 82.0, 84.0], "crossover 512": [81.0, 83.5, 84.5], "allreduce 2048": [1.0, 1.0, 1.0]}
    write(tmp_path / "batch.csv", arms)
    found = figures.final_accuracies(csv_rows.read(tmp_path / "batch.csv"))
    assert {arm: list(x.values()) for arm, x in found.items()} == arms
    difference = figures.paired(found["crossover 512"], found[figures.baseline_of("crossover 512", found)])
    assert difference.mean == pytest.approx(1.0)
    assert difference.half == pytest.approx(4.3027 * 0.5 / 3**0.5, rel=1e-4)  # t of 2 degrees of freedom, 97.5 %
    assert figures.baseline_of("crossover 8", {"allreduce": {}, "crossover 8": {}}) == "allreduce"


def test_a_warm_up_is_compared_with_the_allreduce_that_has_it_and_other_allreduces_with_the_first():
    found = {
        "allreduce": {0: 80.0, 1: 81.0},
        "allreduce with warm-up 0.5": {0: 82.0, 1: 83.5},
        "crossover with warm-up 0.5": {0: 81.0, 1: 83.0},
    }
    means = {arm: less and less.mean for arm in found for less in (figures.difference(arm, found),)}
    assert means == {"allreduce": None, "allreduce with warm-up 0.5": 2.25, "crossover with warm-up 0.5": -0.75}
    assert figures.difference("gossip", {"gossip": {0: 1.0}}) is None


def test_tuning_seeds_are_gathered_by_learning_rate_without_the_rows_of_curves(tmp_path):
    write(tmp_path / "batch.csv", {"sgp 512": [80.0], "allreduce 512": [81.0]})
    found = figures.tuning_accuracies(csv_rows.read(tmp_path / "batch.csv"))
    assert found == {"sgp 512": {0.1: [1.0]}, "allreduce 512": {0.1: [1.0]}}


def test_the_papers_numbers_are_in_the_figures():
    paper = csv_rows.read(figures.PAPER)
    crossover = figures.theirs_by(paper, "figure 8", "crossover", "workers")
    assert crossover == {8: [75.7285], 16: [75.386], 32: [75.115], 64: [74.0555]}
    for method in figures.ABLATIONS.values():
        assert list(figures.theirs_by(paper, "ablation", method, "workers")) == [8, 16, 32, 64]
