"""Real training on hosts with limited links: how long ours and others take to a level of accuracy.

    sudo python -m benchmarks.network.race --form short --out benchmarks/network/results   # goes on where it ended
    python -m benchmarks.network.race --form short --out benchmarks/network/results --table

Contenders are those of `contenders/in_jax.py`, ours, and of `contenders/in_torch.py`, from `pip install -e '.[peers]'`.
All have the same model, data, batches, schedule and seeds. On a machine of few cores a run on N limited hosts takes
hours, so a time is a product:

    steps     to the level, without limited links: of ours simulated in one process, of others on hosts. The learning
              rate is that of fewest steps on held-out examples, among the task's, with seed 0; then other seeds
    seconds   of a step, on hosts with limited links. `wait` is a timed wait in each step, which stands for a gradient;
              of PyTorch's a third is in the forward pass and the rest spread over the layers of the backward pass
    whole     some runs end to end, by which the product is checked
    islands   runs end to end of islands, for a product cannot say how long they take; the learning rate is that of
              `int8`, the same exchange on a mesh

Each is a CSV, race_steps.csv and so on. Evaluations are not counted. `--table` also has what `plan` predicts.
"""

import argparse
import contextlib
import itertools
import json
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from benchmarks.network import hosts
from benchmarks.network.contenders import in_jax, tasks
from benchmarks.network.contenders.tasks import Task, is_peer, period_of
from benchmarks.network.hosts import bits_per_second
from benchmarks.network.race_results import (
    BASES,
    COLUMNS,
    FORMS,
    Form,
    Results,
    best_of,
    is_reached,
    predict,
    without_warmup,
)
from benchmarks.rows import append_rows


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, default="short")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the CSVs; what they have is kept")
    parser.add_argument("--data_dir", default="data", help="where Fashion-MNIST is, or is put")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/race"), help="for the tasks' files")
    parser.add_argument("--only", choices=COLUMNS, help="one of the three kinds of measurements")
    parser.add_argument("--contenders", help="only these, separated by commas")
    parser.add_argument("--links", help="only these, separated by commas")
    parser.add_argument("--waits", help="only these, separated by commas")
    parser.add_argument("--seeds", type=int, help="of the runs on test examples, for `steps`")
    parser.add_argument("--slowness", type=float, help="how many times as long host 0 computes, for `seconds`")
    parser.add_argument("--table", action="store_true", help="print what there is instead of measuring")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    form = FORMS[args.form]
    for name, kind in (("contenders", str), ("links", str), ("waits", float)):
        if text := getattr(args, name):
            form = form._replace(**{name: tuple(map(kind, text.split(",")))})
    form = form._replace(slowness=args.slowness or form.slowness, seeds=args.seeds or form.seeds)
    race = Race(form, args.out, args.folder)
    if args.table:
        print(race.as_text())
        return
    try:
        for name in form.tasks:
            tasks.prepare(args.folder, name, args.data_dir)
        hosts.enter()
        for name in form.tasks:
            for kind in [args.only] if args.only else COLUMNS:
                getattr(race, f"measure_{kind}")(name)
    except (hosts.Missing, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")


class Race(Results):
    """The measurements of a form."""

    def __init__(self, form: Form, out: pathlib.Path, folder: pathlib.Path):
        super().__init__(form, out)
        self.folder = folder
        out.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **values: object) -> None:
        row = {"hosts": self.form.hosts, **values}
        print(kind, *row.values(), flush=True)
        append_rows(self.out / f"race_{kind}.csv", COLUMNS[kind], [row])

    def run(self, link: str | None, **job: object) -> list[dict]:
        """What each host says of a job."""
        job = {"hosts": self.form.hosts, "folder": str(self.folder), "changed": self.form.changed or {}, **job}
        program = [sys.executable, "-m", "benchmarks.network.contenders.host"]
        commands = [[*program, json.dumps(job), "--host", str(i)] for i in range(self.form.hosts)]
        env = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONWARNINGS": "ignore"}
        burst = max(hosts.BURST, int(hosts.BURST_S * bits_per_second(link) / 8)) if link else hosts.BURST
        outputs = hosts.run(commands, rate=link, burst=burst, env=env, timeout=3600)
        return [json.loads(text.splitlines()[-1]) for text in outputs]

    def evaluate(self, name: str, part: str) -> Callable[[np.ndarray], float]:
        """The score of a model's vector on a part of a task's examples."""
        return in_jax.make_evaluate(self.task(name), tasks.read(self.folder, name, part))

    @contextlib.contextmanager
    def trained(
        self, name: str, link: str | None, runs: Sequence[tuple[int, float]], evaluations: int, **job: object
    ) -> Iterator[tuple[list[dict], np.ndarray]]:
        """What each host says of runs, and their models, `[runs, evaluations, hosts, parameters]`."""
        with tempfile.TemporaryDirectory(dir=hosts.FOLDER) as folder:
            path = pathlib.Path(folder, "models.npy")
            shape = (len(runs), evaluations, self.form.hosts, tasks.num_params(self.task(name)))
            np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
            outputs = self.run(link, task=name, runs=runs, models=str(path), **job)
            yield outputs, np.load(path, mmap_mode="r")

    # Steps to the level

    def measure_steps(self, name: str) -> None:
        task = self.task(name)
        for contender in self.form.contenders:
            tuning = [(0, rate) for rate in task.rates]
            self._train(name, contender, "validation", tuning)
            final = [(seed, self.best_rate(name, contender)) for seed in range(1, 1 + self.form.seeds)]
            self._train(name, contender, "test", final)

    def _train(self, name: str, contender: str, part: str, runs: list[tuple[int, float]]) -> None:
        task, same = self.task(name), {"task": name, "contender": contender, "part": part}
        runs = [run for run in runs if not self.rows("steps", **same, seed=run[0], learning_rate=run[1])]
        if not runs:
            return
        evaluate = self.evaluate(name, part)
        for (seed, rate), models in zip(runs, self._models(name, contender, runs), strict=True):
            scores, is_there = [], False
            for model in models:  # a simulation goes on as it is asked to
                scores.append(evaluate(model))
                if is_there := is_reached(scores[-1], task):
                    break
            steps = len(scores) * task.every if is_there else ""
            best = best_of(scores, task)
            values = {"learning_rate": rate, "seed": seed, "steps": steps, "best": f"{best:.4f}"}
            self.add("steps", **same, **values)

    def _models(self, name: str, contender: str, runs: list[tuple[int, float]]) -> Iterator[Iterable[np.ndarray]]:
        """The averaged models of each run's evaluations."""
        task = self.task(name)
        if not is_peer(contender):
            yield from self._simulated(name, contender, runs)
            return
        job = {"kind": "train", "contender": contender, "steps": task.steps, "wait": 0.0}
        with self.trained(name, None, runs, task.steps // task.every, **job) as (_, models):
            for run in models:
                yield (evaluation.mean(0) for evaluation in run)

    def _simulated(self, name: str, contender: str, runs: list[tuple[int, float]]) -> Iterator[Iterator[np.ndarray]]:
        task, n = self.task(name), self.form.hosts
        examples = tasks.read(self.folder, name, "train")
        made = in_jax.Contender(contender, task, n, n)

        def averages(seed: int, rate: float) -> Iterator[np.ndarray]:
            made.begin(seed, rate)
            for t in range(task.steps):
                made.step(t, tasks.batch_of(examples, task, seed, t, range(n), n))
                if (t + 1) % task.every == 0:
                    yield made.vectors().mean(0)

        return (averages(*run) for run in runs)

    # Seconds of a step

    def measure_seconds(self, name: str) -> None:
        for link in self.form.links:
            for of_peers in (False, True):
                names = [c for c in self.form.contenders if is_peer(c) == of_peers]
                self._time(name, link, [BASES[of_peers], *names] if names else [])

    def _time(self, name: str, link: str, names: list[str]) -> None:
        """One job of all contenders that lack a row; of DDP's first steps the seconds are DDP's own."""
        names = [without_warmup(text) for text in names]
        same = {"task": name, "link": link, "slowness": self.form.slowness}
        missing = [
            c for c in names if any(not self.rows("seconds", contender=c, wait=w, **same) for w in self.form.waits)
        ]
        if not missing:
            return
        task = self.task(name)
        counts = [self.count(task, c, link) for c in missing]
        job = {"kind": "time", "task": name, "contenders": missing, "waits": self.form.waits}
        job |= {"periods": [(period_of(c), count) for c, count in zip(missing, counts, strict=True)]}
        if self.form.slowness != 1:
            job |= {"slow_host": 0, "slowness": self.form.slowness}
        outputs = self.run(link, **job)
        for i, contender in enumerate(missing):
            for j, wait in enumerate(self.form.waits):
                seconds = max(host["seconds"][i][j] for host in outputs)
                frames = statistics.mean(host["frames"][i][j] for host in outputs)
                values = {"contender": contender, "wait": wait, "count": counts[i], "step_s": f"{seconds:.5f}"}
                self.add("seconds", **same, **values, frame_bytes=round(frames))

    def count(self, task: Task, contender: str, link: str) -> int:
        """Steps to time: 20, or two whole periods; over slow links fewer, half a minute's, but four."""
        every, n = period_of(contender), self.form.hosts
        if every > 1:
            return every * max(2, math.ceil(20 / every))
        return max(4, min(20, int(30 / predict(contender, task, n, link, max(self.form.waits)))))

    # Runs end to end

    def measure_whole(self, name: str) -> None:
        """To the step at which the run without limited links reached the level, with the same seed and rate."""
        task = self.task(name)
        for contender, link, wait in self.form.whole if name == "images" else ():
            same = {"task": name, "contender": contender, "link": link, "wait": wait}
            found = self.rows("steps", task=name, contender=contender, part="test", seed=1)
            if self.rows("whole", **same) or not found or not found[0]["steps"]:
                continue
            steps, rate = int(found[0]["steps"]), float(found[0]["learning_rate"])
            job = {"kind": "train", "contender": contender, "steps": steps, "wait": wait}
            job |= {"warmup": max(2, period_of(contender))}
            with self.trained(name, link, [(1, rate)], steps // task.every, **job) as (outputs, models):
                score = self.evaluate(name, "test")(models[0, -1].mean(0))
            seconds = max(host["seconds"][0][-1] for host in outputs)
            values = {"learning_rate": rate, "seed": 1, "steps": steps, "seconds": f"{seconds:.2f}"}
            self.add("whole", **same, **values, score=f"{score:.4f}")

    # Islands

    def measure_islands(self, name: str) -> None:
        """To the level, or to the end of the schedule: what the clock counts are steps of all hosts together."""
        task = self.task(name)
        for contender in self.form.islands:
            for link, wait, seed in itertools.product(self.form.links, self.form.waits, range(1, 1 + self.form.seeds)):
                same = {"task": name, "contender": contender, "link": link, "wait": wait, "seed": seed}
                same |= {"slowness": self.form.slowness}
                if self.rows("islands", **same):
                    continue
                rate = self.best_rate(name, "int8")
                job = {"kind": "islands", "contender": contender, "wait": wait, "slow_host": 0}
                job |= {"slowness": self.form.slowness}
                with self.trained(name, link, [(seed, rate)], task.steps // task.every, **job) as (outputs, models):
                    evaluate = self.evaluate(name, "test")
                    scores = [evaluate(evaluation.mean(0)) for evaluation in models[0]]
                at = next((i for i, score in enumerate(scores) if is_reached(score, task)), None)
                seconds = "" if at is None else f"{max(host['seconds'][0][at] for host in outputs):.2f}"
                values = {"learning_rate": rate, "steps": "" if at is None else (at + 1) * task.every}
                self.add("islands", **same, **values, seconds=seconds, best=f"{best_of(scores, task):.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
