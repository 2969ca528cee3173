"""What a step takes on given links, against counts by hand."""

import math
import pathlib
import re

import numpy as np
import optax
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


def test_outer_steps_are_counted_by_hand():
    found = {(way.name, way.wire): way for way in plan.outer_ways(1e6, 16, 0.01, LINK, every=(4, 16))}
    ring = 4 * 1e-3 + 2 * 15 / 16 * 0.04  # 79 ms
    assert found["DiLoCo, every 4", "float32"].step == pytest.approx(0.01 + ring / 4)
    assert found["gossip outer, every 4", "float32"].step == pytest.approx(0.01 + 0.041 / 4)
    assert found["gossip outer, every 4, overlapped", "float32"].step == pytest.approx(0.041 / 4)  # it does not fit
    assert found["gossip outer, every 16, overlapped", "float32"].step == pytest.approx(0.01)
    int4 = found["gossip outer, every 16, overlapped", "int4"]
    assert int4.sent == pytest.approx(33 / 64 * 1e6 / 16)
    assert int4.transfer == pytest.approx(1e-3 + 33 / 64 * 0.01)
    with pytest.raises(ValueError, match=r"`every` must be at least 1, got 0\."):
        plan.outer_ways(1e6, 16, 0.01, LINK, every=(0,))


