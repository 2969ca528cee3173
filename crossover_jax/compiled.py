"""What a program sends: collectives of compiled programs, bytes of traced ones."""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][a-z\-]*)\(")
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
    "send",
)
_COLLECTIVE_LINE = re.compile(
    r"= (?P<result>\(?[a-z]+\d*[a-z0-9]*\[.*?) "
    r"(?P<operation>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|send)(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_SENT = {  # the same between slices, in units of what is sent from the chip
    "ALL_REDUCE": lambda g: 2 * (g - 1) / g,
    "ALL_GATHER": lambda g: g - 1,
    "REDUCE_SCATTER": lambda g: (g - 1) / g,
    "ALL_TO_ALL": lambda g: (g - 1) / g,
}
_RING = {  # bytes that each of g members passes on, in units of the operation's result
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-gather": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-to-all": lambda g: (g - 1) / g,
}


def collectives(text: str) -> collections.Counter:
    """Number of collectives of each kind, and of conditionals, in a compiled program (`compiled.as_text()`).

    An asynchronous pair of start and done counts once; between slices of a pod a permute appears as a "send".

    >>> collectives("  ROOT p = f32[2]{0} collective-permute(x), channel_id=1")
    Counter({'collective-permute': 1})
    """
    found = collections.Counter()
    for line in text.splitlines():
        match = _DEFINITION.match(line)
        name = match.group(1).removesuffix("-start") if match else ""
        if name in _COLLECTIVES or name == "conditional":
            found[name] += 1
    return found


def schedule(text: str) -> list[str]:
    """Operations of a compiled program's entry in the order they run.

    Fusions around a product and calls of a library for one (cuDNN, cuBLAS) are called "matmul". What only takes such a
    fusion's result is none, though that stands in its line by name.

    >>> schedule('ENTRY main\\n  a = f32[2]{0} custom-call(x), metadata={op_name="jit(f)/conv_general_dilated"}')
    ['matmul']
    >>> schedule('ENTRY main\\n  a = f32[2]{0} fusion(gemm_fusion_dot_general), metadata={op_name="jit(f)/mul"}')
    ['fusion']
    """
    operations = []
    for line in text[text.index("ENTRY") :].splitlines():
        if match := _DEFINITION.match(line):
            name = match.group(1)
            is_matmul = name in ("convolution", "dot") or (
                name in ("fusion", "custom-call") and re.search(r'op_name="[^"]*(?:dot_general|conv_general)', line)
            )
            operations.append("matmul" if is_matmul else name)
    return operations


def wire_bytes(function: Callable[..., Any], *args: Any, axis: str = "worker", num_workers: int) -> float:
    """Bytes that one worker sends over `axis` in one call of `function`, averaged over the workers.

    `function` is traced on the values (or shapes) of one worker, not run. A permute counts its message, once per pair
    that is not a fixed point; an all-reduce counts 2 (n − 1)/n times its operand, what a ring sends. Of the branches of
    a conditional the one that sends most counts: pass a Python integer as `step` and `gossip` makes none.

    >>> import jax.numpy as jnp
    >>> from crossover_jax.mixing import average
    >>> wire_bytes(lambda x: average()(x, 0), jnp.zeros(100), num_workers=4)
    600.0
    """
    jaxpr = jax.make_jaxpr(function, axis_env=[(axis, num_workers)])(*args)
    return _sent(jaxpr.jaxpr, axis, num_workers)


def _sent(jaxpr: Any, axis: str, n: int) -> float:
    return sum((_sent_by(eqn, axis, n) for eqn in jaxpr.eqns), 0.0)


def _sent_by(eqn: Any, axis: str, n: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return max(_sent(branch.jaxpr, axis, n) for branch in params["branches"])
    if axis in _axes(params):
        size = sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars)
        if name == "ppermute":
            return size * sum(i != j for i, j in params["perm"]) / n
        if name.startswith("psum"):
            return size * 2 * (n - 1) / n
        if name.startswith("all_gather"):
            return float(size * (n - 1))
        if name != "axis_index":
            raise ValueError(f"`wire_bytes` knows ppermute, psum and all_gather, got {name} over axis {axis!r}.")
    times = params.get("length", 1) if name == "scan" else 1
    return times * sum((_sent(getattr(inner, "jaxpr", inner), axis, n) for inner in _inner_jaxprs(params)), 0.0)


def operations(function: Callable[..., Any], *args: Any, axes: dict[str, int] | None = None) -> float:
    """Floating-point operations of the matrix products and convolutions in one call of `function`.

    `function` is traced on values or shapes, not run; `axes` names the axes it expects around it, with their sizes. A
    product counts 2 per multiply-add. What is in a `scan` counts as often as it runs (which XLA's own cost analysis
    does not do), what is recomputed for a gradient counts again, and of the branches of a conditional the dearest.

    >>> import jax.numpy as jnp
    >>> operations(lambda x: x @ x, jnp.zeros((10, 10)))
    2000.0
    """
    return _operations(jax.make_jaxpr(function, axis_env=[*(axes or {}).items()])(*args).jaxpr)


