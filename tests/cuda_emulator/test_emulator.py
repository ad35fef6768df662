"""The CUDA kernels on the CPU: under AddressSanitizer, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulator import build

REASON = build.missing()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.xdist_group("cuda_emulator"),  # one process builds, the others need not wait for it
]


@pytest.fixture(scope="session")
def built() -> tuple[Path, Path]:
    """(library, program of faulty kernels), compiled when a source has changed."""
    return build.build()


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("diverging_barriers", "wait at different barriers"),
        ("early_return", "returned while others wait at a barrier"),
        ("shared_overrun", "AddressSanitizer: use-after-poison"),
        ("global_overrun", "AddressSanitizer: heap-buffer-overflow"),
        ("misaligned_vector", "store to misaligned address"),
        ("diverging_shuffles", "wait at different warp operations"),
        ("diverging_kinds", "wait at different warp operations"),
        ("shuffle_after_return", "returned while others wait at a warp operation"),
        ("shuffle_beside_barrier", "wait at a barrier while others wait at a warp operation"),
        ("partial_mask", "only full masks"),
        ("short_warp_mma", "a warp of fewer than 32 lanes"),
        ("ldmatrix_overrun", "AddressSanitizer: use-after-poison"),
        ("ldmatrix_global", "a row outside of shared memory"),
        ("ldmatrix_misaligned", "a row that is not aligned"),
    ],
)
def test_faults_are_found(fault: str, report: str, built: tuple[Path, Path]) -> None:
    """The emulator stops at what a GPU would do silently or not survive."""
    result = subprocess.run([built[1], fault], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert report in result.stderr


def output(program: Path, name: str) -> str:
    """What a kernel that the emulator does not stop computes."""
    result = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_faultless_and_refused(built: tuple[Path, Path]) -> None:
    """A correct kernel's results, races' NaN, and the launches that a GPU would refuse."""
    assert set(output(built[1], "correct").split()) == {"15872"}
    assert "nan" in output(built[1], "missing_barrier")
    assert "nan" in output(built[1], "missing_syncwarp")
    assert "nan" in output(built[1], "missing_copy_wait")
    assert "nan" in output(built[1], "missing_group_wait")
    assert "nan" in output(built[1], "overwritten_by_copy")
    # No block, 1025 threads, more than 48 KB without asking, 64 KB on request; 228 KB: refused.
    assert output(built[1], "refused_launches") == "00011"


@pytest.mark.parametrize(
    ("kernel", "checks"),
    [
        ("shuffles", 8),
        ("ldmatrices", 14),
        ("multiply_k16_bfloat16", 12),
        ("multiply_k16_float16", 12),
        ("multiply_k8_bfloat16", 12),
        ("multiply_k8_float16", 12),
        ("multiply_tf32", 9),
        ("copy_groups", 11),
    ],
)
def test_warp_operations(kernel: str, checks: int, built: tuple[Path, Path]) -> None:
    """Every thread finds all that it checks to be right."""
    assert set(output(built[1], kernel).split()) == {str(checks)}


def test_kernels(built: tuple[Path, Path]) -> None:
    """Everything in emulated.py passes."""
    emulated = Path(__file__).with_name("emulated.py")
    environment = {**build.environment(), "CUDA_EMULATOR_LIBRARY": str(built[0])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(emulated)]
    result = subprocess.run(
        command, cwd=build.ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
