"""The page about runs: its numbers are those of metrics.jsonl, and its pictures are drawn where they should be."""

import html.parser
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from crossover_jax import topology
from experiments import report_page, svg
from experiments.configs import default
from experiments.mixing_pattern import exchanges
from experiments.settings import as_json
from tests.experiments.helpers import changed

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
RNG = np.random.default_rng(0)


def write_run(folder, *, of_text=False, num_steps=60, **changes):
    """What a run leaves behind: a row each tenth step, an evaluation each twentieth. Returns the rows."""
    folder.mkdir(parents=True)
    rows = []
    for step in range(10, 61, 10):
        row = {"step": step, "epoch": step / 40, "train/loss": 2 / step**0.5 + 0.1 * RNG.random()}
        row |= {"train/accuracy": 0.5, "examples_per_second": 1000 * RNG.random(), "wire_bytes_per_step": 123456.0}
        if of_text:
            row |= {"tokens_per_second": 64 * row["examples_per_second"], "wire_bytes_per_token": 241.125}
        if step % 20 == 0:
            middle = 0.4 + step / 200 + 0.05 * RNG.random()
            row |= {"eval/mean/accuracy": middle, "eval/mean/loss": 1.5 - step / 100}
            row |= {"eval/workers/accuracy": middle - 0.01, "eval/workers/accuracy_min": middle - 0.03}
            row |= {"eval/workers/accuracy_max": middle + 0.02, "consensus_distance": 3 * RNG.random()}
            row |= {"bits_per_byte": row["eval/mean/loss"] / math.log(2)} if of_text else {}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "status.json").write_text(json.dumps({"step": 60, "num_steps": num_steps}))
    config = changed(default.get_config(), **changes)
    (folder / "config.json").write_text(json.dumps(as_json(config)))
    return rows


