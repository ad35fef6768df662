"""The command line, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import effnet_kernels

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# As ``python -m effnet_kernels``, after what lets timm be imported beside a CPU build of torch.
_MAIN = """
import sys
import torchvision_ops
from effnet_kernels.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    """As outside of tests, which run Triton in its interpreter; one thread, whatever else runs."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**env, "OMP_NUM_THREADS": "1"}


def cli(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + _MAIN, *arguments],
        env={**environment(), "PYTHONPATH": str(BENCHMARKS)},
        capture_output=True,
        text=True,
        check=False,
    )


def one_line_error(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("effnet-kernels: ")
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_info() -> None:
    """Every backend with its reason, versions and devices; as a module, for people and machines."""
    command = [sys.executable, "-m", "effnet_kernels", "info"]
    people = subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert "effnet_kernels " + effnet_kernels.__version__ in people
    found = json.loads(cli("info", "--json").stdout)
    assert set(found["backends"]) == {"cuda", "triton", "cpu"}
    assert found["backends"]["cpu"] is None
    assert found["versions"]["torch"]
    assert found["cpu"]["isa"]
    assert any(name.startswith("_cpu") for name in found["libraries"])
    for name, reason in found["backends"].items():
        line = next(line for line in people.splitlines() if line.startswith(f"  {name} "))
        assert ("available" if reason is None else "no: ") in line


def test_convert() -> None:
    """What would be replaced, block by block, and how many."""
    result = cli("convert", "mobilenetv4_conv_small")
    assert result.returncode == 0, result.stderr
    assert "blocks.0.0" in result.stdout
    assert " of " in result.stdout.splitlines()[-1]
    document = json.loads(cli("convert", "mobilenetv4_conv_small", "--json").stdout)
    assert document["taken"] == sum(block["taken"] for block in document["blocks"])
    assert 0 < document["taken"] < len(document["blocks"])
    assert all(block["reason"] for block in document["blocks"] if not block["taken"])


def test_convert_unknown_model() -> None:
    """A misspelt name is answered with close ones."""
    assert "did you mean efficientnet_b0" in one_line_error(cli("convert", "efficentnet_b0"))


def test_convert_without_timm() -> None:
    """The error names the extra that brings it."""
    result = cli("convert", "efficientnet_b0", before="import sys; sys.modules['timm'] = None\n")
    assert "pip install 'effnet_kernels[timm]'" in one_line_error(result)


def test_bench_kernels(tmp_path: Path) -> None:
    """A small run: a table, valid JSON, a plot, and our numbers right."""
    result = cli(
        "bench", "kernels", "--modes", "inference", "--dtypes", "float32", "--batch", "1",
        "--only", "cpu", "--caches", "warm", "--seconds", "0.01", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "geometric mean" in result.stdout
    document = json.loads((tmp_path / "kernels-depthwise_conv_bn_act.json").read_text())
    assert (tmp_path / "kernels-depthwise_conv_bn_act.png").exists()
    assert len(document["rows"]) == 24
    assert {row["contender"] for row in document["rows"]} == {"eager", "cpu"}
    assert not any(row["wrong"] or row["failed"] for row in document["rows"])
    for key in ("device", "cpu", "cpu_isa", "threads", "torch", "commit", "date", "command"):
        assert document["environment"][key], key
    assert document["ceilings"]["copy_bytes_per_second"] > 1e8


@pytest.mark.parametrize("library", ["rich", "matplotlib"])
def test_bench_without_its_extra(library: str) -> None:
    """The error names the extra that brings the library."""
    result = cli("bench", "kernels", before=f"import sys; sys.modules['{library}'] = None\n")
    assert "pip install 'effnet_kernels[bench]'" in one_line_error(result)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kernels", "--only", "nobody"], "--only: got 'nobody', expected some of eager"),
        (["models", "--models", "resnot@64"], "timm has no 'resnot'"),
        (["fused_mbconv", "--models", "efficientnet_b0"], "nothing that this suite measures"),
    ],
)
def test_bench_wrong_options(arguments: list[str], words: str) -> None:
    """One line each."""
    assert words in one_line_error(cli("bench", *arguments))


@pytest.mark.parametrize("command", [[], ["info"], ["convert"], ["bench"], ["bench", "kernels"]])
def test_help(command: list[str]) -> None:
    """Every level explains itself; those with arguments give examples."""
    result = cli(*command, "--help")
    assert result.returncode == 0
    assert "usage: effnet-kernels" in result.stdout
    assert command == ["info"] or "examples:" in result.stdout
