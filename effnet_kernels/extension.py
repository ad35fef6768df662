"""Loads the compiled kernels, and says why where they are not there.

The libraries are plain shared objects on the libtorch stable ABI, not Python modules: loading one
registers what they implement of ``torch.ops.effnet_kernels.*`` (``ops/library.py``), and the CUDA
kernels as ``torch.ops.effnet_kernels_cpp.*``.
"""

from __future__ import annotations

from pathlib import Path

import torch

_HERE = Path(__file__).parent


def _load(stem: str) -> str | None:
    """Loads ``stem``'s library; the reason why not, or None."""
    libraries = sorted(_HERE.glob(f"{stem}*.so")) + sorted(_HERE.glob(f"{stem}*.pyd"))
    if not libraries:
        return (
            f"the extension {stem} is not built "
            "(pip install --no-build-isolation -e . builds it from source)"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    # The schemas live in the CPU library.
    return CPU_MISSING or _load("_cuda")


CPU_MISSING: str | None = _load("_cpu")
"""Why the C++ CPU kernels are not loaded, or None where they are."""

CUDA_MISSING: str | None = _load_cuda()
"""Why the CUDA C++ kernels are not loaded, or None where they are."""
