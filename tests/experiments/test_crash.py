"""Training that is killed and resumed ends as if nothing had been, and what would differ is seen."""

import json
import random

import jax.numpy as jnp
import pytest

from experiments import checkpoint, csv_rows
from experiments.trials import crash
from experiments.trials.crash import EQUAL, SAVING, SETUP, TRAINING, Kill, Setting

# Training in processes that are killed: run by `make test-tools`.
pytestmark = pytest.mark.tools

SAVE_OF_40, BEHIND_76 = Kill(SAVING, 0.25, 0.01), Kill(TRAINING, 0.7, 0.0)


@pytest.mark.parametrize(
    ("num_processes", "kills"),
    [
        (1, [SAVE_OF_40, BEHIND_76]),
        pytest.param(
            *(2, [SAVE_OF_40._replace(victim=1, grace=1), BEHIND_76._replace(victim=0), Kill(SETUP, 0.5, 0.0)]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_killed_runs_end_bit_for_bit_as_one_that_was_left_alone(num_processes, kills, tmp_path, data_dir):
    # It resumes from step 20, between two rows of metrics, and then from step 40 or 60, which have one.
    epochs_of_60_steps = "--config.dataset.train_split=train[:3840]"
    flags = (f"--config.dataset.data_dir={data_dir}", epochs_of_60_steps, "--config.log_every=8")
    setting = Setting("crossover", num_processes, steps=100, every=20, flags=flags)
    setup = crash.undisturbed(setting, tmp_path / "reference")
    outcome = crash.disturbed(setting, kills, tmp_path / "trial", tmp_path / "reference", setup)
    assert outcome.verdict == EQUAL
    assert len(outcome.crashes) == len(kills)
    assert outcome.crashes[0].moment == SAVING
    resumed = [crash.resumed for crash in outcome.crashes]
    assert 0 < resumed[0] < resumed[1]  # it did not begin anew


def run_of(workdir, state, rows, **changed):
    """What a run leaves, as far as it is compared."""
    saves = checkpoint.Checkpoints(workdir, keep=1)
    saves.save(3, state, {"examples": 24, "rollbacks": 0, "best": None} | changed)
    saves.close()
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def test_every_difference_is_seen(tmp_path):
    state = {"w": jnp.arange(8.0).reshape(2, 4), "count": jnp.zeros(2, jnp.int32)}
    rows = [{"step": step, "train/loss": 1 / step, "examples_per_second": 5.0} for step in (1, 2, 3)]
    faster = [row | {"examples_per_second": 7.0} for row in rows]
    reference = run_of(tmp_path / "reference", state, rows)

    def difference(name, state=state, rows=rows, **changed):
        return crash.differences(run_of(tmp_path / name, state, rows, **changed), reference, 3)

    other = state | {"w": state["w"].at[1, 2].add(1e-6)}
    rounded = [*rows[:2], rows[2] | {"train/loss": 0.3333333333333333 + 1e-16}]
    assert difference("same", rows=faster) == ""
    assert difference("gap", rows=[rows[0], rows[2]]) == "there are 2 rows of metrics, not 3"
    assert difference("twice", rows=[*rows, rows[2]]) == "there are 4 rows of metrics, not 3"
    assert difference("rounded", rows=rounded) == "1 rows of metrics differ, first row 3"
    assert difference("state", state=other) == "leaves in the record of step 3 differ"
    assert difference("best", best=[2, 0.5]) == "best in the record of step 3 differ"
    found, wanted = (crash.state_of(tmp_path / name, 3) for name in ("state", "reference"))
    assert [name for name in wanted if found[name] != wanted[name]] == ["['w']"]
    assert crash.differences(reference, reference, 4) == "there is no checkpoint of step 4"


def test_kills_are_drawn_alike_and_fall_everywhere():
    kills = [kill for seed in range(100) for kill in crash.draw(random.Random(seed), 2)]
    assert kills == [kill for seed in range(100) for kill in crash.draw(random.Random(seed), 2)]
    assert {kill.moment for kill in kills} == {SETUP, TRAINING, SAVING}
    assert {kill.victim for kill in kills} == {None, 0, 1}
    assert {kill.victim for seed in range(20) for kill in crash.draw(random.Random(seed), 1)} == {None}


def test_trials_with_a_row_are_not_run_again(tmp_path):
    setting, path = Setting("sgp", 2, 400, 20, ("--config.seed=1",)), tmp_path / "out.csv"
    outcome = crash.Outcome([crash.Crash(SAVING, 25, 0), crash.Crash(SETUP, None, 0)], EQUAL, seconds=12.34)
    for number in (0, 1):
        key = crash.key_of(setting, number, seed=0)
        row = crash.row_of(key, outcome)
        csv_rows.append(path, [row], list(row))
    with open(path, "a") as file:
        file.write("sgp,2,400,20,--config.seed=1,0,2,sav")  # it was killed itself
    kept = crash.read_rows(path)
    assert list(kept) == [crash.key_of(setting, number, seed=0) for number in (0, 1)]
    row = kept[crash.key_of(setting, 1, seed=0)]
    assert row["redone"] == "25"
    assert "saving 25 → 0, set-up - → 0" in crash.line_of(2, row)
    assert "2 of 2  2       0         2       0       25 of at most 40" in crash.summary(list(kept.values()))