def _operations(jaxpr: Any) -> float:
    return sum((_operations_of(eqn) for eqn in jaxpr.eqns), 0.0)


def _operations_of(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        taps = kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * eqn.outvars[0].aval.size * taps / math.prod(params["lhs_dilation"])  # zeros between are no work
    if name == "cond":
        return max(_operations(branch.jaxpr) for branch in params["branches"])
    times = params.get("length", 1) if name == "scan" else 1
    return times * sum((_operations(getattr(inner, "jaxpr", inner)) for inner in _inner_jaxprs(params)), 0.0)


def _axes(params: dict[str, Any]) -> tuple[Any, ...]:
    names = params.get("axes", params.get("axis_name", ()))
    return names if isinstance(names, tuple) else (names,)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, list | tuple) else [value])]
    return [v for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


class Traffic(NamedTuple):
    """All collectives of one kind over the same mesh axes and links: their number and the bytes they send at most."""

    operation: str
    axes: tuple[str, ...]  # along which sender and receiver differ
    link: str  # "DCN" between slices, or hosts of what is no TPU; else "ICI"
    count: int
    bytes_per_chip: float
    bytes_per_worker: float  # that leave the worker


def traffic(text: str, mesh: Mesh, axis: str | tuple[str, ...] = "worker") -> list[Traffic]:
    """The collectives of a compiled program (`compiled.as_text()`) on `mesh`.

    A permute sends its message along each of its pairs; other collectives are counted as rings over their groups, what
    they need at least. What is in a loop counts as often as the loop runs, as far as its condition says that. Both
    branches of a conditional are counted: exchanges that compile to a switch (`is_channels`) send less than this says.
    Of a pod of several slices the text is one slice's, and what it sends inside is counted for the first. `axis` names
    the axis of the workers, or both where there are two.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("worker",))
    >>> traffic(" a = f32[8]{0} collective-permute(b), source_target_pairs={{0,1},{1,0}}", mesh)[0].bytes_per_worker
    32.0
    >>> traffic(" a = (f32[8]{0}, f32[4]{0}) all-reduce(b, c), replica_groups={{0,1}}", mesh)[0].bytes_per_chip
    48.0
    >>> traffic(" a = (f32[4]{0}, f32[8]{0}) all-gather-start(b), replica_groups={{0,1}}", mesh)[0].bytes_per_chip
    16.0
    """
    devices = list(mesh.devices.flat)
    place = {device.id: i for i, device in enumerate(devices)}
    names = np.array(mesh.axis_names)
    where = np.stack(np.unravel_index(np.arange(len(devices)), mesh.devices.shape), axis=-1)
    of_workers = [mesh.axis_names.index(name) for name in ((axis,) if isinstance(axis, str) else axis)]
    worker = np.unique(where[:, of_workers], axis=0, return_inverse=True)[1].reshape(-1)
    island = np.array([_island(device) for device in devices])
    counts: collections.Counter = collections.Counter()
    sent: dict = collections.defaultdict(lambda: np.zeros(len(devices)))
    left: dict = collections.defaultdict(lambda: np.zeros(len(devices)))
    for operation, edges, times in _messages(text, place, devices):
        if not edges:
            continue
        source, target, num_bytes = (np.array(column) for column in zip(*edges, strict=True))
        # At 16,384 chips there are half a million messages: a loop over them takes seconds, one over kinds does not.
        across = np.concatenate([where[source] != where[target], (island[source] != island[target])[:, None]], axis=1)
        kinds, kind_of = np.unique(across, axis=0, return_inverse=True)
        for i, (*differs, over_dcn) in enumerate(kinds.tolist()):
            kind = (operation, tuple(names[differs].tolist()), "DCN" if over_dcn else "ICI")
            of_kind = kind_of.reshape(-1) == i
            s, t, size = source[of_kind], target[of_kind], times * num_bytes[of_kind]
            counts[kind] += times
            np.add.at(sent[kind], s, size)
            np.add.at(left[kind], worker[s], size * (worker[s] != worker[t]))
    return [
        Traffic(*kind, count=counts[kind], bytes_per_chip=chip.max().item(), bytes_per_worker=left[kind].max().item())
        for kind, chip in sorted(sent.items())
    ]


def _island(device: jax.Device) -> int:
    """Devices of one number reach each other over ICI: a slice of TPUs, a host of others."""
    return (getattr(device, "slice_index", 0) or 0) if device.platform == "tpu" else device.process_index


def _messages(
    text: str, place: dict[int, int], devices: list[jax.Device]
) -> Iterator[tuple[str, list[tuple[int, int, float]], int]]:
    """Each collective's name, its messages (source, target, bytes), devices by their place in the mesh, how often."""
    for line, times in _lines(text):
        if not (found := _COLLECTIVE_LINE.search(line)):
            continue
        operation = found["operation"]
        sizes = [_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(found["result"])]
        if operation == "send" and (ids := re.findall(r"\{(\d+)->(\d+)\}", line)):
            yield operation, [(place[int(s)], place[int(t)], sizes[0]) for s, t in ids], times
        elif operation == "send":
            kind, target = (
                found[1] if (found := re.search(rf'_xla_megascale_{name}="(.*?)"', line)) else ""
                for name in ("transfer_type", "target")
            )
            if kind not in _SENT:
                raise ValueError(f"`traffic` knows sends between slices that are {', '.join(_SENT)}, got {kind!r}.")
            groups = _groups_of_slices(target, devices)
            yield (
                f"{kind.lower().replace('_', '-')} by send",
                [
                    (source, target, sizes[0] * _SENT[kind](len(group)))
                    for group in groups
                    for source, target in zip(group, [*group[1:], group[0]], strict=True)
                ],
                times,
            )
        elif operation == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
            ids = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else []
            yield operation, [(int(s), int(t), sizes[0]) for s, t in ids if s != t], times
        else:
            groups = [group for group in replica_groups(line, len(place)) if len(group) > 1]
            yield (
                operation,
                [
                    (source, target, _result_bytes(sizes, found, len(group)) * _RING[operation](len(group)))
                    for group in groups
                    for source, target in zip(group, [*group[1:], group[0]], strict=True)
                ],
                times,
            )


def _groups_of_slices(target: str, devices: list[jax.Device]) -> list[list[int]]:
    """Who takes part in "{1,2,3}x{0:7}": slices, counted from 1, and in each the devices from one to another."""
    slices, first, last = re.findall(r"^\{([\d,]+)\}x\{(\d+):(\d+)\}$", target)[0]
    of_slice = collections.defaultdict(list)
    for i, device in enumerate(devices):
        of_slice[_island(device)].append((device.id, i))
    members = [sorted(of_slice[int(s) - 1]) for s in slices.split(",")]
    return [[member[d][1] for member in members] for d in range(int(first), int(last) + 1)]


def _lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines of a program, each with how often it runs."""
    bodies: dict[str, list[str]] = {"": []}  # by computation; the first is for what is in none
    name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            bodies[name] = []
        bodies[name].append(line)
        name = "" if line.startswith("}") else name
    callers = collections.defaultdict(list)
    for caller, lines in bodies.items():
        for line in lines:
            times = _trip_count(line, bodies) if " while(" in line else 1
            for called in re.findall(r"\w+=\{?((?:%[\w.\-]+(?:, )?)+)", line.partition(" = ")[2]):
                for callee in re.findall(r"[\w.\-]+", called):
                    callers[callee].append((caller, times))

    @functools.cache
    def runs(name: str) -> int:
        return sum(times * runs(caller) for caller, times in callers[name]) if callers[name] else 1

    for name, lines in bodies.items():
        for line in lines:
            yield line, runs(name)


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as XLA knows it, or the bound that its condition compares a counter with; else 1."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = "\n".join(bodies.get(condition[1], [])) if condition else ""
    compared = re.search(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", lines)
    bound = compared and re.search(rf"%?{re.escape(compared[1])} = s32\S* constant\((\d+)\)", lines)
    return int(bound[1]) if bound else 1


def _result_bytes(sizes: list[int], found: re.Match, group_size: int) -> float:
    """Of an asynchronous all-gather the result lists the operands too, which are 1/g of what is gathered."""
    if found["operation"] == "all-gather" and found["start"]:
        return sum(sizes) * group_size / (group_size + 1)
    return float(sum(sizes))


def replica_groups(line: str, num_devices: int) -> list[list[int]]:
    """The groups of a collective, written as lists, as axes of a mesh, or as a reshaped, transposed and reshaped iota.

    Raises `ValueError` for what is written otherwise: all devices in one group would be a guess.

    >>> replica_groups("replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    [[0, 2], [1, 3]]
    >>> replica_groups("replica_groups=mesh['worker'=2,'data'=2] {'worker'}, use_global_device_ids=true", 4)
    [[0, 2], [1, 3]]
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}:]*)\}(?:,|$)", line):  # since JAX 0.12
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        together = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", found[2])]
        apart = [i for i in range(len(sizes)) if i not in together]
        iota = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        size = math.prod(iota.shape[i] for i in together)
        return iota.transpose([*apart, *together]).reshape(-1, size).tolist()
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, source, order = ([int(x) for x in (part or "").split(",") if x] for part in found.groups())
        iota = np.arange(math.prod(source)).reshape(source)
        return (iota.transpose(order) if order else iota).reshape(shape).tolist()
    if found := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(x) for x in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if "replica_groups=" in line and "replica_groups={}" not in line:
        raise ValueError(f"`replica_groups` cannot be read from {line.partition('replica_groups=')[2][:80]!r}.")
    return [list(range(num_devices))]


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.prod(int(x) for x in shape.split(",") if x) * bits // 8
