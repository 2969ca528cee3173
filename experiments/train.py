"""Train a model by AllReduce-SGD, SGP, Crossover-SGD or one of their kin, on a mesh or simulated on one device.

python -m experiments.train --config=experiments/configs/fashion_mnist.py --workdir=runs/fashion_mnist
"""

import contextlib
import itertools
import json
import math
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import app, logging
from absl import flags as absl_flags

if not __package__:  # `python experiments/train.py`: import from the folder above, as `-m experiments.train` does
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import crossover_jax as cj
from experiments import checkpoint, data, flags, processes, report, tracking
from experiments.checkpoint import Checkpoints, NotSaved
from experiments.evaluate import make_evaluate
from experiments.profiling import Profile
from experiments.program import (
    Program,
    make_program,
    place_workers,
    steps_of,
    tokens_per_example,
    train_batches,
    wire_bytes_per_step,
)
from experiments.resume import SAME, Resume, Start, first_or_restored
from experiments.settings import as_json, check_settings, device_counts, fingerprint, run_identity, versions
from experiments.step import Diverged, TrainState, fetch
from experiments.workdir import CONFIG, locked, open_workdir, require_no_rows, rewrite

PyTree = Any


class Preempted(Exception):
    """The run was asked to end, and can be resumed."""


class Job(NamedTuple):
    """What a run needs beside its state."""

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    program: Program
    step: Callable  # compiled
    batches: Callable[[int, int], Iterator[PyTree]]  # (first step, rollbacks) ->
    evaluate: Callable[[int, TrainState], report.Row]
    num_steps: int
    steps_per_epoch: float
    provenance: dict[str, Any]  # versions, and digests of what the settings became


def train(
    config: ml_collections.ConfigDict,
    workdir: str | pathlib.Path,
    *,
    devices: Sequence[jax.Device] | None = None,
    resume: Resume = SAME,
    profile: bool = False,
    wandb: str | None = None,
) -> tuple[TrainState, list[report.Row]]:
    """Run the experiment on `devices` (default: all); the workers' last state and the rows of metrics.

    Where `workdir` has checkpoints of this config, the run goes on behind the newest whole one. Raises `ValueError` for
    settings that do not fit together or not what the checkpoints were made with, `data.DataMissing`, `Diverged`,
    `NotSaved` and `report.Unwritten` where nothing would be left, and `Preempted` after SIGTERM.
    """
    began = time.perf_counter()
    if wandb is not None:
        tracking.library()  # or the mistake would come after the set-up
    with contextlib.ExitStack() as stack:
        workdir = open_run(config, workdir, stack)
        job, start_from = set_up(config, workdir, devices, resume)
        start, attempt = start_from(), 0
        if start.step > job.num_steps:
            raise ValueError(
                f"`config.steps` must be at least the {start.step} that the run in `workdir` has behind it, got "
                f"{job.num_steps}."
            )
        if start.step % config.period:
            raise ValueError(
                f"`config.period` must divide the {start.step} steps that the run in `workdir` has behind it, got "
                f"{config.period}."
            )
        setup = time.perf_counter() - began
        many = f"{jax.process_count()} processes, {jax.device_count()} devices, " if jax.process_count() > 1 else ""
        behind = f" behind step {start.step}" if start.step else ""
        processes.say(f"{many}set up in {setup:.0f} s; training {job.num_steps - start.step} steps{behind}")
        while True:
            try:
                state, log = run(job, start, profile, wandb)
                break
            except Diverged as error:
                attempt = max(attempt, start.rollbacks) + 1
                if config.on_nan == "stop" or attempt > config.max_rollbacks or not checkpoint.steps(workdir):
                    raise
                start = start_from()._replace(rollbacks=attempt)
                processes.say(f"WARNING: {error}\nrollback {attempt} to step {start.step}, the data in another order")

    if log.rows:  # none on the other processes of a run that had ended
        processes.say(report.table(results(config, log, setup)))
    return state, log.rows


def open_run(
    config: ml_collections.ConfigDict, workdir: str | pathlib.Path, stack: contextlib.ExitStack
) -> pathlib.Path:
    """The folder, which is this run's alone until `stack` ends; all processes agree on config, code and versions."""
    with processes.agreement() as fields:  # at once, not after minutes of reading data
        fields |= run_identity(config)
        folder = open_workdir(workdir)
        if processes.is_first():
            stack.enter_context(locked(folder))
        processes.log_to(folder)
        fields["checkpoints"] = checkpoint.steps(folder)
        if not fields["checkpoints"] or config.checkpoint.every is None:
            require_no_rows(folder)
    return folder


