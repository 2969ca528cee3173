"""Islands of the application, in threads of one process: the same run as by `python -m experiments.island`."""

import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from crossover_jax import islands
from experiments import checkpoint, data, export, island
from experiments.configs import lm
from experiments.islands import virtual
from experiments.islands.program import make_island_program
from experiments.step import TrainState


@pytest.fixture
def config(tmp_path):
    config = lm.get_config()
    text = tmp_path / "text.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 123, 200_000, np.uint8).tobytes())
    config.dataset.data_dir = str(text)
    config.dataset.eval_split = "validation[0%:5%]"
    config.model.options.update(num_layers=1, width=16, num_heads=2, mlp_width=16)
    config.num_workers, config.batch_size, config.steps = 2, 16, 30
    config.log_every, config.checkpoint.every = 10, 10
    return config


def settings(tmp_path, name, **keys):
    return island.Settings(islands.directory(tmp_path / "roster"), name, None, "127.0.0.1:0", patience=20.0, **keys)


def train(config, workdir, settings):
    return island.train(config, workdir, settings, devices=jax.devices()[:1])


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_islands_train_until_the_clock_is_at_its_end_and_the_mean_is_exported(config, tmp_path, monkeypatch):
    both, step = threading.Barrier(2), island._Run.step

    def step_when_both_have_compiled(run, state, batch):
        state = step(run, state, batch)
        if run.own_step == 1:
            both.wait(60)
        return state

    monkeypatch.setattr(island._Run, "step", step_when_both_have_compiled)
    without = config.copy_and_resolve_references()  # orbax cannot save twice at once in one process
    without.checkpoint.every = None
    threads = [
        threading.Thread(target=train, args=(own, tmp_path / name, settings(tmp_path, name, pace=0.05)))
        for name, own in (("a", config), ("b", without))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {name: rows(tmp_path / name) for name in "ab"}
    for name in "ab":
        last = found[name][-1]
        assert 480 <= last["clock"] <= 480 + 2 * 8  # 30 steps of 16 examples, whoever made them
        assert last["train/loss"] < found[name][0]["train/loss"]
        assert last["participation"] > 0
        assert last["bits_per_byte"] > 0
    assert sum(found[name][-1]["step"] for name in "ab") == pytest.approx(60, abs=2)

    # As an island goes on behind a restart: from its own checkpoint, where nobody is there.
    monkeypatch.undo()
    longer = config.copy_and_resolve_references()
    with longer.unlocked():
        longer.steps = 40
    train(longer, tmp_path / "a", settings(tmp_path, "a"))
    behind = rows(tmp_path / "a")
    assert behind[-1]["step"] > found["a"][-1]["step"]
    assert behind[-1]["clock"] >= 640

    figures = export.export(tmp_path / "a", tmp_path / "model")
    assert figures.loss == pytest.approx(behind[-1]["eval/mean/loss"], rel=1e-4)


def test_a_run_whose_clock_comes_to_its_end_between_two_steps_is_evaluated_nevertheless(config, tmp_path, monkeypatch):
    late, row, clock = [], island._Run.row, islands.Island.clock.fget

    def row_while_others_deliver(run, more):
        row(run, more)
        late.append(1000)

    monkeypatch.setattr(island._Run, "row", row_while_others_deliver)
    monkeypatch.setattr(islands.Island, "clock", property(lambda self: clock(self) + sum(late)))
    config.checkpoint.every = None
    train(config, tmp_path / "a", settings(tmp_path, "a"))
    assert [("bits_per_byte" in found, found["step"]) for found in rows(tmp_path / "a")] == [(False, 10), (True, 11)]


def test_the_mean_of_all_islands_is_exported_as_a_runs(config, tmp_path):
    made = make_island_program(config)
    train(config, tmp_path / "a", settings(tmp_path, "a"))
    states = [made.init(), made.init()]
    states[1] = states[1]._replace(params=jax.tree.map(lambda x: x + 1, states[1].params))
    roster, ended, there = islands.directory(tmp_path / "others"), threading.Event(), []

    def stay(name, state):
        own = islands.Island(roster, name, like=state.params, tls=None, cut=made.exchange["cut"], wire=None)
        own._node.ledger.is_offered = lambda segment: False
        own.join(state, {})
        there.append(name)
        while not ended.wait(0.01):
            own.exchange(state.params, state)
        own.leave()

    threads = [threading.Thread(target=stay, args=pair) for pair in zip("xy", states, strict=True)]
    for thread in threads:
        thread.start()
    while len(there) < 2:
        ended.wait(0.01)
    others = str(tmp_path / "others")
    for said in ({"roster": others}, {"roster": others, "keys": "k", "plain_text": True}, {"plain_text": True}):
        with pytest.raises(ValueError, match="`--roster` must come with one of `--keys` and `--plain_text`"):
            export.export(tmp_path / "a", tmp_path / "model", **said)
    export.export(tmp_path / "a", tmp_path / "model", roster=others, plain_text=True)
    ended.set()
    for thread in threads:
        thread.join()
    with ocp.StandardCheckpointer() as checkpointer:
        exported = checkpointer.restore((tmp_path / "model" / "model").absolute())["params"]
    for leaf, mine in zip(jax.tree.leaves(exported), jax.tree.leaves(states[0].params), strict=True):
        np.testing.assert_allclose(leaf, mine[0] + 0.5, atol=1e-6)
    assert "all islands" in (tmp_path / "model" / "README.md").read_text()


def test_a_checkpoint_has_the_clock_and_no_config_of_many(config, tmp_path):
    train(config, tmp_path / "a", settings(tmp_path, "a"))
    record = checkpoint.read_record(tmp_path / "a", checkpoint.steps(tmp_path / "a")[-1])
    assert sum(record["clock"].values()) == 480
    assert record["num_workers"] == 1
    assert record["config"]["algorithm"] == "alone"


def test_another_algorithm_than_crossover_is_refused(config):
    config.algorithm = "alone"
    config.crossover.update(rounds=1, wire=None)
    with pytest.raises(ValueError, match="must be 'crossover' for islands"):
        make_island_program(config)


def test_islands_that_are_as_fast_train_on_the_batches_of_a_mesh(config):
    config.num_workers, config.batch_size = 4, 32
    made = make_island_program(config)
    dataset = data.load(
        "text", config.dataset.train_split, data_dir=config.dataset.data_dir, sequence=config.dataset.sequence
    )
    whole = data.train_batches(dataset, batch_size=32, num_workers=4, seed=config.seed, augment=False)
    first, second, third = (next(whole)["image"] for _ in range(3))
    own = [made.batches(f"island-{k}@7", 0.0) for k in range(4)]
    for batch in (first, second):
        np.testing.assert_array_equal(np.concatenate([next(one)["image"] for one in own]), batch)
    # Another life begins where the run is; a name that says no part draws by itself, each life anew.
    np.testing.assert_array_equal(next(made.batches("c@8", 64.0))["image"][0], third[2])
    others = [next(made.batches(life, 64.0))["image"][0].tobytes() for life in ("mars@1", "mars@2", "island-4@1")]
    assert len({*others, *(part.tobytes() for part in third)}) == 7


def test_islands_in_virtual_time_are_a_function_of_the_seed_and_survive_a_storm(config):
    config.num_workers, config.steps, config.crossover.rounds, config.crossover.wire = 4, 12, 1, None
    config.batch_size = 32
    made = make_island_program(config)
    events = (
        virtual.Event(0.1, "slow", (0,)),
        virtual.Event(0.3, "kill", (1, 2), 5.0),
        virtual.Event(0.5, "stop", (3,), 5.0),
        virtual.Event(0.6, "cut", (0, 1), 5.0),
        virtual.Event(0.7, "loss", (), 5.0, 0.05),
    )
    one, two = (virtual.train(made, virtual.World(events=events), 0) for _ in range(2))
    assert one == two
    assert one["delivered"] >= 384
    assert one["seconds"] > 15  # a calm run would take 12 steps
    assert 0.1 < one["participation"] < 1


def test_distances_of_adams_moments_are_parts_of_their_means_norms():
    def state(params, mu, nu):
        moments = optax.ScaleByAdamState(jnp.zeros(2, jnp.int32), {"w": jnp.array(mu)}, {"w": jnp.array(nu)})
        return TrainState({"w": jnp.array(params)}, {}, ((), moments))

    row = virtual.distances(state([[0.0, 0], [6, 8]], [[1.0, 2], [5, 4]], [[2.0, 2], [2, 2]]))
    # Means: (3, 4), (3, 3) and (2, 2); both workers are 5, √5 and 0 away from them.
    assert row == pytest.approx({"consensus_distance": 5, "first_moments": (5 / 18) ** 0.5, "second_moments": 0})
    assert virtual.distances(TrainState({"w": jnp.ones((2, 1))}, {}, ())) == {"consensus_distance": 0}
