"""A small config, and what a run leaves behind, for the tests that train."""

import json
import os

from tensorboardX.proto.event_pb2 import Event

from experiments.configs import fashion_mnist
from experiments.data.convert import read_tfrecord
from experiments.report import TAGS

STEPS, BATCH, EXAMPLES = 3, 64, 1100


def small_config(data_dir):
    """A small model, few steps, a row for each; the last batch of the evaluation is half empty."""
    config = fashion_mnist.get_config()
    small = {"data_dir": os.fspath(data_dir), "eval_split": f"test[:{EXAMPLES}]"}
    config.dataset.update(small)
    config.model.name, config.model.options = "mlp", {"hidden": (32,)}
    config.batch_size, config.steps, config.log_every, config.eval_batch_size = BATCH, STEPS, 1, 200
    config.simulate, config.schedule.learning_rate, config.checkpoint.every = "yes", 0.02, None
    return config.lock()


def changed(config, **changes):
    """`config` with `sgp__peers=` and so on."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def read_rows(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def scalars(workdir):
    """{(name, step): value} of the TensorBoard events, each of which is in a group."""
    (path,) = workdir.glob("events.out.tfevents.*")
    events = [Event.FromString(record) for record in read_tfrecord(path)]
    names = {tag: name for name, tag in TAGS.items()}
    found = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    assert all("/" in tag for tag, _ in found)
    return {(names.get(tag, tag), step): value for (tag, step), value in found.items()}


def arguments(config, tmp_path):
    return [
        f"--workdir={tmp_path / 'run'}",
        f"--config.dataset.data_dir={config.dataset.data_dir}",
        f"--config.dataset.eval_split={config.dataset.eval_split}",
        "--config.model.name=mlp",
        "--config.model.options={'hidden': (32,)}",
        "--config.steps=2",
        "--config.log_every=1",
        "--config.simulate=yes",
    ]
