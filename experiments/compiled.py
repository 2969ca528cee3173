"""What a compiled program sends, read from its text (`compiled.as_text()`).

Only there stand the collectives that the partitioner inserts for sharding inside a worker, the order in which the
compiler runs everything, and what it made of messages between slices. `traced` reads what a program asks for.
"""

import collections
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

Edge = tuple[int, int, float]  # source, target, bytes

# "%name = type operation(operands), attributes". A tuple of types holds spaces, and "=" may stand in attributes; so the
# operation is what follows the first type and stands before a bracket.
_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([a-z][a-z\-]*)\(")
# As above, with the name, the result and the operands.
_OPERATION = re.compile(r"^\s*(?:ROOT )?(%?[\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z\-]*)\(([^)]*)\)")
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
# As above, with the result, for the collectives whose bytes are known. "-done" is not among them: a pair counts once.
_COLLECTIVE_LINE = re.compile(
    r"= (?P<result>\(?[a-z]+\d*[a-z0-9]*\[.*?) "
    r"(?P<operation>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|send)(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_RING = {  # bytes that each of g members passes on, in units of the operation's result
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-gather": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-to-all": lambda g: (g - 1) / g,
}
_SENT = {  # the same between slices, in units of the operand, which is what their text shows
    "ALL_REDUCE": lambda g: 2 * (g - 1) / g,
    "ALL_GATHER": lambda g: g - 1,
    "REDUCE_SCATTER": lambda g: (g - 1) / g,
    "ALL_TO_ALL": lambda g: (g - 1) / g,
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


def in_flight(text: str) -> int | None:
    """Bytes per chip of messages that are under way across a loop of a compiled program's entry; None without a loop.

    Counted are the buffers of permutes, sends and receives that start before the loop and are done behind it: of what
    arrives, and of what leaves, once in however many messages it goes, even where it is a leaf of the state itself. Of
    several loops the one with the most.

    >>> start = " s = (f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(x)"
    >>> done, loop = " d = f32[8]{0} collective-permute-done(s)", " w = f32[] while(y), body=b"
    >>> [in_flight("\\n".join(["ENTRY", *x])) for x in ([start, loop, done], [start, done, loop], [start, done])]
    [64, 0, None]
    """
    buffers: dict[str, dict[str, int]] = {}  # of each start that is not done, by name
    found = None
    for line in text[text.index("ENTRY") :].splitlines():
        if line.startswith("}"):
            break
        if not (match := _OPERATION.match(line)):
            continue
        name, result, operation, operands = match.groups()
        if operation == "while":
            alive = {key: size for own in buffers.values() for key, size in own.items()}
            found = max(found or 0, sum(alive.values()))
        elif operation in ("send", "recv", "collective-permute-start"):
            size = sum(_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(result) if shape)  # no contexts
            size //= 2 if operation == "collective-permute-start" else 1  # its result lists what leaves too
            what = operands.split(",")[0] if operation == "send" else operands  # a send's other operand is a token
            leaves, arrives = {f"of {what}": size}, {f"to {name}": size}
            buffers[name] = {"send": leaves, "recv": arrives}.get(operation, leaves | arrives)
        elif operation.endswith("-done"):
            buffers.pop(operands, None)
    return found


class Traffic(NamedTuple):
    """All collectives of one kind over the same mesh axes and links: their number and the bytes they send at most."""

    operation: str
    axes: tuple[str, ...]  # along which sender and receiver differ
    link: str  # "DCN" between slices, or hosts of what is no TPU; else "ICI"
    count: int
    bytes_per_chip: float
    bytes_per_worker: float  # that leave the worker


def traffic(text: str, mesh: Mesh, axis: str | tuple[str, ...] = "worker") -> list[Traffic]:
    """The bytes that a compiled program (`compiled.as_text()`) sends over the links of `mesh`.

    `axis` is the axis of the workers, or all of them where there are several. The rules of the count:

    * A permute sends its message once per pair of its list.
    * Any other collective sends what a ring over its group needs: the least that is possible.
    * What is in a loop counts as often as the loop runs, or once where the text does not tell how often.
    * Both branches of a conditional count: for an exchange that compiles to a switch this is an upper bound.
    * For a pod of several slices the compiler writes the text of one. What that sends inside counts as the first's.

    >>> mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("worker",))
    >>> traffic(" a = f32[8]{0} collective-permute(b), source_target_pairs={{0,1},{1,0}}", mesh)[0].bytes_per_worker
    32.0
    >>> traffic(" a = (f32[8]{0}, f32[4]{0}) all-reduce(b, c), replica_groups={{0,1}}", mesh)[0].bytes_per_chip
    48.0
    >>> traffic(" a = (f32[4]{0}, f32[8]{0}) all-gather-start(b), replica_groups={{0,1}}", mesh)[0].bytes_per_chip
    16.0
    """
    places = _places(mesh, (axis,) if isinstance(axis, str) else axis)
    names = np.array(mesh.axis_names)
    counts: collections.Counter = collections.Counter()
    sent: dict = collections.defaultdict(lambda: np.zeros(mesh.size))
    left: dict = collections.defaultdict(lambda: np.zeros(mesh.size))  # the worker, by its number
    for operation, edges, times in _messages(text, list(mesh.devices.flat)):
        if not edges:
            continue
        source, target, num_bytes = (np.array(column) for column in zip(*edges, strict=True))
        crosses = places.mesh[source] != places.mesh[target]
        crosses = np.column_stack([crosses, places.island[source] != places.island[target]])
        # At 16,384 chips there are half a million messages: a loop over them takes seconds, one over kinds does not.
        kinds, kind_of = np.unique(crosses, axis=0, return_inverse=True)
        for i, (*differs, over_dcn) in enumerate(kinds.tolist()):
            kind = (operation, tuple(names[differs].tolist()), "DCN" if over_dcn else "ICI")
            of_kind = kind_of.reshape(-1) == i
            s, t, size = source[of_kind], target[of_kind], times * num_bytes[of_kind]
            counts[kind] += times
            # `sent[kind][s] += size` would count a device once, however many messages it sends.
            np.add.at(sent[kind], s, size)
            np.add.at(left[kind], places.worker[s], size * (places.worker[s] != places.worker[t]))
    return [
        Traffic(*kind, count=counts[kind], bytes_per_chip=chip.max().item(), bytes_per_worker=left[kind].max().item())
        for kind, chip in sorted(sent.items())
    ]


class _Places(NamedTuple):
    """Where each device of a mesh lies."""

    mesh: np.ndarray  # its coordinates [devices, axes]
    worker: np.ndarray  # the number of its worker
    island: np.ndarray  # the number of what it reaches over ICI


def _places(mesh: Mesh, axes: tuple[str, ...]) -> _Places:
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)
    of_workers = coordinates[:, [mesh.axis_names.index(name) for name in axes]]
    worker = np.unique(of_workers, axis=0, return_inverse=True)[1].reshape(-1)
    return _Places(coordinates, worker, np.array([_island(device) for device in mesh.devices.flat]))


def _island(device: jax.Device) -> int:
    """Devices of one number reach each other over ICI: a slice of TPUs, a host of others."""
    return (getattr(device, "slice_index", 0) or 0) if device.platform == "tpu" else device.process_index


def _messages(text: str, devices: list[jax.Device]) -> Iterator[tuple[str, list[Edge], int]]:
    """Each collective's name, its messages (source, target, bytes), and how often it runs.

    Devices are named by their places in the mesh. In the text of permutes and groups they stand so too; sends between
    slices name them by `id`.
    """
    place = {device.id: i for i, device in enumerate(devices)}
    for line, times in _lines(text):
        if not (found := _COLLECTIVE_LINE.search(line)):
            continue
        operation = found["operation"]
        sizes = [_bytes(dtype, shape) for dtype, shape in _SHAPE.findall(found["result"])]
        if operation == "send" and (ids := re.findall(r"\{(\d+)->(\d+)\}", line)):
            yield operation, [(place[int(s)], place[int(t)], sizes[0]) for s, t in ids], times
        elif operation == "send":
            yield *_collective_by_sends(line, sizes[0], devices), times
        elif operation == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
            ids = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else []
            yield operation, [(int(s), int(t), sizes[0]) for s, t in ids if s != t], times
        else:
            groups = [group for group in replica_groups(line, len(devices)) if len(group) > 1]
            yield operation, _rings(groups, functools.partial(_ring_bytes, found, sizes)), times


def _rings(groups: list[list[int]], num_bytes: Callable[[int], float]) -> list[Edge]:
    """Every member of a group sends to the next, `num_bytes(size of the group)` in all."""
    return [
        (source, target, num_bytes(len(group)))
        for group in groups
        for source, target in zip(group, [*group[1:], group[0]], strict=True)
    ]


def _ring_bytes(found: re.Match, sizes: list[int], group_size: int) -> float:
    """What each member of a group passes on, from the sizes in the result of a collective's line."""
    result = float(sum(sizes))
    if found["operation"] == "all-gather" and found["start"]:
        result *= group_size / (group_size + 1)  # the result lists the operands too, 1/g of what is gathered
    return result * _RING[found["operation"]](group_size)


def _collective_by_sends(line: str, size: int, devices: list[jax.Device]) -> tuple[str, list[Edge]]:
    """A collective between slices is no operation of its own on TPUs, but sends that name its kind and its members."""
    kind, target = (
        found[1] if (found := re.search(rf'_xla_megascale_{name}="(.*?)"', line)) else ""
        for name in ("transfer_type", "target")
    )
    if kind not in _SENT:
        raise ValueError(f"`traffic` knows sends between slices that are {', '.join(_SENT)}, got {kind!r}.")
    edges = _rings(_groups_of_slices(target, devices), lambda g: size * _SENT[kind](g))
    return f"{kind.lower().replace('_', '-')} by send", edges


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
    bodies: dict[str, list[str]] = {"": []}  # by computation; the first is for what stands in none
    name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[1]
            bodies[name] = []
        bodies[name].append(line)
        name = "" if line.startswith("}") else name
    # Loops nest, so that a line runs as often as the loops around it together: ask the callers of its computation.
    callers = collections.defaultdict(list)
    for caller, lines in bodies.items():
        for line in lines:
            times = _trip_count(line, bodies) if " while(" in line else 1
            # "body=%a", "to_apply=%a", "branch_computations={%a, %b}": right of "=", whatever the attribute is called.
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
    """How often a loop runs: as XLA says, or the bound that its condition compares a counter with; else 1."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(found[1])
    # The counters of `scan` and `fori_loop` begin at 0 and grow by one, so that their bound is the number of turns.
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = "\n".join(bodies.get(condition[1], [])) if condition else ""
    compared = re.search(r"ROOT .* compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", lines)
    bound = compared and re.search(rf"%?{re.escape(compared[1])} = s32\S* constant\((\d+)\)", lines)
    return int(bound[1]) if bound else 1


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