def set_up(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, devices: Sequence[jax.Device] | None, resume: Resume
) -> tuple[Job, Callable[[], Start]]:
    """The job with its compiled step, and where it starts from; all processes agree on what the settings become."""
    with processes.agreement() as fields:
        check_settings(config)
        workers = place_workers(config, jax.devices() if devices is None else devices)
        sequence = config.dataset.sequence
        load = partial(data.load, config.dataset.name, data_dir=config.dataset.data_dir, sequence=sequence)
        train_set, eval_set = load(config.dataset.train_split), load(config.dataset.eval_split)
        num_steps = steps_of(config, train_set)
        program = make_program(config, train_set, workers, num_steps)
        fields |= fingerprint(config, program, train_set, eval_set)
    provenance = {**versions(), **fields, "devices of each process": device_counts()}

    def batches(first_step: int, rollbacks: int) -> Iterator[PyTree]:
        single = train_batches(config, train_set, program.batch_part, first_step, rollbacks)
        return map(program.place_batch, iter(lambda: list(itertools.islice(single, config.period)), []))

    def evaluate(step: int, state: TrainState) -> report.Row:
        row = evaluate_on(step, state, data.eval_batches(eval_set, batch_size=config.eval_batch_size))
        if tokens_per_example(config) is not None:  # the classes of text are bytes
            row["bits_per_byte"] = row["eval/mean/loss"] / math.log(2)
        return row

    evaluate_on = make_evaluate(program.predict, program.algorithm, workers, program.specs)
    like = cj.abstract_copies(program.shapes, workers, specs=program.specs)
    step = program.step.lower(like, next(batches(0, 0)), program.place_step(0)).compile()
    per_epoch = len(train_set) / config.batch_size
    job = Job(config, workdir, program, step, batches, evaluate, num_steps, per_epoch, provenance)
    return job, partial(first_or_restored, workdir, config, program, train_set, workers, provenance, resume)


def run(job: Job, start: Start, profile: bool, wandb: str | None) -> tuple[TrainState, report.Log]:
    """All steps from `start` on. Raises `Diverged` and, after SIGTERM, `Preempted`."""
    config, program, workdir = job.config, job.program, job.workdir
    title = f"{config.algorithm}, {config.num_workers} workers, {config.model.name} on {config.dataset.name}"
    tracks = wandb is not None and processes.is_first()
    log = report.Log(
        workdir if processes.is_first() else None,
        title=title,
        num_steps=job.num_steps,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        tokens_per_example=tokens_per_example(config),
        steps_per_epoch=job.steps_per_epoch,
        wire_bytes_per_step=wire_bytes_per_step(program.algorithm, program.shapes.params, config),
        first_step=start.step,
        state=start.log,
        wandb=tracking.Wandb(wandb, workdir, title, as_json(config)) if tracks else None,
    )
    if processes.is_first():
        with report.saying(CONFIG):
            rewrite(workdir / CONFIG, json.dumps(as_json(config), indent=1))
    every, state, best = config.checkpoint.every, start.state, start.best
    with (
        contextlib.closing(log),
        contextlib.closing(Profile(workdir, start.step, is_wanted=profile)) as recording,
        jax.transfer_guard("disallow"),
        processes.Preemption() as preemption,
    ):
        saves = Checkpoints(workdir, config.checkpoint.keep, best and best[0]) if every else None

        def save(step: int) -> None:
            if saves is not None:
                record = {
                    "examples": step * config.batch_size,
                    "rollbacks": start.rollbacks,
                    "num_workers": config.num_workers,
                    "config": as_json(config) | {"data": job.provenance["data"]},
                    "provenance": job.provenance,
                    "best": best,
                    "log": log.state(),
                }
                saves.save(step, state, record, is_best=best is not None and best[0] == step)

        with contextlib.closing(saves) if saves is not None else contextlib.nullcontext():
            if start.step == 0 and saves is not None and saves.last is None:
                save(0)  # before the first row: metrics without a checkpoint belong to no config
                saves.wait()
            unread: list[PyTree] = []
            period = config.period
            ends_of_periods = range(start.step + period, job.num_steps + 1, period)
            for step, batch in zip(ends_of_periods, job.batches(start.step, start.rollbacks), strict=False):
                with recording.named(step):
                    state, metrics = job.step(state, batch, program.place_step(step - period))
                recording.end(step, metrics)
                # One period late: the device has the next to work on, and batches of no more than two wait on it.
                jax.block_until_ready(unread[-1:])
                unread.append(metrics)
                log.tick(period)
                ends = preemption.reached(step)
                evaluates = step == job.num_steps or is_due(step, config.eval_every * job.steps_per_epoch, period)
                has_row = evaluates or is_due(step, config.log_every, period)
                is_saved = ends or step == job.num_steps or (every and is_due(step, every, period))
                if has_row or is_saved:
                    log.add(fetch(step - period * len(unread) + 1, unread, program.leaves))
                    unread = []
                if has_row:
                    row = log.row(step, partial(job.evaluate, step, state) if evaluates else None)
                    if evaluates and (best is None or goodness(row) > best[1]):
                        best, is_saved = (step, goodness(row)), True
                if is_saved:
                    save(step)
                if ends and step < job.num_steps:
                    raise Preempted(f"ended at step {step} of {job.num_steps} by SIGTERM: {left(saves, step)}")
            if saves is not None:
                saves.wait()
        log.end()
    return state, log


