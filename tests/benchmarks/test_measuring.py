"""The measuring engine: turns, caches, errors, and that wrong rows get no speed-up."""

from __future__ import annotations

import io
import itertools
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from effnet_kernels.bench import accuracy, depthwise_conv_bn_act, report, results, timing
from effnet_kernels.bench.peers import Match
from effnet_kernels.bench.results import Results, Row
from effnet_kernels.bench.shapes import Depthwise
from effnet_kernels.bench.timing import Contender

CPU = torch.device("cpu")


def a_match(**calls) -> Match:
    """A match on doubling a vector, with ``eager`` and whatever ``calls`` adds."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    # An eager that is a little off in its own dtype, as a convolution's is.
    calls = {"eager": lambda x: (x * 2 * (1 + 3e-7),), **calls}
    return Match(
        Row("model", "case", 1, "float32", "inference", "", count=3, bytes=8000, flops=1000),
        [Contender(name, call, [x]) for name, call in calls.items()],
        lambda tensors: {"output": tensors[0]},
        {"output": x.double() * 2},
        CPU,
        torch.float32,
        training=False,
    )


def broken(x):
    raise RuntimeError("no such kernel\nand more")


@pytest.fixture(scope="module")
def measured() -> Results:
    """Results with a right, three wrong and a failing contender."""
    rows = a_match(
        right=lambda x: (x * 2,),
        off=lambda x: (x * 2.001,),
        nan=lambda x: (x * float("nan"),),
        unwritten=lambda x: (torch.where(torch.arange(1000) == 7, 0.0, x * 2),),
        broken=broken,
    ).run(kinds=("warm", "cold"), seconds=0.01)
    environment = {
        "device": "test", "threads": 1, "torch": "2", "triton": None, "commit": None,
        "uncommitted_changes": None,
    }  # fmt: skip
    ceilings = {"copy_bytes_per_second": 1e9, "matmul_flops_per_second": {"float32": 1e9}}
    return Results("suite", environment, ceilings, {}, rows)


def test_wrong_rows_have_no_speedup(measured: Results) -> None:
    """Neither a row that is off, nor one that is not finite, nor one that failed."""
    rows = {row.contender: row for row in measured.rows}
    assert set(rows["right"].speedups) == {"warm", "cold"}
    assert rows["eager"].speedups["warm"] == 1
    for name in ("off", "nan", "unwritten"):
        assert rows[name].wrong, name
        assert rows[name].timings, name
        assert not rows[name].speedups, name
    assert rows["broken"].failed == "RuntimeError: no such kernel"
    assert not rows["broken"].wrong
    assert not rows["broken"].timings
    groups = {group.contender: group for group in results.groups(measured.rows)}
    assert groups["right"].speedups == pytest.approx(rows["right"].speedups)
    assert groups["right"].problems == 3
    assert groups["off"].wrong == 3
    assert not groups["off"].speedups
    assert groups["broken"].failed == 3


def test_tables_show_wrong_and_failed(measured: Results) -> None:
    """The word stands where the speed-up would."""
    console = Console(file=io.StringIO(), width=200)
    report.print_rows(measured, console)
    report.print_groups(measured, console)
    lines = console.file.getvalue().splitlines()
    for name in ("off", "nan", "unwritten"):
        shown = [line for line in lines if f" {name} " in f"{line} "]
        assert len(shown) == 2, name
        assert all("WRONG" in line and not line.count("x ") for line in shown), shown
    assert any("no such kernel" in line for line in lines)
    assert any("3 failed" in line for line in lines)


def test_results_survive_the_file(measured: Results, tmp_path: Path) -> None:
    """JSON that any reader takes, the same rows back, and a plot of them."""

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    path = tmp_path / "deep" / "results.json"
    measured.write(path)
    document = json.loads(path.read_text(), parse_constant=no_constant)
    assert len(document["rows"]) == 6
    by_name = {row["contender"]: row for row in document["rows"]}
    assert by_name["off"]["wrong"]
    assert by_name["off"]["speedups"] == {}
    assert by_name["nan"]["excess"] is None
    samples = by_name["right"]["timings"]["warm"]["samples"]
    assert len(samples) >= 7
    warm = by_name["right"]["timings"]["warm"]
    # 8000 bytes and 1000 FLOPs at the same rate
    assert warm["roofline_share"] == warm["copy_bandwidth_share"] > 0
    back = results.read(path)
    assert [row.contender for row in back.rows] == [row.contender for row in measured.rows]
    assert [row.wrong for row in back.rows] == [row.wrong for row in measured.rows]
    report.plot(back, path.with_suffix(".png"))
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    path.write_text("{}")
    with pytest.raises(ValueError, match="not the results of a benchmark"):
        results.read(path)


def test_least_seconds() -> None:
    """The longer of bytes and arithmetic, in float32 where the row's dtype is the slower."""
    rates = {"bfloat16": 2.0, "float16": 16.0, "float32": 4.0}
    ceilings = {"copy_bytes_per_second": 10.0, "matmul_flops_per_second": rates}
    limits = Results("suite", {}, ceilings, {})

    def least(dtype: str, count: int | None, flops: int | None) -> float | None:
        row = Row("model", "case", 1, dtype, "inference", "", bytes=count, flops=flops)
        return limits.least_seconds(row)

    assert least("float32", 100, 20) == 10
    assert least("float32", 100, 80) == 20
    assert least("float16", 100, 320) == 20
    assert least("bfloat16", 100, 80) == 20
    assert least("float32", 100, None) == 10
    assert least("float32", None, None) is None


