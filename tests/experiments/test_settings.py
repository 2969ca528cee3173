"""What a config may not say, and how a command line becomes one."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments import flags, resume, settings, train
from experiments.configs import default
from experiments.settings import check_settings
from tests.experiments.helpers import changed, read_rows, small_config

ROOT = pathlib.Path(__file__).parents[2]
LOAD_MODULE = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads configs by it


@pytest.fixture
def config(data_dir):
    return small_config(data_dir)


# ---- keys that nothing reads ----


def test_a_key_of_what_was_not_chosen_is_an_error(config, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^`config\.crossover\.wire` must stay None where `config\.algorithm` is 'sgp', which does not read it, "
        r"got 'int8': leave it out, or pass --config\.algorithm=crossover\.$",
    ):
        train.train(changed(config, algorithm="sgp", crossover__wire="int8"), tmp_path)
    assert read_rows(tmp_path) == []


def group_of(key):
    return key.rpartition(".")[0].rpartition(".")[2]


GROUPS = {name: choice for choice, names in settings.CHOICES.items() for name in names}  # and the key that chooses it
KEYS = {key: value for key, value in settings.flat_settings(default.get_config()).items() if group_of(key) in GROUPS}
OTHER_WORDS = {"crossover.pool": "balanced", "crossover.cut": "rows", "crossover.wire": "int8"}
OTHER_WORDS |= {"outer.mix": "average", "outer.wire": "int8", "des_loc.wire": "int8"}


def another(key):
    """A value that the key may have and that is not its default."""
    value = KEYS[key]
    if key in OTHER_WORDS or value is None:
        return OTHER_WORDS.get(key, 3)
    return not value if isinstance(value, bool) else value + 2 if isinstance(value, int) else value / 2 + 0.125


@pytest.mark.parametrize("key", KEYS)
def test_a_key_may_change_where_its_group_is_chosen_and_nowhere_else(key, config):
    group, other = group_of(key), another(key)
    assert other != KEYS[key]
    choice = GROUPS[group]
    check_settings(changed(config, **{choice: group, key: other}))
    for name in settings.CHOICES[choice]:
        if name != group:
            with pytest.raises(
                ValueError, match=rf"^`config\.{key}` must stay .* where `config\.{choice}` is '{name}'"
            ):
                check_settings(changed(config, **{choice: name, key: other}))


@pytest.mark.parametrize(
    ("key", "value"),
    [("dataset.sequence", 99), ("checkpoint.keep", 3), ("max_rollbacks", 5)],
)
def test_a_key_that_nothing_reads_is_an_error(key, value, config):
    with pytest.raises(ValueError, match=rf"^`config\.{key}` must stay .* here, got {value}: only .* would read it\.$"):
        check_settings(changed(config, **{key: value}))


def test_an_optimizer_for_one_worker_s_gradients_is_refused_where_it_would_see_their_average(config):
    message = r"^`config\.optimizer` must be another, such as 'adamw', with --config\.algorithm=allreduce, .*got 'goss"
    with pytest.raises(ValueError, match=message):
        check_settings(changed(config, algorithm="allreduce", optimizer="gossip_adamw"))
    check_settings(changed(config, algorithm="local_sgd", optimizer="gossip_adamw"))


# ---- the command line ----


@LOAD_MODULE
def test_none_on_the_command_line_is_what_the_config_calls_none(tmp_path, monkeypatch):
    path = tmp_path / "own.py"
    path.write_text(
        "from experiments.configs import fashion_mnist\n\ndef get_config():\n    config = fashion_mnist.get_config()\n"
        "    config.crossover.in_flight = 2\n    return config\n"
    )
    arguments = [f"--config={path}", "--config.crossover.wire=int8", "--config.crossover.in_flight=None"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])  # where ml_collections looks for keys of the config
    flags.parse_flags(sys.argv)
    assert (flags.CONFIG.value.crossover.wire, flags.CONFIG.value.crossover.in_flight) == ("int8", None)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.seed=None", r"`config\.seed` must have a value, got None\."),
        (
            "--config.algorithm.name=sgp",
            r"`config\.algorithm` is a name, .*--config\.algorithm=NAME; .*\.algorithm\.name=sgp",
        ),
        (
            "--config.optimizer.momentum=0",
            r"`config\.optimizer` is a name, .* as in --config\.NAME\.momentum, got .*=0\.",
        ),
    ],
)
def test_a_key_without_a_value_or_below_a_name_is_one_line(argument, message, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: {message}") as error:
        flags.parse_flags(["train.py", f"--workdir={tmp_path}", argument])
    assert "\n" not in error.value.code


@pytest.mark.parametrize("way", [["-m", "experiments.train"], ["experiments/preflight.py"]], ids=" ".join)
def test_as_a_script_and_as_a_module_a_misspelt_key_is_one_line(way, tmp_path):
    """A script is started from another folder: what it imports lies beside it, not where one stands."""
    script = [os.fspath(ROOT / way[0])] if len(way) == 1 else way
    done = subprocess.run(
        [sys.executable, *script, f"--workdir={tmp_path}", "--config.schedule.learnig_rate=1"],
        cwd=tmp_path if len(way) == 1 else ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        'error: unknown key in --config: learnig_rate; Did you mean "learning_rate" instead of "learnig_rate"?'
    ]


def test_a_key_that_is_younger_than_a_checkpoint_had_its_default_there(config):
    now = settings.as_json(config)
    was = {key: value for key, value in now.items() if key not in ("period", "clip_norm")}
    resume.check_config(was, now, resume.SAME)
    for key, value in (("period", 4), ("clip_norm", 1.0)):
        with pytest.raises(ValueError, match=f"in its checkpoint {key} is .*, not {value}"):
            resume.check_config(was, now | {key: value}, resume.SAME)
