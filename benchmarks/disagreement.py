"""How far apart workers are driven by their own noise, by what they exchange: a linear model of momentum SGD.

    python benchmarks/disagreement.py

64 workers, m <- 0.9 m + noise, x <- x − m, then so many rounds of gossip of x and of m, each with one random shift of
a pool of 12: the mean square of x_i − x̄ per coordinate, in a steady state, and what is sent, in float32 models a step.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import crossover_jax as cj

WORKERS, COORDINATES, STEPS, BETA = 64, 1000, 400, 0.9
INT8 = (1 + 4 / 256) / 4
MESSAGES = {"float32": (1, [(1, 0)]), "bfloat16": (0.5, [(2, 0), (1, 1)]), "int8": (INT8, [(3, 0), (2, 1), (3, 1)])}


def main() -> None:
    pool = cj.latin(WORKERS, 12)
    matrices = [pool.matrix(p) for p in range(pool.num_rounds)]
    print("wire      rounds of x  of m   models sent   mean square")
    for wire, (size, choices) in MESSAGES.items():
        for of_x, of_m in choices:
            found = disagreement(matrices, of_x, of_m)
            print(f"{wire:9} {of_x:11} {of_m:5} {size * (of_x + of_m):13.2f} {found:13.2f}")


def disagreement(matrices: list[np.ndarray], of_x: int, of_m: int) -> float:
    rng = np.random.default_rng(0)
    x, m = np.zeros((2, WORKERS, COORDINATES))
    found = []
    for step in range(STEPS):
        m = BETA * m + rng.normal(size=m.shape)
        x = x - m
        for _ in range(of_m):
            m = matrices[rng.integers(len(matrices))] @ m
        for _ in range(of_x):
            x = matrices[rng.integers(len(matrices))] @ x
        if step >= STEPS // 4:
            found.append(np.square(x - x.mean(0)).mean())
    return float(np.mean(found))


if __name__ == "__main__":
    main()
