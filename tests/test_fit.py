"""Measurements made up from known links, read back."""

import numpy as np
import pytest

from benchmarks.network import fit
from benchmarks.network.hosts import bits_per_second
from benchmarks.rows import append_rows, read_rows


@pytest.mark.parametrize(("latency", "slowdown"), [(0.004, 1.07), (0.0, 1.3)])
def test_a_fit_finds_the_links_that_measurements_were_made_up_with(latency, slowdown):
    rows = []
    for algorithm in ("sgp", "crossover/7", "crossover/7/during", "allreduce", "alone"):
        for rate in ("50mbit", "1gbit"):
            for hosts in (2, 8):
                share = {"allreduce": 2 * (hosts - 1) / hosts, "alone": 0}.get(algorithm, 1)
                waits = {"allreduce": 2 * (hosts - 1), "alone": 0}.get(algorithm, 1)
                exchange = waits * latency + slowdown * 8 * share * 4e6 / bits_per_second(rate)
                step = max(0.1, exchange) if "during" in algorithm else 0.1 + exchange
                rows.append({"algorithm": algorithm, "hosts": hosts, "rate": rate, "compute_s": 0.1})
                rows[-1] |= {"step_s": step, "payload_bytes": share * 4e6}
    found = fit.fit(rows)
    assert (found.latency, found.slowdown) == (pytest.approx(latency, abs=1e-9), pytest.approx(slowdown))
    np.testing.assert_allclose(found.predict(rows), [row["step_s"] for row in rows])
    assert max(found.errors(rows)) < 1e-9
    others = [{**row, "step_s": wrong * row["step_s"]} for row, wrong in zip(rows[:3], (1.25, 2, 0.5), strict=True)]
    nothing = {**rows[-1], "step_s": 9.0}  # has no exchange to be wrong about
    of_steps, of_exchanges = found.errors([*others, nothing])
    assert of_steps == pytest.approx(0.5)  # the median of 0.2, 0.5 and 1
    exchanges = [
        abs((row["step_s"] - 0.1) / (other["step_s"] - 0.1) - 1) for row, other in zip(rows, others, strict=False)
    ]
    assert of_exchanges == pytest.approx(np.median(exchanges))
    for name in ("during", "sgp"):  # neither beside the gradient nor by one size at two rates alike can it be told
        few = [row for row in rows if name in row["algorithm"] and (name == "during" or row["rate"] == "1gbit")]
        with pytest.raises(ValueError, match="of several sizes or rates, to tell latency from rate"):
            fit.fit(few)


def row(step, payload, rate="8mbit"):
    return {"algorithm": "sgp", "hosts": 4, "rate": rate, "compute_s": 0.0, "step_s": step, "payload_bytes": payload}


def test_a_fit_weighs_relative_errors_and_finds_nothing_negative():
    """Many small exchanges at the nominal rate outweigh a large one that took half as long again."""
    small = [row(payload / 1e6, payload) for payload in (1e4, 2e4, 3e4)]
    assert fit.fit([*small, row(1.5, 1e6)]).slowdown < 1.2
    early = fit.fit([row(2.2 * size - 0.05, 1e6 * size) for size in (1, 2, 3)])
    assert early.latency == 0
    assert early.slowdown == pytest.approx(2.16, abs=0.03)
    flat = fit.fit([row(1.0 - 0.01 * size, 1e6 * size) for size in (1, 2, 3)])
    assert flat.slowdown == 0
    assert flat.latency == pytest.approx(0.98, abs=0.01)


def test_the_command_prints_the_fit_and_refuses_in_one_line(capsys, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "algorithm,hosts,rate,compute_s,step_s,payload_bytes\nsgp,4,8mbit,0,2.2,2000000\nsgp,4,16mbit,0,1.1,2000000\n"
    )
    fit.main([str(path)])
    assert "1.100 times the transfer" in capsys.readouterr().out
    other = tmp_path / "y.csv"
    other.write_text(path.read_text().replace(",2.2,", ",2.75,").replace(",1.1,", ",1.375,"))
    fit.main([str(path), "--check", str(other)])
    assert (
        "1.100 times the transfer at the nominal rate; median error of steps 20.0 %, of exchanges 20.0 %"
        in capsys.readouterr().out
    )
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("a,b\n1,2\n")
    for arguments, message in (
        ([tmp_path / "none.csv"], "none.csv must be a CSV file, there is none."),
        ([wrong], "it lacks algorithm, hosts"),
        ([path, "--check", wrong], "it lacks algorithm, hosts"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            fit.main([*map(str, arguments)])


def test_rows_that_are_added_twice_have_one_header_and_come_back_in_their_order(tmp_path):
    path = tmp_path / "x.csv"
    assert read_rows(path) == []
    for rows in ([{"a": 1, "b": "x,y"}], [{"a": 2.5, "b": ""}, {"a": 3, "b": "z"}]):
        append_rows(path, ("a", "b"), rows)
    assert path.read_text().splitlines()[0] == "a,b"
    assert read_rows(path) == [{"a": "1", "b": "x,y"}, {"a": "2.5", "b": ""}, {"a": "3", "b": "z"}]
