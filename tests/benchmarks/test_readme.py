"""The README's figures, and performance.md's, are those of the committed results."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import readme

from effnet_kernels.bench import report, results
from effnet_kernels.bench.accuracy import Errors
from effnet_kernels.bench.results import Results, Row
from effnet_kernels.bench.timing import Timing

ROOT = Path(__file__).parents[2]


def test_tables_are_drawn_from_results() -> None:
    """No figure is typed by hand."""
    result = subprocess.run(
        [sys.executable, "benchmarks/readme.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def a_row(contender: str, milliseconds: float | None, **fields) -> Row:
    """A row of 8 images and 1 GFLOP; without a time it failed."""
    row = Row("b0", "224x224", 8, "float32", "inference", contender, flops=10**9, **fields)
    if milliseconds is None:
        row.failed = "UnavailableError: it is a | b"
        return row
    row.timings = {"warm": Timing((milliseconds / 1e3,), "one call")}
    row.errors = {"logits": Errors(2e-6, 1e-6)}
    return row


@pytest.fixture
def run() -> Results:
    """Whole models on a device that does 100 GFLOP/s: ours in 20 ms, OpenVINO in 25 ms."""
    rows = [
        a_row("eager", 100.0, excess=0.5),
        a_row("compile", 50.0, excess=0.5),
        a_row("compile-unfrozen", 40.0, excess=0.5),
        a_row("onnxruntime", 10.0, excess=1.5),  # fast and wrong
        a_row("openvino", 25.0, excess=0.5),
        a_row("cpu", 30.0, excess=0.5),
        a_row("cpu+prepared", 20.0, excess=0.5),
        a_row("cpu+compile", 15.0, excess=0.5),
        a_row("eager-nchw", None),
    ]
    results.set_speedups(rows)
    environment = {
        "device": "a CPU", "device_type": "cpu", "threads": 2, "torch": "2.13", "triton": None,
        "onnxruntime": "1.32", "openvino": "2026.4", "date": "2026-11-27T00:00:00+00:00",
        "commit": "0123456789abcdef", "uncommitted_changes": False,
    }  # fmt: skip
    ceilings = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": {"float32": 1e11}}
    return Results("models-efficientnet", environment, ceilings, {}, rows)


def lines_of(text: str) -> list[list[str]]:
    """The cells of a Markdown text's tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_readme_table(run: Results, tmp_path: Path) -> None:
    """A column for each engine that ran, of the faster torch.compile; a wrong row has no figure."""
    run.write(tmp_path / "a-cpu" / "models.json")
    drawn = readme.draw(tmp_path)
    assert lines_of(drawn) == [
        ["what", "how", "`torch.compile`", "ONNX Runtime", "OpenVINO", "ours: cpu",
         "ours: cpu+prepared", "of GEMM"],
        ["b0 whole, converted, at 224", "inference, batch 8, float32", "2.50x", "wrong", "4.00x",
         "**3.33x**", "**5.00x**", "50%"],
    ]  # fmt: skip
    assert "the faster of with and without frozen parameters" in drawn


def test_readme_table_without_engines(run: Results, tmp_path: Path) -> None:
    """A device where none ran has no column for them, nor for a share that was not counted."""
    run.rows = [row for row in run.rows if row.contender in ("eager", "cpu")]
    for row in run.rows:
        row.flops = None
    run.write(tmp_path / "a-cpu" / "models.json")
    assert lines_of(readme.draw(tmp_path)) == [
        ["what", "how", "`torch.compile`", "ours: cpu"],
        ["b0 whole, converted, at 224", "inference, batch 8, float32", "-", "**3.33x**"],
    ]


