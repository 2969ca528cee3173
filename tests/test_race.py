"""The race to a level of accuracy: its models, its contenders and its tiny form."""

import csv
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.network import race_results as race
from benchmarks.network.contenders import in_jax, tasks
from benchmarks.network.race import Race

pytestmark = pytest.mark.tools
ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    "images": tasks.TASKS["images"]._replace(sizes={"in": 6, "hidden": 5, "out": 3}, batch=8),
    "text": tasks.TASKS["text"]._replace(
        sizes={"vocabulary": 11, "width": 8, "layers": 2, "heads": 2, "mlp": 6, "sequence": 5}, batch=8
    ),
}


def examples(task, count=32):
    rng = np.random.default_rng(1)
    if "hidden" in task.sizes:
        inputs = rng.normal(size=(count, task.sizes["in"])).astype(np.float32)
        return tasks.Examples(inputs, rng.integers(task.sizes["out"], size=count))
    shape = (count, task.sizes["sequence"])
    return tasks.Examples(*(rng.integers(task.sizes["vocabulary"], size=shape) for _ in range(2)))


def test_the_hosts_parts_of_a_batch_make_it_up_and_an_epoch_is_all_examples_once():
    task = SMALL["images"]._replace(batch=8)
    found = [tasks.batch_of(examples(task), task, 3, t, range(4), 4) for t in range(4)]
    alone = [tasks.batch_of(examples(task), task, 3, t, range(i, i + 1), 4) for t in range(4) for i in range(4)]
    np.testing.assert_array_equal(np.concatenate([x.inputs for x in found]), np.concatenate([x.inputs for x in alone]))
    seen = np.concatenate([x.inputs.reshape(-1, 6) for x in found])
    np.testing.assert_array_equal(np.unique(seen, axis=0), np.unique(examples(task).inputs, axis=0))


def test_all_reduce_is_momentum_on_one_big_batch():
    """By numpy: a perceptron's gradient by hand."""
    task, n = SMALL["images"], 4
    made = in_jax.Contender("allreduce", task, n, n)
    made.begin(0, 0.1)
    x = {k: v.astype(np.float64) for k, v in tasks.first_values(task, 0).items()}
    trace = {k: np.zeros_like(v) for k, v in x.items()}
    for t in range(3):
        batch = tasks.batch_of(examples(task), task, 0, t, range(n), n)
        made.step(t, batch)
        inputs, labels = batch.inputs.reshape(8, -1), batch.labels.reshape(8)
        hidden = np.maximum(inputs @ x["layer0/kernel"] + x["layer0/bias"], 0)
        scores = np.exp(hidden @ x["layer1/kernel"] + x["layer1/bias"])
        error = (scores / scores.sum(1, keepdims=True) - np.eye(3)[labels]) / 8
        below = (error @ x["layer1/kernel"].T) * (hidden > 0)
        grads = {"layer0/kernel": inputs.T @ below, "layer0/bias": below.sum(0)}
        grads |= {"layer1/kernel": hidden.T @ error, "layer1/bias": error.sum(0)}
        for k, g in grads.items():
            trace[k] = 0.9 * trace[k] + g
            x[k] -= tasks.rate_at(t, task, 0.1) * trace[k]
    np.testing.assert_allclose(made.vectors(), np.tile(tasks.as_vector(x, task), (n, 1)), rtol=1e-4, atol=1e-6)


def test_a_decoder_hears_the_past_only():
    task = SMALL["text"]
    params = tasks.first_values(task, 0)
    x = examples(task).inputs[:1]
    changed = x.copy()
    changed[0, 3] = (x[0, 3] + 1) % 11
    before, after = (np.asarray(in_jax.logits(params, jnp.asarray(y), task)) for y in (x, changed))
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert (before[0, 3:] != after[0, 3:]).any(-1).all()


@pytest.mark.parametrize("name", SMALL)
def test_the_model_of_pytorch_has_the_loss_and_gradient_of_ours(name):
    torch = pytest.importorskip("torch")
    from benchmarks.network.contenders import in_torch

    task = SMALL[name]
    inputs, labels = examples(task)
    loss, grads = jax.value_and_grad(in_jax.loss)(tasks.first_values(task, 0), inputs, labels, task)
    model = in_torch.Model(task, 0)
    output = model(torch.from_numpy(inputs)).flatten(0, -2)
    other = torch.nn.functional.cross_entropy(output, torch.from_numpy(labels).flatten())
    other.backward()
    assert other.item() == pytest.approx(float(loss), rel=1e-5)
    for key, param in model.named_parameters():
        np.testing.assert_allclose(param.grad.numpy(), grads[key], rtol=1e-3, atol=1e-5)


