"""Which runs a study still needs, and that a run of it is `train.py`'s."""

import csv

import pytest

from experiments import csv_rows, sweep, train
from experiments.configs import fashion_mnist
from experiments.studies import study as study_module
from experiments.studies.study import (
    BEFORE,
    FINAL,
    FIRST_TUNING_SEED,
    TUNING,
    Arm,
    Run,
    Study,
    final_rate,
    groups_of,
    missing_runs,
    run_config,
    tuning_scores,
)

STEPS = 6
STUDY = """
from experiments.studies.study import Arm, Study
from tests.experiments.test_sweep import small_config

def get_study():
    arms = {name: Arm("all", {"algorithm": name}) for name in ("crossover", "allreduce")}
    return Study(small_config(), arms, learning_rates=(0.01, 0.02, 1e6), tuning_seeds=1, seeds=2, curve=2)
"""


def small_config():
    config = fashion_mnist.get_config()
    config.model.name, config.model.options = "mlp", {"hidden": (8,), "dropout": 0.1}
    config.num_workers, config.batch_size, config.eval_batch_size, config.steps = 4, 64, 5000, STEPS
    return config


@pytest.fixture
def study():
    arms = {"a": Arm("p", {}), "b": Arm("p", {"num_workers": 2}), "c": Arm("q", {}), "d": Arm("p", {}, rate_of="b")}
    return Study(small_config(), arms, learning_rates=(0.1, 0.2, 0.4), tuning_seeds=2, seeds=3)


def tuned(best):
    """Rows of all tuning runs, in which each arm does best at one learning rate, as `missing` asks for them."""

    def rows(runs):
        distance = lambda run: abs(run.learning_rate - best[run.arm])
        return [{**run._asdict(), "accuracy": 90 - distance(run)} for run in runs]

    return rows


def test_tuning_comes_first_and_an_arm_that_borrows_its_rate_is_not_tuned(study):
    runs = missing_runs(study, [])
    assert {run.stage for run in runs} == {TUNING}
    assert {run.arm for run in runs} == {"a", "b", "c"}
    assert len(runs) == len(set(runs)) == 3 * 3 * 2
    assert {run.seed for run in runs} == {FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1}
    done = tuned({"a": 0.2, "b": 0.2, "c": 0.2})(runs[:5])
    assert missing_runs(study, done) == runs[5:]


def test_a_grid_is_widened_for_all_arms_of_the_problem_until_none_is_best_at_its_end(study):
    rows, best, asked = [], {"a": 0.2, "b": 1.6, "c": 0.05}, []
    while (runs := missing_runs(study, rows))[0].stage == TUNING:
        asked.append({run.learning_rate for run in runs})
        rows += tuned(best)(runs)
    rates = {name: sorted({r["learning_rate"] for r in rows if r["arm"] == name}) for name in "abc"}
    assert rates["a"] == rates["b"] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    assert rates["c"] == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert {(run.arm, run.learning_rate) for run in runs} == {("a", 0.2), ("b", 1.6), ("c", 0.05), ("d", 1.6)}
    assert {run.seed for run in runs} == {0, 1, 2}
    assert missing_runs(study, rows + [{**run._asdict(), "accuracy": 1.0} for run in runs]) == []


def test_widening_ends(study):
    rows = []
    while (runs := missing_runs(study, rows))[0].stage == TUNING:
        rows += tuned({"a": 0.0, "b": 1e9, "c": 0.2})(runs)
    grid = sorted({row["learning_rate"] for row in rows if row["arm"] == "a"})
    assert (grid[0], grid[-1]) == (0.1 / 2**study_module.WIDER, 0.4 * 2**study_module.WIDER)


def test_a_run_that_diverged_counts_as_nothing_right(study):
    rows = [
        {"arm": "a", "stage": TUNING, "learning_rate": 0.1, "seed": s, "accuracy": x} for s, x in ((0, 80), (1, ""))
    ]
    assert tuning_scores(rows, "a") == {0.1: 40.0}


