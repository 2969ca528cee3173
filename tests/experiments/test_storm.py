"""A storm over islands: what it plans and reads by itself, and a small one with real processes."""

import asyncio
import csv
import math
import pathlib
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from experiments.islands import faults, fleet, hooks, links, measures, picture, storm
from experiments.islands.faults import Event, Planned
from experiments.islands.fleet import Life
from experiments.islands.measures import Track

ROOT = pathlib.Path(__file__).parents[2]

# The plan


def test_a_schedule_has_all_faults_and_is_a_function_of_its_seed():
    plan = faults.schedule(3, with_links=True)
    assert plan == faults.schedule(3, with_links=True) != faults.schedule(4, with_links=True)
    assert {planned.fault for planned in plan} == set(faults.FAULTS)
    for fault in faults.AIMED:
        assert {planned.window for planned in plan if planned.fault == fault} == set(hooks.WINDOWS)
    without = {planned.fault for planned in faults.schedule(3, with_links=False)}
    assert without == set(faults.FAULTS) - set(faults.OF_LINKS)


def test_a_fault_is_named_with_its_window():
    assert Planned.of("killed:between segments") == Planned("killed", "between segments")
    assert Planned.of("slow") == Planned("slow", faults.ANY)
    for wrong in ("shot", "killed:asleep", "slow:idle"):
        with pytest.raises(ValueError, match=f"got '{wrong}'"):
            Planned.of(wrong)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--islands=1"], "at least 2"),
        (["--faults=shot"], "got 'shot'"),
        (["--faults=partition", "--network=no"], "must be without"),
    ],
)
def test_what_cannot_be_is_one_line(line, said, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        storm.parse([f"--workdir={tmp_path / 'storm'}", *line])
    assert said in capsys.readouterr().err


# Hooks


class Recorded(hooks.Control):
    """A control whose signals are only written down."""

    def __init__(self, folder, seen):
        super().__init__(folder)
        self.seen = seen

    def hit(self, window):
        if self.is_aimed(window):
            (self.folder / "aim").unlink()
            self.seen.append(window)


@pytest.fixture
def control(tmp_path):
    found = Recorded(tmp_path, [])
    yield found
    found.exchanges.close()


def aim(control, window):
    (control.folder / "aim").write_text(f"{window} 9")


def test_half_of_a_segment_is_sent_when_the_signal_comes_and_all_if_it_goes_on(control):
    control.seen = sent = []
    writer = hooks.HalfWriter(types.SimpleNamespace(write=lambda data: sent.append(bytes(data))), control, size=8)
    writer.write(b"{}")  # what is said before the segment
    aim(control, hooks.SENDING)
    writer.write(memoryview(b"abcdefgh"))
    assert sent == [b"{}", b"abcd", hooks.SENDING, b"efgh"]


def test_half_of_a_segment_has_come_when_the_signal_comes(control):
    async def read():
        stream = asyncio.StreamReader()
        stream.feed_data(b"12abcdefgh")
        reader = hooks.HalfReader(stream, control, size=8)
        return await reader.readexactly(2), await reader.readexactly(8)

    aim(control, hooks.RECEIVING)
    assert asyncio.run(read()) == (b"12", b"abcdefgh")
    assert control.seen == [hooks.RECEIVING]


def test_a_signal_comes_once_and_only_in_its_window(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(hooks.os, "kill", lambda pid, number: sent.append(number))
    control = hooks.Control(tmp_path)
    aim(control, hooks.IDLE)
    control.hit(hooks.SENDING)
    assert not sent
    control.hit(hooks.IDLE)
    control.hit(hooks.IDLE)
    control.exchanges.close()
    assert sent == [signal.SIGKILL]
    assert float((tmp_path / "hit").read_text()) > 0


def test_the_pace_is_the_flag_s_until_another_is_given(control):
    assert control.pace(0.1) == 0.1
    (control.folder / "pace").write_text("500")
    assert control.pace(0.1) == 0.5


# What is read from the islands' lines


def a_track(ends, lives=None, exchanges=(), took=None):
    ends = np.array(ends, float)
    took = np.diff(ends, prepend=np.nan) if took is None else np.array(took)
    lives = lives or [Life("a", ends[0] - 5)]
    return Track(lives, ends, took, np.zeros(len(ends)), ends, ends, np.array(exchanges, float))


def test_steps_are_as_long_as_the_time_between_them_and_a_torn_line_is_none(tmp_path):
    (tmp_path / "steps").write_text("10.0 1 0.1 0.01 2.0\n10.5 2 0.1 0.01 1.9\n11.0 3 0.1 0.0\n90.0 4 0.2 0.02 1.8\n91")
    made = types.SimpleNamespace(
        lives=[Life("a", 5.0, 12.0, -9), Life("b", 6.0), Life("a", 80.0)],
        steps=lambda name: tmp_path / "steps",
        control=lambda name: tmp_path,
    )
    found = measures.track(made, "a")
    np.testing.assert_array_equal(found.ends, [10.0, 10.5, 90.0])
    np.testing.assert_array_equal(found.took, [math.nan, 0.5, math.nan])  # of a life's first step nothing is known
    np.testing.assert_array_equal(found.exchange, [0.01, 0.01, 0.02])
    assert len(found.exchanges) == 0
    assert [life.began for life in found.lives] == [5.0, 80.0]


def test_how_long_a_victim_needs_counts_from_its_start():
    lives = [Life("v", 0.0, 50.0, -9), Life("v", 52.0)]
    tracks = {"v": a_track([10, 40, 60, 61], lives, exchanges=[11, 63])}
    killed = Event("killed", "idle", ("v",), 50.0, 52.0, True)
    assert measures.returns(killed, tracks) == (8.0, 11.0)
    assert all(map(math.isnan, measures.returns(Event("slow", "any time", ("v",), 50.0, 50.0), tracks)))
    never = Event("killed", "idle", ("v",), 70.0, 72.0, True)
    assert measures.returns(never, tracks) == (math.inf, math.inf)


def test_a_line_of_the_table_sees_those_that_were_there_and_are_not_slow():
    fast, hurt = np.arange(0, 100, 0.1), np.arange(0, 100, 0.1)
    hurt[(hurt > 50) & (hurt < 51)] = np.nan
    tracks = {
        "a": a_track(hurt[np.isfinite(hurt)], exchanges=np.arange(0, 100, 0.5)),
        "b": a_track(fast, [Life("b", 0.0, 50.0, -9), Life("b", 50.0)], exchanges=np.arange(0, 100, 0.5)),
        "c": a_track(np.arange(0, 100, 0.5), exchanges=[3, 52.5]),
        "late": a_track(np.arange(55, 100, 0.1)),
    }
    events = [Event("slow", "any time", ("c",), 20.0, 20.0), Event("killed", "idle", ("b",), 50.0, 50.0, True)]
    view = {"a": {"due": 0, "exchanged": 0, "total": 1.0}}
    later = {"a": {"due": 20, "exchanged": 15, "total": 9.0}}
    row = measures.row_of(2, events[1], events, tracks, [(49.0, view), (60.5, later)], ready=5.0)
    assert row["survivors"] == "a"
    assert row["at_s"] == 45.0
    assert row["step_max_ms"] == pytest.approx(1050, rel=0.06)
    assert row["calm_max_ms"] == pytest.approx(100, rel=0.01)
    assert row["next_exchange_s"] == 0.5
    assert row["participation"] == 0.75


BEFORE = {"a": {"incarnation": 1, "errors": {}}, "v": {"incarnation": 1, "errors": {}}}


@pytest.mark.parametrize(
    ("fault", "after", "said"),
    [
        ("killed", {"a": BEFORE["a"], "v": {"error": "connection refused"}}, "v does not answer: connection refused"),
        ("killed", {"a": BEFORE["a"]}, "v is not in the roster"),
        ("killed", {**BEFORE, "v": {"incarnation": 2, "origin": "a, at its step 7"}}, "v is new, its state from a, at"),
        ("stopped", {**BEFORE, "a": {"incarnation": 1, "errors": {"v": "mute"}}}, "a, exchange with v: mute"),
        ("link down", {**BEFORE, "v": {"incarnation": 1, "errors": {"a": "mute"}}}, "v, exchange with a: mute"),
        ("half bandwidth", {**BEFORE, "a": {"incarnation": 1, "impaired": {"v": "3 Mbit/s"}}}, "a, link to v: 3 Mbit"),
        ("packet loss", {**BEFORE, "v": {"incarnation": 1, "impaired": {"a": "1% of packets"}}}, "v, link to a: 1% of"),
        ("packet loss", {**BEFORE, "v": {"incarnation": 1, "impaired": {"a": "3 Mbit/s"}}}, ""),
        ("partition", {**BEFORE, "v": {"incarnation": 1, "impaired": {"a": "1% of packets"}}}, ""),
        ("stopped", BEFORE, ""),
    ],
)
def test_a_look_names_a_fault(fault, after, said):
    event = Event(fault, "idle", ("v",), 10.0, 12.0, fault == "killed")
    seconds, words = measures.named_in(event, [(9.0, BEFORE), (10.4, BEFORE), (13.0, after), (30.0, {})])
    assert words.startswith(said or "no")
    assert seconds == 3.0 if said else math.isnan(seconds)


def test_a_slow_island_is_named_by_its_steps():
    def view(steps, slow):
        return {name: {"incarnation": 1, "steps": n} for name, n in (("a", steps), ("b", steps), ("v", slow))}

    views = [(10.0 + t, view(10 * t, 2 * t)) for t in range(1, 9)]
    seconds, words = measures.named_in(Event("slow", "any time", ("v",), 10.0, 10.0), [(9.5, view(0, 0)), *views])
    assert seconds == 5.0
    assert words == "v makes 20% of the others' steps"


def test_who_ends_without_being_hit_is_told():
    lives = [
        Life("a", 0.0, 50.0, -9),  # hit
        Life("a", 50.0, 99.5, 75),  # at the end
        Life("b", 0.0, 70.0, -9),  # the system's own, when memory is short
        Life("c", 0.0, 60.0, 1),
        Life("d", 0.0),
    ]
    events = [Event("killed", "idle", ("a",), 49.9, 50.0, True)]
    found = storm.by_themselves(types.SimpleNamespace(lives=lives), events, ended=99.0)
    assert [life.name for life in found] == ["b", "c"]


def test_a_picture_of_all_faults(tmp_path):
    ends = np.arange(1, 100, 0.5)
    tracks = {name: a_track(ends, [Life(name, 0.0, 40.0, -9), Life(name, 41.0)]) for name in "abc"}
    events = [
        Event(fault, "any time", ("a", "b") if fault == "partition" else ("b",), 10.0 + 5 * i, 12.0 + 5 * i)
        for i, fault in enumerate(faults.FAULTS)
    ]
    picture.draw(tmp_path / "storm.png", events, tracks, [{"at": 5.0, "loss": 2.0}], 0.0, 100.0, "three islands")
    assert (tmp_path / "storm.png").stat().st_size > 10_000


# With real processes


@pytest.mark.tools
def test_what_an_island_comes_back_with(tmp_path):
    made = fleet.Fleet(tmp_path, [], {}, islands=1)
    own = tmp_path / "a" / fleet.FOLDER
    for step in ("50", "100"):
        (own / step).mkdir(parents=True)
    made.keep("a")
    (own / "150").mkdir()
    made.make_old("a")
    assert [path.name for path in own.iterdir()] == ["100"]
    made.make_empty("a")
    assert not (tmp_path / "a").exists()
    made.close()


TINY = [
    "--config=experiments/configs/lm.py",
    "--",
    "--config.dataset.data_dir=experiments/*.py",
    "--config.dataset.eval_split=validation",
    "--config.model.options={'num_layers': 1, 'width': 16, 'num_heads': 2, 'mlp_width': 32, 'dtype': 'float32'}",
    "--config.batch_size=16",
    "--config.eval_batch_size=64",
    "--config.crossover.segments=4",
]


@pytest.mark.tools
def test_a_small_storm_ends_nobody_but_its_victims(tmp_path):
    folder = tmp_path / "storm"
    own = [f"--workdir={folder}", "--islands=2", "--pace_ms=100", "--calm=0", "--faults=killed:sending,stopped:idle"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.islands.storm", *own, *TINY], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed, stopped = csv.DictReader((folder / "events.csv").read_text().splitlines())
    assert (killed["fault"], killed["window"]) == ("killed", "sending")
    assert (stopped["fault"], stopped["window"]) == ("stopped", "idle")
    for row in (killed, stopped):
        assert float(row["back_to_step_s"]) > 0
        assert float(row["back_to_exchange_s"]) > 0
        assert row["named"] != "no"
    log = (folder / "logs" / killed["victims"]).read_text()
    assert log.count(" begins from ") == 2
    assert "ended without being hit: none" in done.stdout
    assert "SIGTERM ended them with: 75" in done.stdout
    assert (folder / "storm.png").exists()
    assert len((folder / "means.csv").read_text().splitlines()) > 1


LAB = """
import subprocess, sys
from benchmarks.network import hosts
from experiments.islands.links import linked
hosts.enter()
SERVE = "import socket; s = socket.create_server(('10.99.0.1', 9)); [s.accept()[0].close() for _ in range(10**6)]"
ASK = '''
import socket, sys
for _ in range(int(sys.argv[1])):
    try:
        socket.create_connection(("10.99.0.1", 9), timeout=0.3).close()
        print("+", end="")
    except OSError:
        print("-", end="")
'''
with linked(["a", "b"], "100mbit") as links:
    server = subprocess.Popen([*links.inside("a"), sys.executable, "-c", SERVE])
    def ask(times=1, inside="b"):
        where = links.inside(inside) if inside else []
        return subprocess.run([*where, sys.executable, "-c", ASK, str(times)], capture_output=True, text=True).stdout
    while ask() == "-":
        pass
    found = [ask(), ask(inside=None)]
    links.down("a"); found.append(ask()); links.repair("a"); found.append(ask(3)[-1])
    links.part(["a"]); found += [ask(), ask(inside=None)]; links.heal(); found.append(ask(3)[-1])
    links.lose("a", 0.4); lost = ask(30); links.repair("a")
    links.halve("a")
    shown = subprocess.run(["tc", "qdisc", "show", "dev", "port0"], capture_output=True, text=True).stdout
    links.repair("a")
    print("".join(found), "+" in lost and "-" in lost, ask(10), "rate 50Mbit" in shown)
    server.kill()
"""


@pytest.mark.tools
@pytest.mark.skipif(bool(links.why_not()), reason=links.why_not())
def test_a_link_is_cut_halved_made_lossy_and_repaired():
    done = subprocess.run([sys.executable, "-c", LAB], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["++-+-++", "True", 10 * "+", "True"], done.stdout + done.stderr
