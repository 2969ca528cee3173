"""Does a run go on as well on another number of workers? Paired over seeds, against the run that was never resized.

    python experiments/resize_test.py --seeds 6 --out resize.csv

Each seed trains N workers to the end; from their checkpoint `--after` steps before it M workers go on. What is compared
is the loss of the averaged model on the test set: same data, same order, same initialisation, same schedule. Cells that
are in the file are not run again.
"""

import argparse
import csv
import itertools
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

import ml_collections
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # as a script, not only as a module

from experiments import checkpoint, train
from experiments.configs import fashion_mnist
from experiments.resume import MATRICES, SAME, Resume

PAIRS = [(8, 4), (4, 8), (8, 1), (1, 8), (8, 6), (6, 8)]
COLUMNS = ["workers", "resumed_on", "how", "seed", "loss", "loss_undisturbed"]
# Student's t, 97.5 %, by degrees of freedom
T = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 15: 2.131, 19: 2.093}


def main(argv: Sequence[str]) -> int:
    """Run what is missing, print a table; 1 if an interval of the differences does not contain 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, choices=[n + 1 for n in T], default=6)
    parser.add_argument("--before", type=int, default=100, help="steps before the checkpoint")
    parser.add_argument("--after", type=int, default=50, help="steps behind it")
    parser.add_argument("--algorithm", default="crossover")
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args(argv)
    rows = read(args.out)
    done = {(int(r["workers"]), int(r["resumed_on"]), r["how"], int(r["seed"])) for r in rows}
    for seed, workers in itertools.product(range(args.seeds), sorted({n for n, _ in PAIRS})):
        wanted = [(n, m, how, seed) for (n, m), how in itertools.product(PAIRS, MATRICES) if n == workers]
        if missing := [cell for cell in wanted if cell not in done]:
            rows += compare(args, workers, seed, missing)
            write(args.out, rows)
    return report(rows, args.seeds)


def compare(args: argparse.Namespace, workers: int, seed: int, cells: list) -> list[dict]:
    """The rows of these cells, all from one checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        undisturbed = loss_of(make_config(args, workers, seed), root / "begun")
        shutil.rmtree(root / "begun" / checkpoint.FOLDER / str(args.before + args.after))

        def resumed(num_workers: int, how: str) -> float:
            shutil.copytree(root / "begun", root / "resumed")
            loss = loss_of(make_config(args, num_workers, seed), root / "resumed", Resume(how))
            shutil.rmtree(root / "resumed")
            return loss

        return [dict(zip(COLUMNS, (*cell, resumed(cell[1], cell[2]), undisturbed), strict=True)) for cell in cells]


def make_config(args: argparse.Namespace, workers: int, seed: int) -> ml_collections.ConfigDict:
    """A perceptron, with batches that 8 and 6 workers divide."""
    config = fashion_mnist.get_config()
    config.seed = config.algorithm.seed = seed
    config.num_workers, config.simulate, config.batch_size = workers, "yes", 240
    config.dataset.data_dir, config.algorithm.name = args.data_dir, args.algorithm
    config.model.name, config.model.options = "mlp", ml_collections.ConfigDict({"hidden": (64,)})
    config.steps, config.eval_every, config.checkpoint.every = args.before + args.after, 100.0, args.before
    return config


def loss_of(config: ml_collections.ConfigDict, workdir: pathlib.Path, resume: Resume = SAME) -> float:
    _, rows = train.train(config, workdir, resume=resume)
    return rows[-1]["eval/mean/loss"]


def report(rows: list[dict], seeds: int) -> int:
    """A table of differences with their 95 % intervals; 1 if one of them does not contain 0."""
    wrong = 0
    print("workers   how       loss, undisturbed   difference, 95 % interval")
    for (n, m), how in itertools.product(PAIRS, MATRICES):
        own = [r for r in rows if (int(r["workers"]), int(r["resumed_on"]), r["how"]) == (n, m, how)][:seeds]
        before = np.array([float(r["loss_undisturbed"]) for r in own])
        difference = np.array([float(r["loss"]) for r in own]) - before
        half = T[len(own) - 1] * difference.std(ddof=1) / np.sqrt(len(own))
        holds = abs(difference.mean()) <= half
        wrong |= not holds
        print(
            f"{n} -> {m}    {how:8}  {before.mean():.4f}              {difference.mean():+.4f} ± {half:.4f}"
            f"{'' if holds else '   does not contain 0'}"
        )
    return int(wrong)


def read(path: pathlib.Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path: pathlib.Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
