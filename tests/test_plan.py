"""What a step takes on given links, against counts by hand; and measurements made up from known links, read back."""

import numpy as np
import pytest

from crossover_jax import plan
from crossover_jax.__main__ import main

LINK = plan.Link(rate=100e6, latency=1e-3)  # a million float32 take 40 ms


def step_of(name, wire="float32", *, workers=16, compute=0.09, link=LINK, inside=0.0):
    (found,) = (w for w in plan.ways(1e6, workers, compute, link, inside) if (w.name, w.wire) == (name, wire))
    return found


def test_steps_are_those_counted_by_hand():
    ring = 4 * 1e-3 + 2 * 15 / 16 * 0.04  # 79 ms
    assert step_of("allreduce").step == pytest.approx(0.09 + ring)
    assert step_of("allreduce, beside the backward pass").step == pytest.approx(0.03 + ring)  # a third is forward
    assert step_of("crossover").step == pytest.approx(0.09 + 0.041)
    assert step_of("crossover, during").step == pytest.approx(0.09)
    assert step_of("crossover, during", compute=0.02).step == pytest.approx(0.041)
    assert step_of("crossover, 3 rounds", "int8").sent == 3 * 65 / 64 * 1e6
    assert step_of("crossover, 3 rounds", "int8").transfer == pytest.approx(3 * (1e-3 + 65 / 64 * 0.01))
    # 41 ms beside steps of 15 take three of them, a third of the model in each.
    streamed = step_of("crossover, streamed over 3 steps", compute=0.015)
    assert (streamed.sent, streamed.step) == (pytest.approx(4e6 / 3), pytest.approx(0.015))


def test_gradients_averaged_inside_a_worker_hide_behind_its_backward_pass_first():
    assert step_of("crossover, during", inside=0.05).step == pytest.approx(0.09)
    assert step_of("crossover, during", inside=0.08).step == pytest.approx(0.11)
    assert step_of("allreduce, beside the backward pass", inside=0.05, workers=2).step == pytest.approx(0.121)


def test_the_fastest_comes_first_and_fewer_bytes_before_more():
    found = plan.ways(1e6, 16, 1.0, LINK)
    assert [(way.step, way.sent) for way in found] == sorted((way.step, way.sent) for way in found)
    assert (found[0].name, found[0].wire) == ("crossover, during", "int8")


def test_gossip_s_time_does_not_depend_on_the_number_of_workers_and_all_reduce_s_does():
    assert len({step_of("crossover", workers=n).step for n in (2, 64, 10_000)}) == 1
    times = [step_of("allreduce", workers=n).transfer for n in (2, 16, 256)]
    assert times == sorted(times)
    assert times[0] == pytest.approx(1e-3 + 0.04)  # two workers swap


def saved(rate, workers=16):
    link = plan.Link(rate, LINK.latency)
    of_gossip, of_allreduce = (
        step_of(name, workers=workers, link=link).step
        for name in ("crossover, during", "allreduce, beside the backward pass")
    )
    return 1 - of_gossip / of_allreduce


def test_between_the_rates_where_gossip_pays_it_saves_5_percent_and_beyond_them_less():
    low, high = plan.where_it_pays(1e6, 16, 0.09, LINK)
    assert low == plan.RATES[0]
    assert saved(high) > 0.05 > saved(1.02 * high)
    assert high == pytest.approx(7.5e6 / (0.09 / 0.95 - 0.034), rel=0.02)  # 0.03 + 0.004 + 7.5e6 / rate = 0.09 / 0.95
    low, high = plan.where_it_pays(1e6, 2, 0.09, LINK)  # two workers send the same: slow links leave nothing to save
    assert saved(0.98 * low, 2) < 0.05 < saved(low, 2)
    assert saved(high, 2) > 0.05 > saved(1.02 * high, 2)
    assert plan.where_it_pays(1.0, 2, 1e9, plan.Link(1e9, 0.0)) is None
    waiting = plan.where_it_pays(1.0, 16, 0.0, plan.Link(1e9, 10.0))
    assert waiting == (plan.RATES[0], plan.RATES[-1])


def test_groups_average_among_members_and_then_send_their_parts():
    found = {own.gossiping: own for own in plan.groups(1e6, 12, 0.09, LINK)}
    assert {n: own.members for n, own in found.items()} == {2: 6, 3: 4, 4: 3, 6: 2, 12: 1}
    averaging = 2e-3 + 2 * 3 / 4 * 0.04
    assert found[3].averaging == pytest.approx(averaging)
    assert found[3].step == pytest.approx(max(0.09, 0.03 + averaging))
    assert found[12].step == pytest.approx(0.09)
    assert found[12].averaging == 0.0
    # Without compute the link carries both, one after the other.
    busy = {own.gossiping: own.step for own in plan.groups(1e6, 12, 0.0, LINK, inside=1e-3)}
    assert busy[3] == pytest.approx(averaging + 1e-3 + 0.01)
    assert busy[12] == pytest.approx(0.041)


