"""The view of all islands, against what the islands say of themselves."""

import contextlib
import json
import math
import re
import time

import jax.numpy as jnp
import pytest

from crossover_jax.__main__ import main
from crossover_jax.cuts import by_size
from crossover_jax.islands import Island, directory, keys, view
from crossover_jax.islands.transport import Tls

PARAMS = {"w": jnp.arange(64.0)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two islands of a run, a and b, which have exchanged; in the roster there is c as well, where nobody answers."""
    root = tmp_path_factory.mktemp("run")
    keys.make_keys(str(root / "keys"), ["a", "b"])
    with contextlib.ExitStack() as stack:
        islands = []
        for name in "ab":
            tls = Tls.of(str(root / "keys"), name)
            roster = directory(str(root / "roster"))
            islands.append(Island(roster, name, like=PARAMS, cut=by_size(4), tls=tls, timeout=5.0, patience=30.0))
            stack.callback(islands[-1].leave)
        a, b = islands
        values = [PARAMS, {"w": -PARAMS["w"]}]
        b.join({"w": values[1]}, clock={"gone@3": 320.0})  # out of a checkpoint
        a.join({"w": values[0]}, clock={})
        (root / "roster" / "c.island").write_text(json.dumps({"address": "127.0.0.1:1", "incarnation": 1, "beat": 1}))
        end = time.monotonic() + 60
        while "a" not in b._node.links.members:  # what is exchanged before that counts, and is not due
            assert time.monotonic() < end
            time.sleep(0.01)
        while min(island.status()["exchanged"] for island in islands) < 8:
            assert time.monotonic() < end
            for k, island in enumerate(islands):
                values[k] = island.exchange(values[k], {"w": PARAMS}, delivered=32.0)
            time.sleep(0.01)
        for island in islands:  # nothing moves while it is looked at
            island._node.ledger.is_offered = lambda segment: False
        while any(island._node.ledger._busy for island in islands):
            time.sleep(0.01)
        yield root, islands


def shown(capsys, *args):
    assert main(["islands", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_the_table_has_what_each_island_says(run, capsys):
    root, islands = run
    text = shown(capsys, root / "roster", "--keys", root / "keys")
    title, _, header, *rows = text.splitlines()
    assert title.startswith("2 of 3 islands in the roster answer")
    assert header.split() == [
        *["island", "steps", "clock", "age", "participation", "delivered", "distance", "state", "from"]
    ]
    for island, row in zip(islands, rows, strict=False):
        said = island.status()
        name, steps, clock, age, unit, participation, delivered, distance, *origin = row.split()
        assert (name, int(steps.replace(",", ""))) == (island.name, said["steps"])
        assert int(delivered.replace(",", "")) == 32 * said["steps"]
        assert int(clock.replace(",", "")) >= 320 + 32 * said["steps"]
        assert participation == f"{said['exchanged'] / said['due']:.0%}"
        assert 0 < said["exchanged"] <= said["due"]
        assert unit == "s"
        assert 0 <= float(age) < 120
        assert distance == f"{said['distance']:.3g}"
        assert " ".join(origin) == said["origin"]
    assert rows[2].split() == ["c", "-", "-", "-", "-", "0", "-", "-"]
    assert rows[3].split() == ["gone", "-", "-", "-", "-", "320", "-", "not", "in", "the", "roster"]
    assert "c does not answer: 127.0.0.1:1: connection refused" in rows
    assert re.search("^a, exchange with c: c at 127.0.0.1:1: connection refused$", text, re.MULTILINE)


def test_json_has_the_same(run, capsys):
    root, islands = run
    said = json.loads(shown(capsys, root / "roster", "--keys", root / "keys", "--json"))
    assert said["islands"].keys() == {"a", "b", "c"}
    assert said["gone"] == {"gone": 320.0}
    for island in islands:
        own, found = island.status(), said["islands"][island.name]
        assert {key: found[key] for key in ("steps", "exchanged", "due", "origin")} == {
            key: own[key] for key in ("steps", "exchanged", "due", "origin")
        }
        assert found["delivered"] == 32.0 * own["steps"]
        assert found["participation"] == own["exchanged"] / own["due"]
    assert said["delivered"] == 320.0 + sum(32.0 * island.status()["steps"] for island in islands)
    assert "connection refused" in said["islands"]["c"]["error"]


def test_a_terminal_is_redrawn_until_it_is_interrupted(run, capsys, monkeypatch):
    root, (a, _) = run
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt
        a.exchange(PARAMS, {"w": PARAMS}, delivered=0.0)

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(view.time, "sleep", sleep)
    first = a.status()["steps"]
    text = shown(capsys, root / "roster", "--keys", root / "keys", "--every", "0.5")
    assert slept == [0.5, 0.5, 0.5]
    _, *frames = text.split("\x1b[H\x1b[J")
    assert [int(re.search(r"^a +(\S+)", frame, re.MULTILINE)[1]) for frame in frames] == [first, first + 1, first + 2]


def test_a_roster_that_is_away_for_a_while_does_not_end_the_view(monkeypatch, capsys):
    looked, slept = [], []

    def look(*args, **keys):
        looked.append(0)
        if len(looked) == 1:
            raise OSError("stale file handle")
        return {}

    def sleep(seconds):
        slept.append(0)
        if len(slept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(view, "look", look)
    monkeypatch.setattr(view.time, "sleep", sleep)
    text = shown(capsys, "a=127.0.0.1:1", "--plain-text")
    _, first, second = text.split("\x1b[H\x1b[J")
    assert first.strip() == "the roster could not be read: stale file handle."
    assert second.startswith("0 of 0 islands")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["roster"], r"`islands` must have either `--keys DIR` or, .*, `--plain-text`, got neither\."),
        (["roster", "--keys", "keys", "--plain-text"], r"`islands` must have either .*, got both\."),
        (
            ["no-such-place", "--plain-text"],
            r"ROSTER must be a directory, or .*, got 'no-such-place', which is not there",
        ),
        (["a=1,b", "--plain-text"], r'a roster of addresses must be "a=HOST:PORT,b=HOST:PORT", got \'a=1,b\'\.'),
        (["a=127.0.0.1:1", "--plain-text", "--every", "0"], r"`--every` must be positive, got 0\."),
        (["a=127.0.0.1:1", "--keys", "nowhere"], r"TLS of 'observer' needs the file .*ca\.crt, which is missing"),
        (["dns:no-such-name.invalid:1", "--plain-text"], r"the roster could not be read: .*\."),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(args, error, capsys):
    assert main(["islands", *args]) == 2
    said = capsys.readouterr()
    assert re.match(error, said.err)
    assert said.out == ""


WRONG = [
    None,
    True,
    -1,
    1.5,
    math.nan,
    math.inf,
    10**400,
    "",
    "\x1b[2J\n" * 1000,
    [],
    [[]],
    {},
    {"a": {}},
    {"a@1": 9.0},
]
SAID = {
    "clock": {"a@1": 3.0},
    "steps": 5,
    "total": 3.0,
    "age": 0.1,
    "exchanged": 1,
    "due": 2,
    "origin": "x",
    "donor": True,
}


def test_a_link_that_is_worse_than_others_has_a_line():
    text = view.as_text(view.overview({"a": SAID | {"impaired": {"b": "3 Mbit/s, 40% of the other links"}}}))
    assert text.splitlines()[-1] == "a, link to b: 3 Mbit/s, 40% of the other links"


@pytest.mark.parametrize("field", [*SAID, "distance", "errors", "impaired", "strangers"])
def test_an_island_that_says_what_it_should_not_spoils_no_others_row(field):
    honest = view.as_text(view.overview({"a": SAID})).splitlines()[3]
    for wrong in WRONG:
        found = view.overview({"a": SAID, "b": SAID | {"clock": {"b@1": 3.0}, field: wrong}})
        json.dumps(found, allow_nan=False)
        text = view.as_text(found)
        rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
        assert rows["a"][:8] == honest.split()[:8] or field == "clock"
        assert text.replace("\n", "").isprintable()
        assert max(map(len, text.splitlines())) < 1000