def test_the_command_shows_outer_steps_and_bytes_per_token(capsys):
    links = ["--params", "1e6", "--workers", "16", "--compute-ms", "10", "--dcn-gbps", "0.8"]
    assert main(["plan", *links, "--every", "16", "--tokens", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "Less often" in shown
    lines = [line.split() for line in shown.splitlines() if line.startswith("gossip outer, every 16, overlapped")]
    (line,) = (line for line in lines if "float32" in line)
    assert line[-8:] == ["0.25", "MB", "40.05", "ms", "10", "ms", "250", "B"]


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


def test_the_command_prints_the_table_and_refuses_in_one_line(capsys):
    given = ["plan", "--params", "25.6e6", "--workers", "64", "--compute-ms", "200", "--dcn-gbps", "25"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "64 workers, 25.6 million parameters, 200 ms of compute, links of 25 Gbit/s, 50 µs" in printed
    assert ["crossover,", "during", "float32", "102.4", "MB", "32.82", "ms", "200", "ms"] in [
        line.split() for line in printed.splitlines()
    ]
    for wrong, message in (
        (["--workers", "1"], "`workers` must be at least 2, got 1."),
        (["--params", "0"], "`--params` must be positive, got 0."),
        (["--dcn-gbps", "-1"], "`--dcn-gbps` must be positive, got -1."),
        (["--chips", "4"], "`--ici-gbps` must be positive for 4 chips, got nothing."),
        (["--chips", "4", "--ici-gbps", "0"], "`--ici-gbps` must be positive for 4 chips, got 0."),
        (["--chips", "0"], "`--chips` must be positive, got 0."),
        (["--dcn-us", "-1"], "`--dcn-us` must not be negative, got -1."),
        (["--compute-ms", "-1"], "`--compute-ms` must not be negative, got -1."),
    ):
        assert main([*given, *wrong]) == 2
        assert capsys.readouterr().err == message + "\n"
    with pytest.raises(SystemExit) as ended:
        main(given[:-2])
    assert ended.value.code == 2
    assert "the following arguments are required: --dcn-gbps" in capsys.readouterr().err


def by_trying_all(params, workers, compute, link, inside):
    """Every choice there is, from the equations; the least change of those that fit."""
    ring = lambda n: math.ceil(math.log2(n)) * link.latency + 2 * (n - 1) / n * 4 * params / link.rate
    work = max(compute, compute / 3 + inside)
    choices = {(0,): ("allreduce", 1, "float32", max(compute, compute / 3 + inside + ring(workers)))}
    bits = {"float32": 32, "bfloat16": 16, "int8": 8 + 32 / 256}
    for gossiping in range(2, workers + 1):
        members = workers // gossiping
        if gossiping * members == workers:
            options = [(rank, wire, 1) for rank, wire in enumerate(bits)]
            for rank, wire, rounds in [*options, *([(-1, "int8", 3)] if gossiping >= 32 else [])]:
                exchange = rounds * (link.latency + bits[wire] / 8 * params / members / link.rate)
                step = max(compute, compute / 3 + inside + ring(members), ring(members) + exchange)
                choices[1, gossiping, rank] = (f"{rounds} rounds", gossiping, wire, step)
    for every in range(1, 3000):
        step = max(work, (link.latency + bits["int8"] / 8 * params / link.rate) / every)
        choices[2, every] = (f"every {every}", workers, "int8", step)
    return choices[min(key for key, (*_, step) in choices.items() if step <= 1.05 * work)]


def test_what_is_recommended_is_found_by_trying_all():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        workers, compute = int(rng.choice([2, 3, 8, 12, 32, 64, 96])), 10 ** rng.uniform(-2, 0.5)
        link = plan.Link(10 ** rng.uniform(7, 10), 10 ** rng.uniform(-5, -2))
        inside = float(rng.choice([0.0, 0.3, 0.9])) * compute
        advice = plan.recommend(1e7, workers, compute, link, inside)
        name, gossiping, wire, step = by_trying_all(1e7, workers, compute, link, inside)
        assert (advice.gossiping, advice.wire) == (gossiping, wire)
        assert advice.step == pytest.approx(step)
        assert advice.gossiping * advice.members == workers
        rounds = re.search(r"repeat\((\d)", advice.take)
        every = re.search(r"every=(\d+)", advice.take)
        shown = f"every {every[1]}" if every else f"{rounds[1] if rounds else 1} rounds"
        assert ("allreduce" if "allreduce" in advice.take else shown) == name
        seen.add((name.split()[0] if "every" in name else name, wire))
    assert seen == {("allreduce", "float32"), ("every", "int8"), ("3 rounds", "int8")} | {
        ("1 rounds", wire) for wire in ("float32", "bfloat16", "int8")
    }


@pytest.mark.parametrize("rate", [1e10, 1.25e9, 2.5e8, 1e8, 1e5])
@pytest.mark.parametrize("workers", [2, 8, 64])
def test_what_is_recommended_can_be_written_so(workers, rate):
    import crossover_jax as cj

    advice = plan.recommend(25.6e6, workers, 0.2, plan.Link(rate, 5e-5))
    made = eval(advice.take, vars(cj) | {"opt": optax.sgd(0.1), "outer_opt": optax.sgd(0.7)})
    assert isinstance(made, cj.Algorithm)


def test_the_command_says_what_to_take_and_why(capsys):
    given = ["plan", "--params", "25.6e6", "--workers", "64", "--compute-ms", "200", "--dcn-gbps"]
    assert main([*given, "10"]) == 0
    shown = capsys.readouterr().out
    assert "Take  mix_during(opt, crossover(16)), each of 4 that average gradients: 200 ms a step.\n" in shown
    assert "An all-reduce would make a step 1.14 times as long as its compute; 16 workers are the fewest" in shown
    assert main([*given, "25"]) == 0
    assert "Take  allreduce_sgd(opt): 200 ms a step.\nAn all-reduce hides" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`compute` must be positive to hide an exchange behind, got 0"):
        plan.recommend(1e6, 4, 0.0, LINK)


WAYS = {  # of the table of docs/choose.md: what `plan` calls them
    "allreduce_sgd(opt)": ("allreduce, beside the backward pass", "float32"),
    "mix_during(opt, crossover(n))": ("crossover, during", "float32"),
    'mix_during(opt, crossover(n, wire="bfloat16"))': ("crossover, during", "bfloat16"),
    'mix_during(opt, crossover(n, wire="int8"))': ("crossover, during", "int8"),
}


def test_the_thresholds_of_the_page_that_chooses_are_where_exchanges_begin_to_hide():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "choose.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) or more \| `(.*?)` \|", page, re.MULTILINE)
    assert [name for _, name in rows] == [*WAYS]
    for least, name in rows:
        link = plan.Link(rate=float(least) * 4e6, latency=0.0)  # so many models of a million parameters in a second
        for workers in (4, 64, 1024):
            assert step_of(*WAYS[name], workers=workers, compute=1.0, link=link).step == pytest.approx(1.0)
        slower = link._replace(rate=0.97 * link.rate)  # and not much below
        assert step_of(*WAYS[name], workers=1024, compute=1.0, link=slower).step > 1.0
    (H,) = (int(h) for h in re.findall(r"with 0.01 models per step H = (\d+)", page))
    link = plan.Link(rate=0.01 * 4e6, latency=0.0)
    overlapped = {
        every: way.step
        for every in (H - 1, H)
        for way in plan.outer_ways(1e6, 8, 1.0, link, every=[every])
        if (way.name, way.wire) == (f"gossip outer, every {every}, overlapped", "int8")
    }
    assert overlapped[H] == pytest.approx(1.0)
    assert overlapped[H - 1] > 1.0