def test_a_step_is_predicted_by_the_bytes_that_it_sends():
    """Payload of the traced program over the link, beside or behind the compute."""
    task, n, compute = tasks.TASKS["images"], 8, 0.05
    for text in ("allreduce", "sgp", "crossover", "rows", "int8", "int8/during", "outer/16", "outer/16/int8"):
        transfer = race.HEADERS * 8 * in_jax.payload_bytes(text, task, n) / 5e6
        expected = max(compute, transfer) if "during" in text else compute + transfer
        assert race.predict(text, task, n, "5mbit", compute) == pytest.approx(expected, rel=0.01), text


def run(*args):
    command = [sys.executable, "-m", "benchmarks.network.race", *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=env, cwd=ROOT)


def rows_of(folder, kind):
    with open(folder / f"race_{kind}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of a task of noise, which no level asks anything of."""
    folder, rng = tmp_path_factory.mktemp("task"), np.random.default_rng(0)
    directions = rng.normal(size=(10, 784))
    for part in tasks.PARTS:
        labels = rng.integers(10, size=4000)
        inputs = (rng.normal(size=(4000, 784)) + 0.3 * directions[labels]).astype(np.float32)
        np.save(folder / f"images-{part}-inputs.npy", inputs)
        np.save(folder / f"images-{part}-labels.npy", labels)
    return folder


@pytest.mark.parametrize("form", ["tiny", "tiny_peers"])
def test_the_tiny_form_measures_every_contender_once(form, folder, tmp_path):
    if form == "tiny_peers":
        pytest.importorskip("torch")
        pytest.importorskip("decent_dp")
    args = ("--form", form, "--out", tmp_path, "--folder", folder)
    done = run(*args)
    if "error: hosts need" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    names = set(race.FORMS[form].contenders)
    steps, seconds = rows_of(tmp_path, "steps"), rows_of(tmp_path, "seconds")
    assert {(row["contender"], row["part"]) for row in steps} == {(n, p) for n in names for p in ("validation", "test")}
    assert names <= {row["contender"] for row in seconds}
    (whole,) = rows_of(tmp_path, "whole")  # to the step that the run without limited links needed
    reached = next(r for r in steps if (r["contender"], r["part"]) == (whole["contender"], "test"))
    assert whole["steps"] == reached["steps"]
    assert float(whole["seconds"]) > 0.01 * int(whole["steps"])
    if form == "tiny":
        (row,) = rows_of(tmp_path, "islands")
        level, wait = race.TINY["level"], 0.01
        assert float(row["best"]) >= level
        assert float(row["seconds"]) > 0.8 * wait * int(row["steps"])  # two hosts that wait at the same time
    task = tasks.TASKS["images"]
    for row in seconds:
        limit = race.predict(row["contender"], task, 2, "50mbit", 0.01)
        assert 0.7 * limit < float(row["step_s"])  # what a link sends in 10 ms passes at once
    if form == "tiny_peers":  # DDP and AllReduce are one algorithm
        by_name = {row["contender"]: row for row in steps if row["part"] == "test"}
        assert float(by_name["ddp"]["best"]) == pytest.approx(float(by_name["int8"]["best"]), abs=0.1)
    again = run(*args)
    assert (again.returncode, again.stdout) == (0, "")
    table = run(*args, "--table").stdout
    assert all(race.SHOWN[name] in table for name in names)


def test_the_time_to_a_level_is_the_product_of_steps_and_seconds(tmp_path):
    """Of PostLocalSGD the first steps are DDP's; a run that does not get there takes for ever."""
    made = Race(race.FORMS["full"], tmp_path, tmp_path)
    for contender, steps in (("ddp", 300), ("post_local/4/100", 400), ("diloco/16", "")):
        row = {"task": "images", "part": "test", "learning_rate": 0.1, "seed": 1, "best": 0.9}
        made.add("steps", **row, contender=contender, steps=steps)
    for contender, each in (("ddp", 2.0), ("post_local/4/0", 0.5), ("diloco/16", 0.1)):
        row = {"task": "images", "link": "5mbit", "wait": 0.05, "slowness": 1.0, "count": 20, "frame_bytes": 0}
        made.add("seconds", **row, contender=contender, step_s=each)
    at = ("5mbit", 0.05)
    assert made.seconds_to_level("images", "ddp", *at) == [600.0]
    assert made.seconds_to_level("images", "post_local/4/100", *at) == [100 * 2.0 + 300 * 0.5]
    assert made.seconds_to_level("images", "diloco/16", *at) == [math.inf]
    assert made.seconds_to_level("images", "int8", *at) == []
