"""The hosts of one island: whose rows of a segment each exchanges, and what all of them learn from the first."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from crossover_jax.leaves import PyTree

HEAD_BYTES = 16384  # of what the first host says, and of an address: all hosts must send equally much


class Word(NamedTuple):
    """What the first host knows and all must act upon at the same step, or their programs would wait for each other."""

    total: float  # of the run's clock
    is_away: bool = False  # it was stopped for too long
    wants_state: bool = False  # somebody waits for the island's state
    wants_params: bool = False


class Hosts:
    """The processes of this island's own `jax.distributed`; one if there is none.

    A segment has a row for each device, and each host exchanges the rows of its own devices with the host of the same
    number of another island. Hosts never wait for the network, but they run the same programs at the same steps: what
    one of them has nothing for, it fills with zeros.

    Raises `ValueError` if `like` does not lie on a mesh of all devices where there are several hosts.
    """

    def __init__(self, like: PyTree):
        self.index, self.count = jax.process_index(), jax.process_count()
        self.rows, self.own, self._is_cpu = 1, [0], False
        self._along: Any = None  # the rows over all devices
        self._said: Any = None
        if self.count > 1:
            mesh = _mesh_of(like)
            self._is_cpu = mesh.devices.flat[0].platform == "cpu"
            self.rows = mesh.size
            self._along, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
            places = self._along.devices_indices_map((self.rows,))
            starts = {device: row.start or 0 for device, (row,) in places.items()}
            self.own = sorted(row for device, row in starts.items() if device.process_index == self.index)
            self._firsts = min(row for device, row in starts.items() if device.process_index == 0)
            self._replicated = jax.jit(partial(jax.tree.map, lambda x: x), out_shardings=whole)
            self._told = jax.jit(lambda words: words[self._firsts], out_shardings=whole)

    @property
    def is_first(self) -> bool:
        """Whether this host speaks for the island."""
        return self.index == 0

    # Rows

    def jit_rows(self, function: Callable) -> Callable:
        """`function` compiled, each of its results `[rows, ...]` on the devices whose rows they are."""
        return jax.jit(function, out_shardings=self._along)

    def own_rows(self, array: Array) -> np.ndarray:
        """This host's rows, one behind the other, in its memory."""
        if self.count == 1:
            return np.asarray(array)
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards]).reshape(-1)

    def with_rows(self, own: np.ndarray) -> Any:
        """The array `[rows, ...]` of which each host has given its own rows; of one host what it has given."""
        if self.count == 1:
            return own
        parts = own.reshape(len(self.own), -1)
        number = {row: i for i, row in enumerate(self.own)}
        shape = (self.rows, parts.shape[1])

        def part(index: Any) -> np.ndarray:
            return parts[number[index[0].start or 0]][None]

        return jax.make_array_from_callback(shape, self._along, part, dtype=parts.dtype)

    def replicated(self, arrays: list[Array]) -> list[Array]:
        """The arrays whole on each host; called by all of them."""
        return arrays if self.count == 1 else self.in_order(self._replicated(arrays))

    def in_order(self, tree: PyTree) -> PyTree:
        """The same, waited for where hosts have CPU devices.

        There programs that do not depend on each other run at once, and a collective of one would meet that of another.
        """
        return jax.block_until_ready(tree) if self._is_cpu else tree

    # What the first one says

    def agree(self, word: Word) -> Word:
        """What the first host has said at the call before, the first time now; one host is told what it says."""
        if self.count == 1:
            return word
        said, own = self._said, np.array([word.total], np.float64).view(np.uint32)
        own = np.concatenate([own, np.array(word[1:], np.uint32)])
        self._said = self.in_order(self._told(self.with_rows(np.tile(own, len(self.own)))))
        found = np.asarray(self._said if said is None else said)  # behind `tell` there is no call before
        return Word(found[:2].view(np.float64).item(), *map(bool, found[2:]))

    def tell(self, head: dict[str, Any], body: bytes | bytearray = b"", longest: int = 0) -> tuple[dict, np.ndarray]:
        """What the first host has said, and up to `longest` bytes; all wait for it."""
        if self.count == 1:
            return head, np.frombuffer(body, np.uint8)
        self._said = None  # of a life that has ended
        whole = _padded(json.dumps(head).encode() + b"\0", HEAD_BYTES)
        said = multihost_utils.broadcast_one_to_all(whole, is_source=self.is_first)
        head = _head(said)
        if not head.get("body"):
            return head, np.zeros(0, np.uint8)
        return head, np.asarray(multihost_utils.broadcast_one_to_all(_padded(body, longest), is_source=self.is_first))

    def gather(self, said: str) -> list[str]:
        """What each host has said, in their order; all wait for it."""
        if self.count == 1:
            return [said]
        own = _padded(json.dumps(said).encode() + b"\0", HEAD_BYTES)
        return [_head(each) for each in np.asarray(multihost_utils.process_allgather(own))]


def _head(said: Any) -> Any:
    return json.loads(np.asarray(said, np.uint8).tobytes().split(b"\0", 1)[0])


def _padded(said: bytes | bytearray, length: int) -> np.ndarray:
    whole = np.zeros(length, np.uint8)
    whole[: len(said)] = np.frombuffer(said, np.uint8)
    return whole


def _mesh_of(like: PyTree) -> Any:
    shardings: Sequence[Any] = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(like)]
    for sharding in shardings:
        if isinstance(sharding, NamedSharding) and sharding.mesh.size == jax.device_count():
            return sharding.mesh
    raise ValueError(
        f"`like` must lie on one mesh of all {jax.device_count()} devices of this island's {jax.process_count()} "
        "processes, as a tree of arrays or shapes with a `NamedSharding`, and no leaf of it does."
    )