def test_performance(run: Results, tmp_path: Path) -> None:
    """Our best beside the best peer that is right, and a line a contender."""
    run.write(tmp_path / "a-cpu" / "models.json")
    drawn = readme.performance(tmp_path)
    assert "2 threads, torch 2.13, onnxruntime 1.32, openvino 2026.4" in drawn
    summary, details = lines_of(drawn)[:2], lines_of(drawn)[2:]
    problem = ["b0 at 224", "inference, batch 8, float32"]
    assert summary[1] == [
        *problem, "cpu+prepared", "20", "400", "openvino", "25", "320", "1.25", "-", "-",
        "50%",
    ]  # fmt: skip
    by_name = {line[2]: line for line in details[1:]}
    assert list(by_name) == [row.contender for row in run.rows]
    assert by_name["openvino"] == [*problem, "openvino", "25", "320", "4.00x", "40%", "2.0e-06"]
    assert by_name["onnxruntime"] == [*problem, "onnxruntime", "wrong", "-", "-", "-", "2.0e-06"]
    assert by_name["eager-nchw"][3] == "failed"
    assert by_name["eager-nchw"][-1] == "UnavailableError: it is a \\| b"
    run.benchmark = "kernels-mbconv"
    run.write(tmp_path / "a-cpu" / "models.json")
    assert not lines_of(readme.performance(tmp_path))


def test_goals(run: Results, tmp_path: Path) -> None:
    """A device's ratio stands beside what it should be, on a GPU at batches that fill it; and our
    memory beside the peer's.
    """
    for row in run.rows:
        row.model = "efficientnet_b0"
        row.peak_memory = 30 if row.contender == "cpu+prepared" else 60
    for device, dtype, batch, goal in (
        ("cpu", "float32", 8, "1.4"), ("cuda", "float32", 256, "-"), ("cuda", "bfloat16", 8, "-"),
        ("cuda", "bfloat16", 256, "2.5"),
    ):  # fmt: skip
        run.environment["device_type"] = device
        for row in run.rows:
            row.dtype, row.batch = dtype, batch
        run.write(tmp_path / "a-device" / "models.json")
        cells = lines_of(readme.performance(tmp_path))[1]
        assert cells[-4:-1] == ["1.25", goal, "0.50"]


def test_plot_of_models(run: Results, tmp_path: Path) -> None:
    """Wrong and failed contenders too are drawn."""
    report.plot(run, tmp_path / "models.png")
    assert (tmp_path / "models.png").read_bytes().startswith(b"\x89PNG")


def test_share_is_in_the_json(run: Results, tmp_path: Path) -> None:
    """The limit's time over the measured one."""
    path = tmp_path / "models.json"
    run.write(path)
    assert run.matmul_seconds(run.rows[0]) == pytest.approx(0.01)
    assert '"matmul_share": 0.4' in path.read_text()
    assert results.read(path).rows[4].flops == 10**9


def test_order_of_devices(run: Results, tmp_path: Path) -> None:
    """GPUs, then CPUs, each kind's latest first."""
    for name, kind, day in [("b", "cpu", 1), ("c", "cuda", 1), ("a", "cpu", 2), ("d", "cuda", 3)]:
        run.environment |= {
            "device": name, "device_type": kind, "date": f"2026-11-0{day}T00:00:00+00:00"
        }  # fmt: skip
        run.write(tmp_path / name / "models.json")
    runs = readme.runs_of_devices(tmp_path)
    assert [of_device[0].environment["device"] for of_device in runs] == ["d", "c", "a", "b"]


def test_a_problem_is_drawn_once(run: Results, tmp_path: Path) -> None:
    """Of two runs with the same problem the later one's figures; what else it has stays."""
    run.write(tmp_path / "cpu" / "a-later.json")
    run.environment["date"] = "2026-11-26T00:00:00+00:00"
    other = [replace(row, batch=1) for row in run.rows]
    run.rows = [row for row in run.rows if row.contender in ("eager", "cpu")] + other
    run.write(tmp_path / "cpu" / "b-earlier.json")
    (runs,) = readme.runs_of_devices(tmp_path)
    assert [{row.batch for row in found.rows} for found in runs] == [{8}, {1}]
    run.rows = run.rows[:2]
    run.write(tmp_path / "cpu" / "b-earlier.json")
    assert [len(found) for found in readme.runs_of_devices(tmp_path)] == [1]
