"""The flags of `train.py`, which the preflight and the launcher read too, and how a command line becomes a config."""

import pathlib
import re
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from experiments import processes
from experiments.configs import default
from experiments.resume import MATRICES
from experiments.settings import flat_settings

DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs/fashion_mnist.py"
CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"The experiment, a Python file; default {DEFAULT_CONFIG.name}."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where metrics, curves, logs and checkpoints go; a run that it holds goes on."
)
RESUME_WORKERS = flags.DEFINE_enum(
    "resume_workers",
    None,
    list(MATRICES),
    "How a run resumes with another number of workers: neighbours averaged or copied, or all from everybody's average.",
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_list(
    "allow_config_change", [], "Keys of the config that may differ from the run in --workdir."
)
PROFILE = flags.DEFINE_bool("profile", False, "Record steps 10 to 15 in WORKDIR/profile, for TensorBoard or Perfetto.")
WANDB = flags.DEFINE_string("wandb", None, "A project of Weights & Biases for the metrics, too: pip install wandb.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, for many processes started by hand.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0, with --coordinator.")
DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "yes", "no"],
    "Join other processes: yes lets JAX find the cluster (TPU pods, Slurm, Open MPI, Kubernetes), auto does so where "
    "Slurm or Open MPI started several tasks.",
)
INITIALIZATION_TIMEOUT = flags.DEFINE_integer("initialization_timeout", 300, "Seconds to wait for all processes.")
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds without a sign of life after which a process is dead, and all others end."
)


def join_processes() -> None:
    """`processes.join` as the flags say."""
    processes.join(
        COORDINATOR.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        distributed=DISTRIBUTED.value,
        initialization_timeout=INITIALIZATION_TIMEOUT.value,
        heartbeat_timeout=HEARTBEAT_TIMEOUT.value,
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's own, but what is wrong with the config is one line, a misspelt key with its near miss."""
    argv, left_out = split_none(argv)
    if not any(arg.split("=")[0].lstrip("-") == "config" for arg in argv):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        argv = flags.FLAGS(argv)
        CONFIG.value.update_from_flattened_dict(dict.fromkeys(left_out))
        CONFIG.value.lock()  # a file that cannot be read complains at its first use
        return argv
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError) as error:  # ml_collections' hint is on a second, sometimes escaped line
        key, *hint = str(error.args[0]).replace("\\n", "\n").replace("\\'", "").replace("'", "").splitlines()
        sys.exit(f"error: unknown key in --config: {'; '.join([key, *hint])}")
    except Exception as error:  # of the config file, which may do anything
        sys.exit(f"error: --config cannot be loaded: {type(error).__name__}: {str(error).splitlines()[-1].strip()}")


def split_none(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments, without those that set a key of the config to None; and these keys.

    ml_collections parses a value by the type of its key, and None would be a word or no number. Ends the process with
    one line for a key that cannot be left out, and for one below a name.

    >>> split_none(["train.py", "--config.steps=None", "--config.seed=1"])
    (['train.py', '--config.seed=1'], ['steps'])
    """
    optional = {name for name, value in flat_settings(default.get_config()).items() if value is None}
    kept, left_out = [], []
    for arg in argv:
        if found := re.match(r"--?config\.(algorithm|optimizer)\.(\w+)", arg):
            choice, key = found.groups()
            sys.exit(
                f"error: `config.{choice}` is a name, as in --config.{choice}=NAME; its keys are in a group of that "
                f"name, as in --config.NAME.{key}, got {arg}."
            )
        if not (found := re.fullmatch(r"--?config\.([\w.]+)=None", arg)):
            kept.append(arg)
        elif found[1] in optional:
            left_out.append(found[1])
        elif found[1] in flat_settings(default.get_config()):
            sys.exit(f"error: `config.{found[1]}` must have a value, got None.")
        else:
            kept.append(arg)  # an option of a model, or a misspelt key
    return kept, left_out