def test_text_is_judged_by_its_bits_per_byte():
    found = [(0.1, 0, 2.5), (0.1, 1, 2.7), (0.2, 0, 2.4), (0.2, 1, ""), (0.4, 0, 2.3), (0.4, 1, 3.0)]
    rows = [
        {"arm": "a", "stage": TUNING, "learning_rate": rate, "seed": seed, "bits_per_byte": bits, "accuracy": 50.0}
        for rate, seed, bits in found
    ]
    assert tuning_scores(rows, "a") == pytest.approx({0.1: -2.6, 0.2: -float("inf"), 0.4: -2.65})
    study = Study(small_config(), {"a": Arm("p", {})}, learning_rates=(0.1, 0.2, 0.4))
    assert final_rate(study, rows, "a") == 0.1


def test_a_single_learning_rate_is_taken_by_all_arms_and_nothing_is_tuned(study):
    runs = missing_runs(study._replace(learning_rates=(0.3,)), [])
    assert runs == [Run(arm, FINAL, 0.3, seed) for arm in "abcd" for seed in range(3)]


def test_a_study_may_take_the_learning_rates_of_the_final_runs_of_another_one(study, tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "RESULTS", tmp_path)
    borrows = study._replace(rates_of="other")
    rates = {"a": 0.2, "b": 1.6, "c": 0.05}
    runs = [Run(arm, TUNING, 0.4, 1000) for arm in "abcd"] + [
        Run(*arm, 0) for arm in zip(rates, [FINAL] * 3, rates.values(), strict=True)
    ]
    csv_rows.append(tmp_path / "other.csv", [run._asdict() for run in runs], study_module.KEY)
    with pytest.raises(ValueError, match=r"^'d' must have final runs in other\.csv, whose learning rate it takes\.$"):
        missing_runs(borrows, [])
    del borrows.arms["d"]
    assert missing_runs(borrows, []) == [Run(arm, FINAL, rates[arm], seed) for arm in "abc" for seed in range(3)]


def test_an_arm_that_was_not_tuned_has_no_learning_rate(study):
    with pytest.raises(
        ValueError, match=r"^'b' must be tuned before a run of 'd' is trained to its end: it has no row\.$"
    ):
        final_rate(study, tuned({"a": 0.2})([Run("a", TUNING, 0.2, 1000)]), "d")


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_may_go_on_from_the_averaged_model_of_the_same_arm_and_seed_before(lanes, data_dir):
    """At a learning rate of zero it ends where the run before ended; that one is what it is without a study behind."""
    config = small_config()
    config.dataset.data_dir = str(data_dir)
    arms = {"a": Arm("p", {"algorithm": "crossover"}), "b": Arm("p", {"algorithm": "local_sgd"})}
    before = Study(config, arms, learning_rates=(0.1,), curve=1)
    alone = Arm("p", {"algorithm": "alone", "num_workers": 1})
    study = Study(config, dict.fromkeys(arms, alone), learning_rates=(0.0,), curve=1, before=before)
    runs = [Run("a", FINAL, 0.0, 7), Run("b", FINAL, 0.0, 0)]
    trainer = sweep.Trainer(study, runs[0])
    rows = [row for i in range(0, 2, lanes) for row in sweep.train(study, trainer, runs[i : i + lanes])[0]]
    ended = {(row["arm"], row["seed"]): row for row in rows if row["stage"] == BEFORE}
    after = {(row["arm"], row["seed"]): row for row in rows if row["stage"] == FINAL}
    assert set(ended) == set(after) == {("a", 7), ("b", 0)}
    assert ended["a", 7]["loss"] != ended["b", 0]["loss"]
    for key, row in after.items():
        assert row["loss"] == pytest.approx(ended[key]["loss"], abs=2e-5)
        assert (ended[key]["learning_rate"], row["learning_rate"]) == (0.1, 0.0)
    first = Run("a", FINAL, 0.1, 7)
    (alone,), _ = sweep.train(before, sweep.Trainer(before, first), [first])
    assert alone["loss"] == pytest.approx(ended["a", 7]["loss"], abs=2e-5)


