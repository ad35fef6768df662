"""The CPU kernels of each instruction set that this processor has, and the choice among them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effnet_kernels  # noqa: F401  (loads the kernels)
from effnet_kernels import extension

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    extension.CPU_MISSING is not None, reason=str(extension.CPU_MISSING)
)


def supported() -> list[str]:
    return torch.ops.effnet_kernels_cpp.cpu_isas().split(", ")


def run_python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "EFFNET_KERNELS_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "baseline"])
def test_each_instruction_set(isa: str) -> None:
    """Results, gradients and determinism, with the instruction set forced."""
    if isa not in supported():
        pytest.skip(f"this processor has {', '.join(supported())}")
    process = run_python(isa, str(TESTS / "cpu" / "isa_process.py"))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [isa]


def test_default_is_the_fastest() -> None:
    """Without the environment variable the first of the supported ones is used."""
    code = "import torch, effnet_kernels; print(torch.ops.effnet_kernels_cpp.cpu_isa())"
    process = run_python("", "-c", code)
    assert process.stdout.split() == [supported()[0]], process.stderr


def test_unknown_instruction_set_is_an_error() -> None:
    """The message names the variable, the value and what there is."""
    code = "import torch, effnet_kernels; torch.ops.effnet_kernels_cpp.cpu_isa()"
    process = run_python("avx1024", "-c", code)
    assert process.returncode != 0
    message = f"EFFNET_KERNELS_CPU_ISA: got 'avx1024', this processor has {', '.join(supported())}"
    assert message in process.stderr