def test_contenders_take_turns() -> None:
    """One sample of each a round, in an order that rotates; cold goes round the inputs."""
    calls: list[tuple[str, int]] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda index: calls.append((name, index)), [0, 1, 2])

    names = ["a", "b", "c"]
    timings = timing.measure([contender(n) for n in names], CPU, cold=True, seconds=0.0)
    assert all(len(timings[name].samples) == 7 for name in names)
    turns = [name for name, _ in itertools.groupby(name for name, _ in calls)]
    assert turns[:3] == names  # the estimate
    assert turns[3:12] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    of_a = [index for name, index in calls if name == "a"]
    assert len(of_a) > 2 * 9  # untimed, timed
    assert of_a == [i % 3 for i in range(len(of_a))]
    calls.clear()
    timing.measure([contender("a")], CPU, cold=False, seconds=0.0)
    assert {index for _, index in calls} == {0}


def test_samples_are_the_time_of_a_call() -> None:
    """Medians and quartiles of what the clock says."""
    sleeper = Contender("sleeper", lambda _: time.sleep(0.01), [None])
    measured = timing.measure([sleeper], CPU, cold=False, seconds=0.1)["sleeper"]
    assert 0.01 <= measured.median < 1
    assert measured.quartiles[0] <= measured.median <= measured.quartiles[1]
    assert timing.Timing((1.0, 2.0, 3.0, 4.0, 5.0), "").quartiles == (2.0, 4.0)


