"""One process of an island of several hosts, for `test_hosts.py`: `PORT PROCESSES INDEX NAME FOLDER WIRE`."""

import json
import pathlib
import sys
import time

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from crossover_jax import by_size, islands

STEPS, DEVICES = 120, 2


def ramp(shape):
    """No two elements are alike, so that none can take another's place."""
    return np.linspace(1, 2, np.prod(shape), dtype=np.float32).reshape(shape)


def wait_for(folder, names):
    until = time.monotonic() + 60
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < until, names
        time.sleep(0.01)


def main(port, processes, index, name, folder, wire):
    folder = pathlib.Path(folder)
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(index))
    mesh = Mesh(jax.devices()[::-1], ("d",), axis_types=(AxisType.Auto,))  # not in the processes' order
    places = {"sharded": NamedSharding(mesh, P("d")), "replicated": NamedSharding(mesh, P())}
    shapes = {"sharded": (2 * len(jax.devices()), 3), "replicated": (129,)}

    def placed(value):
        return {
            key: jax.make_array_from_callback(shapes[key], place, lambda i, key=key: (value * ramp(shapes[key]))[i])
            for key, place in places.items()
        }

    def values(params):
        return {key: np.asarray(whole(params)[key], np.float64).tolist() for key in places}

    whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))
    add = jax.jit(lambda tree, update: jax.tree.map(lambda x, u: x + u, tree, update), out_shardings=places)
    params = placed(0.0)
    island = islands.Island(
        islands.directory(folder / "roster"), name, like=params, cut=by_size(3), wire=wire or None, tls=None, rounds=2
    )
    if name == "b":
        wait_for(folder, ["a has begun"])
    params = island.join(params)
    start, life = values(params), island.life
    update = placed({"a": 1.0, "b": -2.0}[name])
    for step in range(STEPS):
        if step < STEPS // 2:
            params = add(params, update)
        params = island.exchange(params, params)
        assert island.clock >= step
        if step == 0 and index == "0":
            (folder / f"{name} has begun").touch()
        if step == 0 and name == "a":
            # Whoever joins is handed over a state in an exchange: the same number of them on all hosts.
            while not (island.clock > step + 1):
                params = island.exchange(params, params, delivered=0)
        time.sleep(0.01)

    async def own_state(*_):
        return b""  # the other island may be at its end, and hand over none

    island._first_state = own_state
    island._is_away = index == "0"  # the first host was stopped: all learn it at one exchange, and once
    params, times = island.exchange(params, params), 0
    for _ in range(3):
        try:
            params = island.exchange(params, params)
        except islands.LongAway:
            times += 1
            island.join(params, island.counts)
    island._node.ledger.is_offered = lambda segment: False
    (folder / f"{name}{index} is quiet").touch()
    wait_for(folder, [f"{n}{i} is quiet" for n in "ab" for i in range(int(processes))])
    time.sleep(0.5)
    params = island.exchange(params, params, delivered=0)
    found = {
        "life": life,
        "away": times,
        "start": start,
        "end": values(params),
        "places": [list(params[key].sharding.spec) for key in places],
        "status": island.status(),
    }
    (folder / f"{name}{index}.json").write_text(json.dumps(found))
    island.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