@pytest.mark.parametrize(("latency", "slowdown"), [(0.004, 1.07), (0.0, 1.3)])
def test_a_fit_finds_the_links_that_measurements_were_made_up_with(latency, slowdown):
    rows = []
    for algorithm in ("sgp", "crossover/7", "crossover/7/during", "allreduce", "alone"):
        for rate in ("50mbit", "1gbit"):
            for hosts in (2, 8):
                share = {"allreduce": 2 * (hosts - 1) / hosts, "alone": 0}.get(algorithm, 1)
                waits = {"allreduce": 2 * (hosts - 1), "alone": 0}.get(algorithm, 1)
                exchange = waits * latency + slowdown * 8 * share * 4e6 / plan.bits_per_second(rate)
                step = max(0.1, exchange) if "during" in algorithm else 0.1 + exchange
                rows.append({"algorithm": algorithm, "hosts": hosts, "rate": rate, "compute_s": 0.1})
                rows[-1] |= {"step_s": step, "payload_bytes": share * 4e6}
    found = plan.fit(rows)
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
            plan.fit(few)


def row(step, payload, rate="8mbit"):
    return {"algorithm": "sgp", "hosts": 4, "rate": rate, "compute_s": 0.0, "step_s": step, "payload_bytes": payload}


def test_a_fit_weighs_relative_errors_and_finds_nothing_negative():
    """Many small exchanges at the nominal rate outweigh a large one that took half as long again."""
    small = [row(payload / 1e6, payload) for payload in (1e4, 2e4, 3e4)]
    assert plan.fit([*small, row(1.5, 1e6)]).slowdown < 1.2
    early = plan.fit([row(2.2 * size - 0.05, 1e6 * size) for size in (1, 2, 3)])
    assert early.latency == 0
    assert early.slowdown == pytest.approx(2.16, abs=0.03)
    flat = plan.fit([row(1.0 - 0.01 * size, 1e6 * size) for size in (1, 2, 3)])
    assert flat.slowdown == 0
    assert flat.latency == pytest.approx(0.98, abs=0.01)


def test_the_command_prints_the_table_and_refuses_in_one_line(capsys, tmp_path):
    given = ["plan", "--params", "25.6e6", "--workers", "64", "--compute-ms", "200", "--dcn-gbps", "25"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "64 workers, 25.6 million parameters, 200 ms of compute, links of 25 Gbit/s, 50 µs" in said
    assert ["crossover,", "during", "float32", "102.4", "MB", "32.82", "ms", "200", "ms"] in [
        line.split() for line in said.splitlines()
    ]
    path = tmp_path / "x.csv"
    path.write_text(
        "algorithm,hosts,rate,compute_s,step_s,payload_bytes\nsgp,4,8mbit,0,2.2,2000000\nsgp,4,16mbit,0,1.1,2000000\n"
    )
    assert main(["plan", "--fit", str(path)]) == 0
    assert "1.100 times the transfer" in capsys.readouterr().out
    other = tmp_path / "y.csv"
    other.write_text(path.read_text().replace(",2.2,", ",2.75,").replace(",1.1,", ",1.375,"))
    assert main(["plan", "--fit", str(path), "--check", str(other)]) == 0
    assert (
        "1.100 times the transfer at the nominal rate; median error of steps 20.0 %, of exchanges 20.0 %"
        in capsys.readouterr().out
    )
    wrong_file = tmp_path / "wrong.csv"
    wrong_file.write_text("a,b\n1,2\n")
    for wrong, message in (
        (given[:-2], "--dcn-gbps must be given"),
        ([*given, "--workers", "1"], "`workers` must be at least 2, got 1"),
        ([*given, "--dcn-gbps", "-1"], "`--dcn-gbps` must be positive, got -1"),
        ([*given, "--chips", "4"], "--ici-gbps must be given"),
        ([*given, "--chips", "0"], "`--chips` must be positive, got 0"),
        ([*given, "--dcn-us", "-1"], "`--dcn-us` must not be negative, got -1"),
        (["plan", "--fit", str(tmp_path / "none.csv")], "none.csv cannot be read: No such file"),
        (["plan", "--fit", str(wrong_file)], "it lacks algorithm, hosts"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
