"""Outer steps, and a period of steps as one program, by `train`."""

import jax
import numpy as np
import pytest

from experiments import train
from experiments.algorithms import make_algorithm
from experiments.optimizers import make_optimizer
from experiments.program import wire_bytes_per_step
from experiments.settings import check_settings
from tests.experiments.helpers import changed, small_config

PERIOD = 2
OUTER = {"algorithm": "outer", "outer__every": PERIOD, "steps": 4 * PERIOD}


@pytest.fixture
def config(data_dir):
    return changed(small_config(data_dir), **OUTER)


def values(rows):
    """Of a row what does not depend on time."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def test_a_run_by_periods_is_the_run_by_single_steps(config, tmp_path):
    """Its rows, at the ends of periods, and its state: schedule, data and outer steps are those of single steps."""
    config = changed(config, outer__overlap=True, simulate="no", log_every=PERIOD)
    devices = jax.devices()[:8]
    singly, by_periods = (
        train.train(changed(config, period=period), tmp_path / str(period), devices=devices) for period in (1, PERIOD)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), singly[0], by_periods[0])
    for a, b in zip(values(singly[1]), values(by_periods[1]), strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_a_run_by_periods_goes_on_where_it_was_killed(config, tmp_path, monkeypatch):
    config = changed(config, period=PERIOD, log_every=PERIOD, checkpoint__every=PERIOD)
    whole, rows = train.train(config, tmp_path / "whole")
    fetch, killed = train.fetch, iter([False, False, True])

    def killing(*args):
        if next(killed):
            raise KeyboardInterrupt
        return fetch(*args)

    monkeypatch.setattr(train, "fetch", killing)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, tmp_path / "parts")
    monkeypatch.setattr(train, "fetch", fetch)
    with pytest.raises(ValueError, match=r"`config\.period` must divide the 4 steps that the run in `workdir` has"):
        train.train(changed(config, period=8), tmp_path / "parts", resume=train.Resume(allow=["period"]))
    resumed, resumed_rows = train.train(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert values(resumed_rows) == values(rows)


@pytest.mark.parametrize(
    ("keys", "models"),
    [
        ({"outer.mix": "average"}, 2 * 7 / 8 / 4),
        ({}, 1 / 4),
        ({"outer.wire": "int8", "outer.rounds": 3}, 3 * 65 / 256 / 4),
        ({"outer.stream": True}, 1 / 4),
        ({"outer.wire": "int4"}, 33 / 256 / 4),
    ],
)
def test_what_an_outer_algorithm_sends_per_step(config, keys, models):
    config = changed(config, outer__every=4, **{key.replace(".", "__"): value for key, value in keys.items()})
    check_settings(config)
    params = {"kernel": jax.ShapeDtypeStruct((512, 1024), np.float32)}
    algorithm = make_algorithm(config, make_optimizer(config, 8), params)
    assert wire_bytes_per_step(algorithm, params, config) == pytest.approx(
        models * 4 * 512 * 1024, rel=0.02
    )  # segments of whole 1024s


def test_a_renewal_between_two_exchanges_is_counted(config):
    """After the 50th step, where no exchange of every fourth stands."""
    keys = {"crossover__local_steps": 4, "crossover__renew_every": 50, "outer__every": 16}
    config = changed(config, algorithm="crossover", **keys)
    params = {"kernel": jax.ShapeDtypeStruct((512, 1024), np.float32)}
    algorithm = make_algorithm(config, make_optimizer(config, 8), params)
    model = 4 * 512 * 1024
    expected = (12 * model + 2 * 7 / 8 * model) / 50
    assert wire_bytes_per_step(algorithm, params, config) == pytest.approx(expected, rel=0.02)


MISTAKES = {
    "`config.steps` must be a multiple of `config.period` = 3, got 8": {"period": 3},
    "`config.outer.wire` must stay at its default where `config.outer.mix` is 'average'": {
        "outer__mix": "average",
        "outer__wire": "int8",
    },
    "`config.outer.rounds` must be 1 with `config.outer.stream`, got 3": {"outer__stream": True, "outer__rounds": 3},
    "`config.outer.mix` must be one of crossover, average, got 'mean'": {"outer__mix": "mean"},
    "`config.period` must be at least 1, got 0": {"period": 0},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_does_not_fit_is_one_sentence(config, tmp_path, message):
    with pytest.raises(ValueError, match=message):
        train.train(changed(config, **MISTAKES[message]), tmp_path)


def test_an_adam_that_knows_that_it_gossips_is_chosen_by_its_name(config, tmp_path):
    config = changed(config, algorithm="crossover", outer__every=16, optimizer="gossip_adamw", steps=2)
    state, _ = train.train(config, tmp_path)
    assert any("signal" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state.algorithm))
