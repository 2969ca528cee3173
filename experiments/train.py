"""Train a model by AllReduce-SGD, SGP, Crossover-SGD or one of their kin, on a mesh or simulated on one device.

python experiments/train.py --config=experiments/configs/fashion_mnist.py --workdir=runs/fashion_mnist
"""

import contextlib
import itertools
import pathlib
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # as a script, not only as a module

import crossover_jax as cj
from experiments import data, processes, report
from experiments.evaluate import make_evaluate
from experiments.program import (
    check_settings,
    fingerprint,
    make_program,
    place_workers,
    settings,
    train_batches,
    wire_bytes_per_step,
)
from experiments.step import Diverged, TrainState, fetch

PyTree = Any
DEFAULT_CONFIG = pathlib.Path(__file__).parent / "configs/fashion_mnist.py"
CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"The experiment, a Python file; default {DEFAULT_CONFIG.name}."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where metrics, events, curves and logs go.")
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


def train(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, *, devices: Sequence[jax.Device] | None = None
) -> tuple[TrainState, list[report.Row]]:
    """Run the experiment on `devices` (default: all); the workers' last state and the rows of metrics.

    Raises `ValueError` for settings that do not fit together, `data.DataMissing` and `Diverged`.
    """
    began = time.perf_counter()
    with processes.agreement() as fields:  # at once, not after minutes of reading data
        workdir = report.new_workdir(workdir)
        processes.log_to(workdir)
        fields |= settings(config)
    with processes.agreement() as fields:
        check_settings(config)
        where = place_workers(config, jax.devices() if devices is None else devices)
        sequence = config.dataset.sequence
        load = partial(data.load, config.dataset.name, data_dir=config.dataset.data_dir, sequence=sequence)
        train_set, eval_set = load(config.dataset.train_split), load(config.dataset.eval_split)
        steps_per_epoch = len(train_set) / config.batch_size
        num_steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
        program = make_program(config, train_set, where, num_steps)
        fields |= fingerprint(config, program, train_set, eval_set)

    # Data, state and step
    batches = map(program.place_batch, train_batches(config, train_set, program.batch_part))
    eval_batches = partial(data.eval_batches, eval_set, batch_size=config.eval_batch_size)
    state = cj.copies(program.init, where, specs=program.specs)
    cj.check_copies(state)
    evaluate = make_evaluate(
        lambda *args: program.apply(*args, train=False)[0], program.algorithm, where, program.specs
    )
    first = next(batches)
    compiled_step = program.step.lower(state, first, program.place_step(0)).compile()
    setup = time.perf_counter() - began
    many = f"{jax.process_count()} processes, {jax.device_count()} devices, " if jax.process_count() > 1 else ""
    processes.say(f"{many}set up in {setup:.0f} s; training {num_steps} steps")

    # Train
    log = report.Log(
        workdir if processes.is_first() else None,
        title=f"{config.algorithm.name}, {config.num_workers} workers, {config.model.name} on {config.dataset.name}",
        num_steps=num_steps,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        wire_bytes_per_step=wire_bytes_per_step(program.algorithm, program.shapes.params, config),
    )
    with contextlib.closing(log), jax.transfer_guard("disallow"):
        unread: list[PyTree] = []
        for step, batch in enumerate(itertools.islice(itertools.chain([first], batches), num_steps), start=1):
            state, metrics = compiled_step(state, batch, program.place_step(step - 1))
            # One step late: the device has the next to work on, and no more than two batches wait on it.
            jax.block_until_ready(unread[-1:])
            unread.append(metrics)
            log.tick()
            evaluates = step == num_steps or is_due(step, config.eval_every * steps_per_epoch)
            if evaluates or step % config.log_every == 0:
                values, unread = fetch(step - len(unread) + 1, unread), []
                log.row(step, values, partial(evaluate, step, state, eval_batches()) if evaluates else None)

    processes.say(report.table(results(config, log, setup)))
    return state, log.rows


def is_due(step: int, every: float) -> bool:
    """Whether `step` is the first at or behind a multiple of `every`.

    >>> [step for step in range(1, 8) if is_due(step, 2.5)]
    [3, 5]
    """
    return step // every > (step - 1) // every


def results(config: ml_collections.ConfigDict, log: report.Log, setup: float) -> dict[str, str]:
    """The table at the end of a run."""
    row, seconds = log.rows[-1], log.seconds
    return {
        "algorithm": f"{config.algorithm.name}, {config.num_workers} workers",
        "steps": f"{row['step']} of {config.batch_size} examples, {row['epoch']:.2f} epochs",
        "accuracy, averaged model": f"{row['eval/mean/accuracy']:.4f}",
        "accuracy, workers": f"{row['eval/workers/accuracy']:.4f}, from {row['eval/workers/accuracy_min']:.4f} "
        f"to {row['eval/workers/accuracy_max']:.4f}",
        "consensus distance": f"{row['consensus_distance']:.4f}",
        "sent per worker and step": f"{row['wire_bytes_per_step'] / 1e6:.3f} MB",
        "time": f"set-up {setup:.0f} s, training {seconds['training']:.0f} s, evaluation {seconds['evaluation']:.0f} s",
    }


def main(argv: list[str]) -> None:
    """A user's mistake is one sentence (its traceback with --verbosity=1), anything else a traceback."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TFDS reports each file that it reads
    if WORKDIR.value is None:
        sys.exit("error: --workdir must name the folder for metrics, events and curves.")
    try:
        processes.join(
            COORDINATOR.value,
            NUM_PROCESSES.value,
            PROCESS_ID.value,
            distributed=DISTRIBUTED.value,
            initialization_timeout=INITIALIZATION_TIMEOUT.value,
            heartbeat_timeout=HEARTBEAT_TIMEOUT.value,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        train(CONFIG.value, WORKDIR.value)
    except (ValueError, data.DataMissing, Diverged, processes.Disagreement) as error:
        logging.debug("", exc_info=True)
        processes.leave(f"error: {error}")
    except KeyboardInterrupt:
        processes.leave(130)
    except Exception:
        if jax.process_count() == 1:
            raise
        processes.leave(traceback.format_exc())


def parse_flags(argv: list[str]) -> list[str]:
    """absl's own, but what is wrong with the config is one line, a misspelt key with its near miss."""
    if not any(arg.split("=")[0].lstrip("-") == "config" for arg in argv):
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        argv = flags.FLAGS(argv)
        CONFIG.value.lock()  # a file that cannot be read complains at its first use
        return argv
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError) as error:  # ml_collections' hint is on a second, sometimes escaped line
        key, *hint = str(error.args[0]).replace("\\n", "\n").replace("\\'", "").replace("'", "").splitlines()
        sys.exit(f"error: unknown key in --config: {'; '.join([key, *hint])}")
    except Exception as error:  # of the config file, which may do anything
        sys.exit(f"error: --config cannot be loaded: {type(error).__name__}: {str(error).splitlines()[-1].strip()}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
