"""The grid of measurements: every cell once, also after an interruption, and what the picture shows."""

import csv
import math

import pytest

from benchmarks.network import grid

pytestmark = pytest.mark.tools

pytestmark = pytest.mark.tools


@pytest.mark.parametrize(("flags", "cells"), [([], 4 * 3 * 3), (["--speed_up"], 3)])
def test_every_cell_is_measured_once_and_after_an_end_only_what_is_missing(tmp_path, monkeypatch, flags, cells):
    out, calls = tmp_path / "x.csv", []

    def measure(command):
        """In place of `scaling.py`: a row of zeros for each algorithm, until it fails."""
        given = dict(zip(command[3::2], command[4::2], strict=True))
        if len(calls) == 2:
            calls.append(None)
            return 3
        calls.append(given)
        with open(out, "a", newline="") as file:
            writer = csv.DictWriter(file, ["algorithm", "hosts", "rate", "params", "compute_s", "step_s"])
            if not file.tell():
                writer.writeheader()
            for name in given["--algorithms"].split(","):
                row = {key: given[f"--{key}"] for key in ("hosts", "rate", "params")}
                writer.writerow(
                    row | {"algorithm": name, "compute_s": round(float(given["--compute_s"]), 4), "step_s": 1}
                )
        return 0

    monkeypatch.setattr(grid.subprocess, "call", measure)
    with pytest.raises(SystemExit) as ended:
        grid.main(["--out", str(out), *flags])
    assert ended.value.code == 3
    grid.main(["--out", str(out), *flags])
    grid.main(["--out", str(out), *flags])
    done = [call for call in calls if call]
    assert len(done) == cells
    assert len({(call["--hosts"], call["--rate"], call["--compute_s"]) for call in done}) == cells


def test_the_picture_shows_log2_of_the_speed_up_from_four_hosts_and_seconds_of_the_grid():
    seconds = {4: 8.0, 8: 4.0, 16: 3.0}
    common = {"rate": "100mbit", "algorithm": "allreduce"}
    speed_up = [{**common, "hosts": str(n), "compute_s": "0", "step_s": str(s)} for n, s in seconds.items()]
    of_grid = [
        {**common, "rate": rate, "hosts": "2", "compute_s": "0.4", "step_s": "0.7"} for rate in ("200mbit", "1gbit")
    ]
    left, *others = grid.draw(of_grid, speed_up).axes
    (ours,) = [line for line in left.lines if line.get_label() == "allreduce"]
    assert ours.get_xydata().tolist() == [[4, 0], [8, 1], [16, math.log2(8 / 3)]]
    assert [line.get_xydata().tolist() for axes in others for line in axes.lines if len(line.get_xdata()) == 1] == [
        [[2, 0.7]]
    ]