def test_runs_of_one_program_are_one_group(study):
    groups = list(groups_of(study, missing_runs(study, [])))
    assert sorted(len(group) for group in groups) == [6, 12]  # a and c set nothing, and share one
    assert all(len({run.arm for run in group} & {"b"}) in (0, 1) for group in groups)


@pytest.mark.parametrize("lanes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_is_that_of_train_py(lanes, data_dir, tmp_path):
    study = Study(small_config(), {"a": Arm("p", {"algorithm": "crossover"})}, learning_rates=(0.1, 0.2), curve=1)
    study.config.dataset.data_dir = str(data_dir)
    runs = [Run("a", FINAL, 0.1, 0), Run("a", FINAL, 0.2, 7)]
    trainer = sweep.Trainer(study, runs[0])
    rows = [row for i in range(0, 2, lanes) for row in sweep.train(study, trainer, runs[i : i + lanes])[0]]
    for run, row in zip(runs, rows, strict=True):
        config = run_config(study, run)
        config.seed, config.schedule.learning_rate = run.seed, run.learning_rate
        config.checkpoint.every, config.log_every = None, STEPS
        _, found = train.train(config, tmp_path / str(run.seed))
        last = found[-1]
        assert (row["step"], row["seed"]) == (STEPS, run.seed)
        assert row["train_loss"] == pytest.approx(last["train/loss"], abs=2e-5)
        assert row["loss"] == pytest.approx(last["eval/mean/loss"], abs=2e-5)
        assert row["accuracy"] == pytest.approx(100 * last["eval/mean/accuracy"], abs=0.011)
        assert row["workers_accuracy_min"] == pytest.approx(100 * last["eval/workers/accuracy_min"], abs=0.011)
        assert float(row["consensus_distance"]) == pytest.approx(last["consensus_distance"], rel=1e-2)
        assert row["wire_bytes_per_step"] == round(last["wire_bytes_per_step"])


def test_a_study_from_the_command_line_and_what_is_there_is_not_run_again(data_dir, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "study.py", tmp_path / "results" / "out.csv"
    path.write_text(STUDY)
    monkeypatch.setattr(study_module, "WIDER", 0)
    argv = [str(path), f"--out={out}", f"--data_dir={data_dir}", "--lanes=2"]
    assert sweep.main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.count("tuning lr") == 6
    assert printed.count("of 2 seeds") == 2
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    diverged = [row for row in rows if row["stage"] == TUNING and float(row["learning_rate"]) == 1e6]
    assert [row["accuracy"] for row in diverged if int(row["step"]) == STEPS] == ["", ""]
    final = [row for row in rows if row["stage"] == FINAL]
    assert {row["learning_rate"] for row in final} <= {"0.01", "0.02"}
    assert all((row["accuracy"] != "") == (int(row["step"]) == STEPS) for row in final)  # test set: once, at the end
    assert len(final) == 2 * (2 + 1)  # a curve of the first seed only
    assert all(row["workers_accuracy"] == "" for row in rows if row["stage"] == TUNING)
    before = out.read_bytes()
    assert sweep.main(argv) == 0
    assert out.read_bytes() == before
    monkeypatch.setattr(sweep, "train", None)
    assert sweep.main([*argv, "--arms=nobody"]) == 1
    assert "must be among crossover, allreduce" in capsys.readouterr().err


def test_a_row_that_a_dying_process_left_unfinished_is_none_and_spoils_no_other(tmp_path):
    path, columns = tmp_path / "rows.csv", ("arm", "accuracy", "code")
    csv_rows.append(path, [{"arm": "a", "accuracy": 0.5, "code": "abc"}], columns)
    whole = path.read_bytes()
    for torn in (b"b", b"b,0.7", b"b,0.7,ab"):
        path.write_bytes(whole + torn)
        assert csv_rows.read(path) == [{"arm": "a", "accuracy": 0.5, "code": "abc"}]
        csv_rows.append(path, [{"arm": "c", "accuracy": "", "code": "def"}], columns)
        assert [row["arm"] for row in csv_rows.read(path)] == ["a", "c"]