def left(saves: Checkpoints | None, step: int) -> str:
    """What a run that ends early leaves behind."""
    if saves is None:
        return "without checkpoints (`config.checkpoint.every` is None) nothing of it is left."
    if saves.wait():
        return "the same command goes on from there."
    return f"the same command goes on from step {saves.last}, that of step {step} could not be saved."


def goodness(row: report.Row) -> float:
    """How good the averaged model is, the more the better: its accuracy, of text minus its bits per byte."""
    return -row["bits_per_byte"] if "bits_per_byte" in row else row["eval/mean/accuracy"]


def is_due(step: int, every: float, period: int = 1) -> bool:
    """Whether `step`, the last of a period, is the first such at or behind a multiple of `every`.

    >>> [step for step in range(1, 8) if is_due(step, 2.5)]
    [3, 5]
    """
    return step // every > (step - period) // every


def results(config: ml_collections.ConfigDict, log: report.Log, setup: float) -> dict[str, str]:
    """The table at the end of a run."""
    row, seconds = log.rows[-1], log.seconds
    of_text = {}
    if "bits_per_byte" in row:
        of_text = {
            "bits per byte, averaged model": f"{row['bits_per_byte']:.4f}",
            "sent per worker and token": f"{row['wire_bytes_per_token']:.1f} bytes",
            "tokens per second": f"{row['tokens_per_second']:.0f}",
        }
    return {
        "algorithm": f"{config.algorithm}, {config.num_workers} workers",
        "steps": f"{row['step']} of {config.batch_size} examples, {row['epoch']:.2f} epochs",
        "accuracy, averaged model": f"{row['eval/mean/accuracy']:.4f}",
        "accuracy, workers": f"{row['eval/workers/accuracy']:.4f}, from {row['eval/workers/accuracy_min']:.4f} "
        f"to {row['eval/workers/accuracy_max']:.4f}",
        "consensus distance": f"{row['consensus_distance']:.4f}",
        "sent per worker and step": f"{row['wire_bytes_per_step'] / 1e6:.3f} MB",
        **of_text,
        "time": f"set-up {setup:.0f} s, training {seconds['training']:.0f} s, evaluation {seconds['evaluation']:.0f} s",
    }


def main(argv: list[str]) -> None:
    """A user's mistake is one sentence (its traceback with --verbosity=1), anything else a traceback."""
    del argv
    if not absl_flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # TFDS reports each file that it reads
    if flags.WORKDIR.value is None:
        sys.exit("error: --workdir must name the folder for metrics, events and curves.")
    try:
        flags.join_processes()
    except ValueError as error:
        sys.exit(f"error: {error}")
    try:
        train(
            flags.CONFIG.value,
            flags.WORKDIR.value,
            resume=Resume(flags.RESUME_WORKERS.value, flags.ALLOW_CONFIG_CHANGE.value),
            profile=flags.PROFILE.value,
            wandb=flags.WANDB.value,
        )
    except Preempted as error:
        processes.say(str(error))
        sys.exit(processes.PREEMPTED)  # a regular exit, for which all processes wait
    except (ValueError, data.DataMissing, Diverged, NotSaved, report.Unwritten, processes.Disagreement) as error:
        logging.debug("", exc_info=True)
        processes.leave(f"error: {error}")
    except KeyboardInterrupt:
        processes.leave(130)
    except Exception:
        if jax.process_count() == 1:
            raise
        processes.leave(traceback.format_exc())


if __name__ == "__main__":
    app.run(main, flags_parser=flags.parse_flags)
