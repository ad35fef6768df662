"""Where the tests of a backend run."""

from __future__ import annotations

import pytest
import torch

from effnet_kernels import backends


def device_of(backend: str) -> str:
    """Where the tensors of a test of ``backend`` live."""
    devices = backends.KERNEL_BACKENDS[backend].devices
    return "cpu" if "cpu" in devices and not torch.cuda.is_available() else devices[0]


def interpreted(backend: str) -> bool:
    """Whether the kernels of ``backend`` run in Triton's interpreter."""
    return backend == "triton" and device_of("triton") == "cpu"


def skip_in_interpreter(backend: str, dtype: torch.dtype, number: int) -> None:
    """Skips what Triton's interpreter gets wrong of case ``number``, and what it would repeat.

    A kernel computes in float32 whatever it loads: three of four cases run in that alone.
    """
    if not interpreted(backend):
        return
    if dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16: tests/triton/test_interpreter.py")
    if dtype == torch.float16 and number % 4:
        pytest.skip("the interpreter is slow: float16 in one case of four")
