"""Where the tests of a backend run."""

from __future__ import annotations

import torch

from effnet_kernels import backends


def device_of(backend: str) -> str:
    """Where the tensors of a test of ``backend`` live."""
    devices = backends.KERNEL_BACKENDS[backend].devices
    return "cpu" if "cpu" in devices and not torch.cuda.is_available() else devices[0]