def test_contenders_begin_at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a contender leaves running for 60 ms has ended when the next one begins."""
    now = used = left_running = 0.0
    untimed = 0

    def wait(seconds: float) -> None:
        nonlocal now, used
        now, used = now + seconds, used + min(max(left_running - now, 0.0), seconds)

    def spin(_: None) -> None:
        nonlocal left_running, untimed
        wait(0.001)
        left_running, untimed = now + 0.06, 0

    def look(_: None) -> None:
        nonlocal untimed
        assert now >= left_running
        wait(0.01)
        untimed += 1

    def never_rest(_: None) -> None:
        nonlocal left_running
        wait(0.01)
        left_running = float("inf")

    clock = SimpleNamespace(perf_counter=lambda: now, process_time=lambda: used, sleep=wait)
    monkeypatch.setattr(timing, "time", clock)
    pair = [Contender("spins", spin, [None]), Contender("looks", look, [None])]
    measured = timing.measure(pair, CPU, cold=False, seconds=1.0)
    assert left_running > 7 * 0.06
    assert untimed >= 3  # 30 ms
    assert measured["looks"].median == pytest.approx(0.01)

    before = now
    timing.measure([Contender("never rests", never_rest, [None])], CPU, cold=False, seconds=0.0)
    assert now - before < 9 * 0.6


def test_sets_for_cold() -> None:
    """Twice the cache, unless memory or patience ends first."""
    assert timing.sets_for_cold(10, 100, 10**6) == 21
    assert timing.sets_for_cold(10, 100, 50) == 5
    assert timing.sets_for_cold(10**9, 100, 50) == 1
    assert timing.sets_for_cold(1, 10**9, 10**9) == 256


def test_peak_memory() -> None:
    """Two tensors at a time of the three."""
    x = torch.randn(1 << 20)
    peak = timing.peak_memory(lambda: torch.sin(torch.cos(torch.exp(x))), CPU)
    assert peak == 2 * x.nbytes


def test_error_rule() -> None:
    """Twice eager's error forward, three times for a gradient, always one rounding."""

    def excess(name: str, ours: float, theirs: float) -> float:
        return accuracy.excess(
            {name: accuracy.Errors(ours, ours)}, {name: accuracy.Errors(theirs, theirs)},
            torch.float32,
        )  # fmt: skip

    assert excess("output", 2e-6, 1e-6) == pytest.approx(1)
    assert excess("grad_weight", 3e-6, 1e-6) == pytest.approx(1)
    assert excess("output", 1e-7, 0.0) < 1
    assert excess("output", 3e-6, 1e-6) > 1
    assert excess("output", float("nan"), 1e-6) == float("inf")
    assert accuracy.excess({}, {"output": accuracy.Errors(1, 1)}, torch.float32) == float("inf")


@pytest.mark.parametrize("mode", depthwise_conv_bn_act.MODES)
def test_depthwise_suite(mode: str) -> None:
    """Every mode on a small shape: the peers and ours run, and ours is right.

    On a smaller one eager's largest error is now and then next to nothing.
    """
    problem = depthwise_conv_bn_act.Problem(
        Depthwise("efficientnet_b0", 64, 28, 5, 2), 2, torch.float32, mode
    )
    match = depthwise_conv_bn_act.match(problem, CPU, only=["eager-nchw", "cpu"])
    rows = match.run(kinds=("warm",), seconds=0.01)
    assert [row.contender for row in rows] == ["eager", "eager-nchw", "cpu"]
    for row in rows:
        assert row.failed is None, row.failed
        assert not row.wrong, row
        assert row.speedups["warm"] > 0
    x, y = 2 * 64 * 28 * 28 * 4, 2 * 64 * 14 * 14 * 4
    assert problem.bytes == (3 * x + 7 * y if mode == "training" else x + y)
    assert len(rows[2].errors) == {"training": 5, "inference+pool": 2}.get(mode, 1)


def test_compiled_peer_is_a_peer() -> None:
    """``torch.compile`` with frozen parameters gives the same numbers."""
    problem = depthwise_conv_bn_act.Problem(
        Depthwise("efficientnet_b0", 8, 6, 3, 1), 1, torch.float32, "inference"
    )
    row = depthwise_conv_bn_act.match(problem, CPU, only=["compile"]).check()[1]
    assert row.contender == "compile"
    assert row.failed is None, row.failed
    assert not row.wrong


@pytest.mark.parametrize("capturable", [True, False])
def test_what_no_graph_can_hold(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU such a contender's calls are timed, and no capture of it is tried."""
    for how in ("graph", "call"):
        monkeypatch.setattr(
            timing, f"_cuda_{how}_sampler", lambda *_, how=how: (lambda: 1.0, f"a {how}")
        )
    contender = Contender("one", lambda _: None, [None], capturable=capturable)
    measured = timing.measure([contender], torch.device("cuda"), cold=False, seconds=0.0)
    assert measured["one"].method == ("a graph" if capturable else "a call")
