"""The package itself: what the build decides, what the libraries need, imports that must work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import effnet_kernels
from effnet_kernels import backends, extension

ROOT = Path(__file__).parent.parent
PACKAGE = Path(effnet_kernels.__file__).parent


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in an interpreter of its own."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py up to its decisions, without building."""
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_import_and_op_without_extension(tmp_path: Path) -> None:
    """A copy without compiled libraries imports, says why, and computes with PyTorch's own ops."""
    shutil.copytree(
        PACKAGE, tmp_path / "effnet_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    code = f"""
import warnings, torch, effnet_kernels
assert effnet_kernels.__file__.startswith({str(tmp_path)!r}), effnet_kernels.__file__
assert "is not built" in effnet_kernels.backends.CPU.missing
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    one = torch.ones(8)
    for _ in range(2):
        effnet_kernels.ops.depthwise_conv_bn_act(
            torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3), one, one, padding=1)
assert len(caught) == 1 and "is not built" in str(caught[0].message), caught
"""
    result = python(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_import_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton its backend gives the reason."""
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert backends._triton_missing() == "triton is not installed (pip install triton)"


def test_import_is_light() -> None:
    """Importing the package imports neither timm nor Triton nor the benchmark's libraries."""
    heavy = ("timm", "torchvision", "triton", "rich", "matplotlib")
    result = python(
        "import sys, torch; before = set(sys.modules); import effnet_kernels\n"
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_unknown_backend_in_environment() -> None:
    """A backend that does not exist is named at the first call, and import survives."""
    result = python(
        "import torch, effnet_kernels; one = torch.ones(8)\n"
        "effnet_kernels.ops.depthwise_conv_bn_act("
        "torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3), one, one)",
        EFFNET_KERNELS_BACKEND="tpu",
    )
    assert "EFFNET_KERNELS_BACKEND: got 'tpu'" in result.stderr


def test_cpu_library_is_built() -> None:
    """The tests would otherwise pass on PyTorch's own ops."""
    assert extension.CPU_MISSING is None


def test_libraries_use_the_stable_abi_only() -> None:
    """No symbol of libtorch's C++ or of Python is needed: one binary for every torch and Python."""
    libraries = list(PACKAGE.glob("*.so"))
    assert libraries
    for library in libraries:
        symbols = subprocess.run(
            ["nm", "--dynamic", "--undefined-only", "--demangle", library],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        foreign = [
            line.split(maxsplit=1)[-1]
            for line in symbols.splitlines()
            if any(word in line for word in (" at::", " c10::", " torch::jit", " Py", " _Py"))
        ]
        assert not foreign, f"{library.name} needs {foreign}"


def test_setup_without_compiler() -> None:
    """Without a C++ compiler the package still installs, and says what is left out."""
    result = setup(CXX="no-such-compiler")
    assert result.returncode == 0
    assert "no compiled kernels: there is no C++ compiler (no-such-compiler)" in result.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_setup_force_cuda_without_cuda_torch() -> None:
    """FORCE_CUDA turns a missing prerequisite into an error."""
    result = setup(FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FORCE_CUDA is set, but torch" in result.stderr


def test_setup_skips_cuda_on_demand() -> None:
    """EFFNET_KERNELS_SKIP_CUDA_BUILD leaves the CUDA kernels out and says so."""
    result = setup(EFFNET_KERNELS_SKIP_CUDA_BUILD="1")
    assert result.returncode == 0
    assert "no CUDA kernels: EFFNET_KERNELS_SKIP_CUDA_BUILD is set" in result.stdout