class Page(html.parser.HTMLParser):
    """Its elements by their paths, and its tables, each a list of rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.tags = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta",):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture
def two_runs(tmp_path):
    rows = [write_run(tmp_path / "one"), write_run(tmp_path / "other", algorithm="sgp", num_steps=100)]
    assert report_page.main([str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    return rows, (tmp_path / "one" / "report.html").read_text()


def test_the_numbers_of_the_page_are_those_of_metrics_jsonl(two_runs):
    rows, text = two_runs
    tables = Page(text).tables
    for of_run in rows:
        evaluated = [row for row in of_run if "consensus_distance" in row]
        expected = [[*evaluated[0]], *([f"{value:.6g}" for value in row.values()] for row in evaluated)]
        assert expected in tables
    results = {name: values for name, *values in tables[0]}
    ends = [of_run[-1] for of_run in rows]
    assert results["accuracy, averaged model"] == [f"{row['eval/mean/accuracy']:.4f}" for row in ends]
    assert results["consensus distance"] == [f"{row['consensus_distance']:.4f}" for row in ends]
    assert results["MB sent by a worker in all"] == [f"{60 * 0.123456:.4g}"] * 2
    assert [["key", "one", "other"], ["algorithm", "crossover", "sgp"]] in tables
    assert "step 60</span>" in text
    assert "step 60 of 100, not at its end" in text


def test_the_page_needs_nothing_from_elsewhere(two_runs):
    _, text = two_runs
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<img|\bsrc=", text)


def test_points_and_bands_are_where_the_ticks_say():
    x, y = [0.0, 1.0, 4.0], [2.0, 7.0, 3.0]
    for is_log in (False, True):
        drawn = svg.chart([svg.Line(1, x, y, [v / 2 for v in y], [v * 2 for v in y])], "what", "epoch", is_log=is_log)
        root = ET.fromstring(drawn)
        scale = np.log if is_log else np.asarray
        places = {kind: [] for kind in "xy"}
        for text in root.iter("text"):
            if re.fullmatch(r"[\d.]+", text.text):
                places[text.get("class")].append((float(text.text), float(text.get(text.get("class")))))
        of_x = np.polyfit(*zip(*places["x"], strict=True), 1)
        of_y = np.polyfit(scale([v for v, _ in places["y"]]), [at for _, at in places["y"]], 1)
        circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
        expected = np.stack([np.polyval(of_x, x), np.polyval(of_y, scale(y))], 1)
        np.testing.assert_allclose(circles, expected, atol=0.05)
        band = np.array([p.split(",") for p in root.find("polygon").get("points").split()], float)[:, 1]
        edges = [*(2 * v for v in y), *(v / 2 for v in reversed(y))]
        np.testing.assert_allclose(band, np.polyval(of_y, scale(edges)), atol=0.05)
        assert [c.find("title").text for c in root.iter("circle")] == ["epoch 0: 2", "epoch 1: 7", "epoch 4: 3"]


def test_what_cannot_be_drawn_is_left_out():
    line = svg.Line(0, [1, 2, 3], [math.nan, -1.0, 2.0])
    assert len(list(ET.fromstring(svg.chart([line], "what", "step")).iter("circle"))) == 2
    assert len(list(ET.fromstring(svg.chart([line], "what", "step", is_log=True)).iter("circle"))) == 1
    assert "No row has" in svg.chart([svg.Line(0, [], [])], "what", "step")
    long = svg.Line(0, range(100_000), range(100_000), is_thin=True)
    assert len(svg.chart([long], "what", "step")) < 30_000


def test_who_hears_whom_is_the_pools_matrices_by_the_table():
    n = 8
    config = default.get_config()
    pool = topology.latin(n, 7, 0)
    table = topology.shuffle(7, 7, seed=0)
    found = exchanges(config, 4)
    assert [own.step for own in found] == [0, 1, 2, 3]
    for own in found:
        matrices = [pool.matrix(p) for p in table[own.step]]
        np.testing.assert_allclose(own.layer, matrices[0], atol=1e-6)
        np.testing.assert_allclose(own.model, np.mean(matrices, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"algorithm": "outer", "outer__every": 5, "outer__wire": "int8"}, [4, 9]),
        ({"crossover__renew_every": 50}, [0, 1]),
        ({"crossover__local_steps": 3}, [2, 5]),
        ({"crossover__momentum_rounds": 1, "crossover__cut": "rows"}, [0, 1]),
        ({"algorithm": "crossover_paper"}, [0, 1]),
    ],
    ids=str,
)
def test_exchanges_come_when_they_are_due_and_keep_the_average(changes, steps):
    found = exchanges(changed(default.get_config(), **changes), 2)
    assert [own.step for own in found] == steps
    for own in found:
        np.testing.assert_allclose(own.model.sum(0), 1, atol=0.02)
        np.testing.assert_allclose(own.model.sum(1), 1, atol=0.02)


def test_a_ring_is_a_ring_and_where_gradients_travel_parameters_do_not():
    (own,) = exchanges(changed(default.get_config(), algorithm="d_psgd"), 1)
    np.testing.assert_allclose(own.model, topology.ring(8).matrix(0), atol=1e-6)
    for name in ("allreduce", "alone"):
        assert exchanges(changed(default.get_config(), algorithm=name), 1) == []


def test_text_has_bits_per_byte_and_no_common_page_with_images(tmp_path, capsys):
    rows = write_run(tmp_path / "text", of_text=True)
    write_run(tmp_path / "image")
    out = tmp_path / "page.html"
    assert report_page.main([str(tmp_path / "text"), f"--out={out}"]) == 0
    results = dict(Page(out.read_text()).tables[0][1:])
    assert results["bits per byte, averaged model"] == f"{rows[-1]['bits_per_byte']:.4f}"
    assert results["bytes sent per token"] == "241.1"
    assert f"step 60: {rows[-1]['bits_per_byte']:.6g}" in out.read_text()
    assert report_page.main([str(tmp_path / "text"), str(tmp_path / "image")]) == 1
    assert "error: `WORKDIR` must name runs of text or runs of images, got both" in capsys.readouterr().err


def test_a_folder_without_a_run_is_one_sentence(tmp_path, capsys):
    assert report_page.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"error: `WORKDIR` must hold the metrics.jsonl of a run with at least one row, got {tmp_path}.\n"
    )


def test_a_run_that_recorded_no_config_is_shown_without(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    run = report_page.read_run(tmp_path / "run", "run<&>")
    text = report_page.page([run])
    Page(text)
    assert "Nothing recorded the config" in text
    assert "run&lt;&amp;&gt;" in text
    broken = run._replace(config={**as_json(default.get_config()), "algorithm": "gone"})
    assert "This version cannot build the algorithm" in report_page.pattern(broken)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome here, and $CHROMIUM names none")
@pytest.mark.parametrize("width", [500, 1200])  # headless Chromium's windows are at least 500 wide
def test_a_browser_lays_the_page_out_within_its_width(two_runs, width, tmp_path):
    _, text = two_runs
    page = pathlib.Path(tmp_path, "measured.html")
    narrow = "<style>html { max-width: 400px; }</style>" if width == 500 else ""
    measure = """<script>
    document.querySelectorAll("details").forEach(e => { e.open = true });
    const hidden = [...document.querySelectorAll("svg")].filter(e => e.getBoundingClientRect().width < 50);
    document.title = hidden.length + " " + document.body.scrollWidth;
    </script>"""
    page.write_text(text.replace("</head>", f"{narrow}</head>").replace("</body>", f"{measure}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *flags, f"--window-size={width},900", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    hidden, needed = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    assert hidden == 0
    assert needed <= (400 if narrow else width)
