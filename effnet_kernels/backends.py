"""The registry of backends: which one takes a call, and why another does not.

========  =======  ==========================================  =======================
backend   device   kernels                                     dtypes
========  =======  ==========================================  =======================
cuda      cuda     CUDA C++, ``csrc/cuda``                     float32, float16, bfloat16
triton    cuda     Triton, ``effnet_kernels/triton``           float32, float16, bfloat16
cpu       cpu      C++ SIMD, ``csrc/cpu``                      the same and float64
eager     any      PyTorch's own ops, the reference            any floating point
========  =======  ==========================================  =======================

A call goes to the first backend of this order that takes it, but for functions whose Triton kernels
measured faster (``fastest_kernel``). ``use_backend("triton")`` or the
environment variable ``EFFNET_KERNELS_BACKEND=triton`` demands one: then a call it cannot take is an
error, never a quiet detour. ``EFFNET_KERNELS_DISABLE=1`` sends everything to ``eager``.
Where Triton's interpreter is on (``TRITON_INTERPRET=1``), ``triton`` takes CPU tensors, on demand.

``cuda`` and ``triton`` implement the same functions, one set an op, with the schemas of
``csrc/ops.cpp``: they fill tensors that ``effnet_kernels.ops`` allocated. ``cpu`` implements most
functional ops itself, and those functions that the other ops are composed of.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import extension

_LOW = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if torch.version.cuda is None and not _INTERPRETED:
        return f"this torch ({torch.__version__}) has no CUDA, and TRITON_INTERPRET=1 is not set"
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what ``use_backend`` calls it.
        missing: why it is not there at all, or None.
        devices: the device types whose tensors it takes.
        dtypes: the dtypes it takes.
        min_capability: the least CUDA compute capability, for CUDA tensors.
    """

    name: str
    missing: str | None
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    min_capability: tuple[int, int] = (0, 0)

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why a call on tensors of ``dtype`` on ``device`` cannot run here, or None."""
        if self.missing is not None:
            return self.missing
        if device.type not in self.devices:
            return f"takes {' or '.join(self.devices)} tensors, not {device.type}"
        if dtype not in self.dtypes:
            return f"does not take {dtype}"
        if self.min_capability > (0, 0) and device.type == "cuda":
            capability = _capability(device.index)
            if capability < self.min_capability:
                return (
                    f"needs compute capability {self.min_capability[0]}.{self.min_capability[1]}, "
                    f"the device has {capability[0]}.{capability[1]}"
                )
        return None


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


CUDA = Backend("cuda", extension.CUDA_MISSING, ("cuda",), _LOW, (8, 0))
TRITON = Backend(
    "triton", _triton_missing(), ("cuda", "cpu") if _INTERPRETED else ("cuda",), _LOW, (8, 0)
)
CPU = Backend("cpu", extension.CPU_MISSING, ("cpu",), (*_LOW, torch.float64))
EAGER = "eager"

KERNEL_BACKENDS: dict[str, Backend] = {b.name: b for b in (CUDA, TRITON, CPU)}
NAMES: tuple[str, ...] = (*KERNEL_BACKENDS, EAGER)

_demanded: str | None = os.environ.get("EFFNET_KERNELS_BACKEND") or None
_disabled: bool = os.environ.get("EFFNET_KERNELS_DISABLE", "0") not in ("", "0")


def disabled() -> bool:
    """Whether ``EFFNET_KERNELS_DISABLE``, read at import, turns every kernel off."""
    return _disabled


def set_backend(name: str | None) -> None:
    """Demands backend ``name`` for every later call of the process; None chooses by device again.

    Raises:
        ValueError: there is no such backend.
    """
    global _demanded
    if name is not None and name not in NAMES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(NAMES)}, or None")
    _demanded = name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """``set_backend`` for the extent of a ``with`` block (process-wide, like a global flag).

    Raises:
        ValueError: there is no such backend.
    """
    before = _demanded
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def refusals(input: Tensor) -> dict[str, str | None]:
    """For each kernel backend, why it would not take a call on ``input`` (None where it would)."""
    return {
        name: backend.refusal(input.device, input.dtype)
        for name, backend in KERNEL_BACKENDS.items()
    }


def select(op: str, input: Tensor) -> str:
    """The name of the backend that runs ``op`` on ``input``.

    Args:
        op: what a message calls it.
        input: the tensor whose device and dtype decide.

    Raises:
        ValueError: the demanded backend does not exist.
        RuntimeError: the demanded backend cannot take this call; the message says why.
    """
    if _disabled or _demanded == EAGER:
        return EAGER
    device, dtype = input.device, input.dtype
    if _demanded is not None:
        if _demanded not in KERNEL_BACKENDS:
            raise ValueError(
                f"EFFNET_KERNELS_BACKEND: got {_demanded!r}, expected one of {', '.join(NAMES)}"
            )
        reason = KERNEL_BACKENDS[_demanded].refusal(device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {_demanded!r} was demanded, but {reason}")
        return _demanded
    for name, backend in KERNEL_BACKENDS.items():
        # The interpreter is for tests: thousands of times slower than eager, so never a choice.
        if backend is TRITON and device.type == "cpu":
            continue
        if backend.refusal(device, dtype) is None:
            return name
    if not torch.compiler.is_compiling():
        _warn_eager(op, device.type, dtype)
    return EAGER


def takes_as_given(input: Any) -> bool:
    """Whether a call on ``input`` goes to the CPU kernels for certain, with no gradient, autocast,
    tracing or subclass to think of. Its arguments have not been checked.
    """
    return (
        input.__class__ is Tensor
        and input.is_cpu
        and not torch.is_grad_enabled()
        and _demanded in (None, CPU.name)
        and not _disabled
        and CPU.missing is None
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and input.numel() > 0
    )


@functools.cache
def _warn_eager(op: str, device: str, dtype: torch.dtype) -> None:
    reasons = "; ".join(
        f"{name}: {backend.refusal(torch.device(device), dtype)}"
        for name, backend in KERNEL_BACKENDS.items()
    )
    warnings.warn(
        f"effnet_kernels.{op} on {device} {dtype} runs PyTorch's own ops ({reasons})", stacklevel=3
    )


def kernel(backend: str, name: str) -> Callable[..., None]:
    """Function ``name`` (an out-variant of ``csrc/ops.cpp``) of ``cuda``, ``cpu`` or ``triton``."""
    if backend == TRITON.name:
        function: Any = _triton_kernel(name)
    else:
        function = _cpp_kernel(name)
    return function  # type: ignore[no-any-return]


_FASTER_ON_TRITON = ("fused_mbconv_out", "pointwise_conv_bn_act_out", "squeeze_excite_gate_out")
# Launching Triton's kernels takes the host longer, which shows where they are short.
_LARGE = 1 << 22


def fastest_kernel(
    backend: str, name: str, input: Tensor, *, few_channels: bool = False
) -> Callable[..., None]:
    """``kernel(backend, name)``, or Triton's for ``cuda`` where that measured faster.

    From ``benchmarks/results/nvidia-h200``: matrix products, Fused-MBConv and the gate, in
    inference on large tensors. Where ``cuda`` is demanded, it is CUDA C++ all through.

    Args:
        backend: that the op runs on.
        name: of the function.
        input: decides how large the call is.
        few_channels: CUDA C++ has a kernel of its own for the call, if its elements have 16 bits.
    """
    triton = (
        backend == CUDA.name
        and _demanded is None
        and name in _FASTER_ON_TRITON
        and input.numel() >= _LARGE
        and not (few_channels and input.element_size() == 2)
        and TRITON.refusal(input.device, input.dtype) is None
    )
    return kernel(TRITON.name if triton else backend, name)


@functools.cache
def _cpp_kernel(name: str) -> Any:
    return getattr(torch.ops.effnet_kernels_cpp, name).default


@functools.cache
def _triton_kernel(name: str) -> Any:
    op = {
        "batch_norm_act_backward_out": "batch_norm_act",
        "batch_norm_act_gate_out": "batch_norm_act",
        "batch_norm_act_out": "batch_norm_act",
        "batch_norm_act_sums_out": "batch_norm_act",
        "channel_statistics_out": "batch_norm_act",
        "channel_sums_out": "squeeze_excite",
        "channel_scale_out": "squeeze_excite",
        "squeeze_excite_gate_out": "squeeze_excite",
        "squeeze_excite_gate_backward_out": "squeeze_excite",
        "depthwise_conv_bn_act_out": "depthwise_conv_bn_act",
        "depthwise_conv_bn_act_train_out": "depthwise_conv_bn_act",
        "depthwise_conv_bn_act_backward_out": "depthwise_conv_bn_act",
        "expand_depthwise_out": "mbconv",
        "fused_mbconv_out": "fused_mbconv",
        "pointwise_conv_bn_act_out": "pointwise_conv_bn_act",
    }[name]
    return getattr(importlib.import_module(f"effnet_kernels.triton.{op}"), name)
