"""The model card of an exported model: what it is, how good it is, and the lines that load it."""

import json
from typing import Any

from crossover_jax.leaves import flatten
from experiments import data, report
from experiments.settings import versions

PyTree = Any
Record = dict[str, Any]
CARD = """\
# {model} on {dataset}, trained by {algorithm}

{what} after step {step} ({examples} examples, {epochs:.2f} epochs), taken from a run of
crossover_jax by `experiments/export.py`.

| on the {evaluated} examples of `{split}` | accuracy | loss |
|---|---|---|
| **this model** | {accuracy:.4f} | {loss:.4f} |
| the workers, mean | {of_workers:.4f} | |
| the workers, min | {least:.4f} | |
| the workers, max | {most:.4f} | |

The workers' accuracies are {source}. Their consensus distance, the root mean square of their distances to
their average, is {distance:.4g}. {statistics}

## Load

With flax and orbax alone. `model` is your `flax.nnx` module whose attributes have the names and shapes below; what it
starts from does not matter, and one that lacks an array or has others is refused. In this folder:

```python
import os
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

graphdef, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
like = {{"params": nnx.to_pure_dict(params), "model_state": nnx.to_pure_dict(statistics)}}
saved = ocp.StandardCheckpointer().restore(os.path.abspath("model"), like)
model = nnx.merge(graphdef, saved["params"], saved["model_state"], rest)
{call}
```

{inputs} Call the model as its class says, here for evaluation. Restored without `like`, `saved` is
nested dicts of numpy arrays for anything else: of a linen module with these names, `params` and `batch_stats`.

```
{leaves}
```

## Config

```json
{config}```

The data were {data}.

| version of | trained with | exported with |
|---|---|---|
{versions}
"""


def fill(record: Record, dataset: data.Dataset, **fields: Any) -> str:
    """OUT/README.md; `fields` are those of `CARD` that are not in the record or the evaluated data set."""
    call, inputs = how_to_call(dataset)
    own = record["config"]
    return CARD.format(
        model=own["model.name"],
        dataset=own["dataset.name"],
        algorithm=own["algorithm"],
        step=record["step"],
        examples=record["examples"],
        evaluated=len(dataset),
        split=dataset.split,
        call=call,
        inputs=inputs,
        config=config_text(record),
        data=own["data"],
        versions=versions_table(record["provenance"]),
        **fields,
    )


def how_to_call(dataset: data.Dataset) -> tuple[str, str]:
    """The line that calls the model, and what it takes.

    >>> how_to_call(data.describe("fashion_mnist"))[0]
    'logits = model((images / 255 - np.float32([0.286])) / np.float32([0.353]))'
    """
    shape = ", ".join(map(str, dataset.image_shape))
    if not dataset.mean:
        return "logits = model(tokens)", f"`tokens` are bytes of text, `[batch, {shape}]`, as they are."
    mean, std = list(dataset.mean), list(dataset.std)
    return (
        f"logits = model((images / 255 - np.float32({mean})) / np.float32({std}))",
        f"`images` are uint8 `[batch, {shape}]`; the model takes them in float32, normalised: divided by 255, minus "
        f"the mean {mean} and over the standard deviation {std} of each channel.",
    )


def leaf_table(tree: PyTree) -> str:
    """Every array by name.

    >>> import numpy as np
    >>> print(leaf_table({"params": {"fc": {"bias": np.zeros(10, np.float32)}}}))
    params/fc/bias  float32[10]
    """
    names, leaves, _ = flatten(tree)
    return report.table({name: f"{x.dtype}{list(x.shape)}" for name, x in zip(names, leaves, strict=True)})


def config_text(record: dict[str, Any]) -> str:
    """OUT/config.json."""
    return json.dumps(recorded_config(record), indent=2) + "\n"


def versions_table(provenance: dict[str, Any]) -> str:
    """The rows of what the run and this process were made with."""
    here = versions()
    names = [name for name in {**provenance, **here} if name != "data"]
    return "\n".join(f"| {name} | {provenance.get(name, '')} | {here.get(name, '')} |" for name in names)


def recorded_config(record: Record) -> dict[str, Any]:
    """The config of the run by dotted names."""
    return {name: value for name, value in record["config"].items() if name != "data"}
