"""Compiles the Triton kernels for GPUs that need not be there, and reads what they use.

The launchers themselves run, on CPU tensors of shapes that models have, with a driver in place of
CUDA's that names an architecture and with every launch stopped after compilation: what is compiled
is what a user's first call compiles, specialised for the same arguments. It takes a process whose
Triton is not interpreted, so this is a program:

    python tests/triton/aot.py sm_90            # what every kernel uses, as JSON
    python tests/triton/aot.py sm_90 --table    # the same, to read
    python tests/triton/aot.py --write          # measures anew the budget in budget.json
    python tests/triton/aot.py --write --only fused  # that of the cases with this word
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
BUDGET = Path(__file__).parent / "budget.json"
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
# Bytes of shared memory that one program may have, of which the driver keeps RESERVED for itself,
# in a multiprocessor with as much.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
RESERVED = 1024
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Case:
    """One call of the depthwise op, in the terms of ``csrc/ops.cpp``."""

    mode: str
    """inference, train, frozen (train with running statistics), conv (frozen without an output) or
    backward."""
    dtype: str
    channels: int
    size: int
    kernel: int
    stride: int
    prologue: bool = False
    pool: bool = False
    small: bool = False
    """Too small to pack the filter for."""

    def __str__(self) -> str:
        options = " prologue" * self.prologue + " pool" * self.pool + " small" * self.small
        return (
            f"{self.mode} {self.dtype} {self.channels}x{self.size}x{self.size} "
            f"k{self.kernel}s{self.stride}{options}"
        )


@dataclass(frozen=True)
class BatchNormActCase:
    """One call of each kernel of BN + activation, with and without what is optional."""

    dtype: str
    channels: int
    size: int

    def __str__(self) -> str:
        return f"batch_norm_act {self.dtype} {self.channels}x{self.size}x{self.size}"


@dataclass(frozen=True)
class SqueezeExciteCase:
    """One call of squeeze-and-excitation."""

    mode: str
    """forward or backward."""
    dtype: str
    channels: int
    squeezed: int
    size: int

    def __str__(self) -> str:
        return (
            f"squeeze_excite {self.mode} {self.dtype} {self.channels}x{self.size}x{self.size} "
            f"s{self.squeezed}"
        )


@dataclass(frozen=True)
class PointwiseCase:
    """One call of the pointwise convolution."""

    dtype: str
    channels: int
    features: int
    size: int
    prologue: bool = False
    gate: bool = False
    residual: bool = False
    pool: bool = False
    allow_tf32: bool = False
    batch: int = 256

    def __str__(self) -> str:
        options = ("prologue", "gate", "residual", "pool", "allow_tf32")
        words = "".join(f" {option}" for option in options if getattr(self, option))
        return (
            f"pointwise {self.dtype} {self.batch}x{self.channels}x{self.size}x{self.size} "
            f"k{self.features}{words}"
        )


@dataclass(frozen=True)
class ExpandCase:
    """One call of the first half of MBConv: ``inputs`` channels expand to ``channels``."""

    dtype: str
    inputs: int
    channels: int
    size: int
    kernel: int
    stride: int
    pool: bool = True
    allow_tf32: bool = False
    batch: int = 256

    def __str__(self) -> str:
        return (
            f"expand {self.dtype} {self.inputs}x{self.size}x{self.size} c{self.channels} "
            f"k{self.kernel}s{self.stride}"
            + " pool" * self.pool
            + " allow_tf32" * self.allow_tf32
            + " small" * (self.batch == 1)
        )


@dataclass(frozen=True)
class FusedCase:
    """One call of a Fused-MBConv block: ``channels`` expand to ``middle``, project to ``features``.

    Without ``features`` there is no project convolution.
    """

    dtype: str
    channels: int
    middle: int
    features: int
    size: int
    kernel: int
    stride: int
    pool: bool = False
    allow_tf32: bool = False
    batch: int = 128

    def __str__(self) -> str:
        return (
            f"fused {self.dtype} {self.batch}x{self.channels}x{self.size}x{self.size} "
            f"m{self.middle} k{self.features} k{self.kernel}s{self.stride}"
            + " pool" * self.pool
            + " allow_tf32" * self.allow_tf32
        )

    @property
    def residual(self) -> bool:
        """Whether input and output have one shape."""
        return self.stride == 1 and self.channels == (self.features or self.middle)


# Layers of EfficientNet-B0 at 224, B4 at 380 and V2-S at 384, and what no model has but a user may.
CASES = (
    Case("inference", "bfloat16", 32, 112, 3, 1, pool=True),
    Case("inference", "bfloat16", 96, 112, 3, 2, pool=True),
    Case("inference", "bfloat16", 240, 28, 5, 1, pool=True),
    Case("inference", "bfloat16", 144, 56, 5, 2, prologue=True),
    Case("inference", "bfloat16", 1152, 7, 5, 1, pool=True),
    Case("inference", "bfloat16", 256, 48, 3, 2, pool=True),
    Case("inference", "float16", 480, 14, 3, 1, prologue=True, pool=True),
    Case("inference", "float32", 672, 14, 5, 1),
    Case("inference", "bfloat16", 96, 14, 7, 1),
    Case("inference", "bfloat16", 96, 112, 3, 2, pool=True, small=True),
    Case("inference", "bfloat16", 1152, 7, 5, 1, pool=True, small=True),
    Case("inference", "float32", 672, 14, 5, 1, small=True),
    Case("inference", "bfloat16", 13, 33, 3, 1),
    Case("train", "bfloat16", 144, 56, 3, 1, pool=True),
    Case("train", "float32", 240, 28, 5, 1, prologue=True),
    Case("train", "bfloat16", 96, 14, 7, 2),
    Case("frozen", "bfloat16", 672, 14, 5, 2, pool=True),
    Case("conv", "bfloat16", 240, 28, 5, 1),
    Case("backward", "bfloat16", 144, 56, 3, 1, pool=True),
    Case("backward", "bfloat16", 96, 112, 3, 2, prologue=True),
    Case("backward", "bfloat16", 1152, 7, 5, 1, prologue=True, pool=True),
    Case("backward", "float16", 672, 14, 5, 2),
    Case("backward", "float32", 240, 28, 5, 1),
    Case("backward", "bfloat16", 96, 14, 7, 1, prologue=True),
    Case("backward", "float32", 96, 28, 7, 2),
    BatchNormActCase("bfloat16", 16, 112),
    BatchNormActCase("bfloat16", 144, 56),
    BatchNormActCase("bfloat16", 1152, 7),
    BatchNormActCase("bfloat16", 13, 33),
    BatchNormActCase("float16", 480, 14),
    BatchNormActCase("float32", 32, 112),
    BatchNormActCase("float32", 672, 14),
    *(
        SqueezeExciteCase(mode, dtype, *extents)
        for mode in ("forward", "backward")
        for dtype, *extents in (
            ("bfloat16", 32, 8, 112),
            ("bfloat16", 480, 20, 14),
            ("bfloat16", 1152, 48, 7),
            ("float32", 672, 28, 14),
        )
    ),
    PointwiseCase("bfloat16", 16, 96, 112),
    PointwiseCase("bfloat16", 192, 1152, 7),
    PointwiseCase("bfloat16", 320, 1280, 7, pool=True),
    PointwiseCase("bfloat16", 32, 16, 112, gate=True),
    PointwiseCase("bfloat16", 144, 24, 56, gate=True, residual=True),
    PointwiseCase("bfloat16", 480, 112, 14, gate=True),
    PointwiseCase("bfloat16", 1152, 192, 7, gate=True, residual=True),
    PointwiseCase("bfloat16", 1152, 320, 7, gate=True, batch=1),
    PointwiseCase("bfloat16", 13, 33, 9),
    PointwiseCase("float16", 672, 160, 24, prologue=True, gate=True, residual=True),
    PointwiseCase("float16", 24, 144, 56, prologue=True, pool=True),
    PointwiseCase("float32", 16, 96, 112),
    PointwiseCase("float32", 672, 112, 14, gate=True, residual=True),
    PointwiseCase("float32", 320, 1280, 7, pool=True, allow_tf32=True),
    ExpandCase("bfloat16", 16, 96, 112, 3, 2),
    ExpandCase("bfloat16", 24, 144, 56, 3, 1),
    ExpandCase("bfloat16", 40, 240, 28, 5, 1),
    ExpandCase("bfloat16", 40, 240, 28, 3, 2),
    ExpandCase("bfloat16", 112, 672, 14, 5, 2),
    ExpandCase("bfloat16", 192, 1152, 7, 3, 1),
    ExpandCase("bfloat16", 13, 33, 9, 3, 1, pool=False),
    ExpandCase("bfloat16", 192, 1152, 7, 5, 1, batch=1),
    ExpandCase("float16", 160, 960, 24, 5, 1),
    ExpandCase("float32", 24, 144, 56, 5, 2, pool=False),
    ExpandCase("float32", 80, 480, 14, 3, 1, allow_tf32=True),
    FusedCase("bfloat16", 24, 24, 0, 192, 3, 1),
    FusedCase("bfloat16", 24, 96, 48, 192, 3, 2),
    FusedCase("bfloat16", 48, 192, 48, 96, 3, 1),
    FusedCase("bfloat16", 48, 192, 64, 96, 3, 2),
    FusedCase("bfloat16", 64, 256, 64, 48, 3, 1),
    FusedCase("bfloat16", 64, 256, 64, 48, 3, 1, batch=1),
    FusedCase("bfloat16", 96, 384, 96, 48, 3, 1),
    FusedCase("bfloat16", 32, 256, 32, 56, 3, 1),
    FusedCase("bfloat16", 64, 384, 0, 28, 5, 1, pool=True),
    FusedCase("bfloat16", 13, 29, 11, 33, 3, 1),
    FusedCase("float16", 80, 640, 160, 28, 3, 2),
    FusedCase("float32", 48, 192, 48, 96, 3, 1),
    FusedCase("float32", 24, 96, 48, 192, 3, 2, allow_tf32=True),
)


class Driver:
    """What Triton asks of a driver before a kernel is loaded."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def call(
    case: Case | BatchNormActCase | SqueezeExciteCase | PointwiseCase | ExpandCase | FusedCase,
) -> None:
    """Runs the launchers of ``case`` on tensors whose values do not matter."""
    if isinstance(case, Case):
        call_depthwise(case)
    elif isinstance(case, BatchNormActCase):
        call_batch_norm_act(case)
    elif isinstance(case, SqueezeExciteCase):
        call_squeeze_excite(case)
    elif isinstance(case, PointwiseCase):
        call_pointwise(case)
    elif isinstance(case, ExpandCase):
        call_expand(case)
    else:
        call_fused(case)


def call_depthwise(case: Case) -> None:
    """Runs the one launcher of ``case``."""
    import torch

    from effnet_kernels.activations import Activation
    from effnet_kernels.triton import depthwise_conv_bn_act as op

    dtype = getattr(torch, case.dtype)
    C, extent, k = case.channels, case.size, case.kernel
    pad = k // 2
    out = (extent + 2 * pad - k) // case.stride + 1

    def image(size: int) -> torch.Tensor:
        return torch.empty((2, C, size, size), dtype=dtype, memory_format=torch.channels_last)

    def vector() -> torch.Tensor:
        return torch.empty(C)

    x, y, weight = image(extent), image(out), torch.empty(C, 1, k, k, dtype=dtype)
    silu = Activation.silu
    prologue = (vector(), vector(), silu) if case.prologue else (None, None, Activation.identity)
    pooled = torch.empty(2, C) if case.pool else None
    geometry = (case.stride, pad, pad)
    op.PACK_FROM = sys.maxsize if case.small else 0
    if case.mode == "inference":
        op.depthwise_conv_bn_act_out(
            x, weight, vector(), vector(), vector(), vector(), 1e-3, *geometry, silu, *prologue,
            y, pooled,
        )  # fmt: skip
    elif case.mode in ("train", "frozen", "conv"):
        op.depthwise_conv_bn_act_train_out(
            x, weight, vector(), vector(), 1e-3, *geometry, silu, *prologue, case.mode == "train",
            image(out), vector(), vector(), None if case.mode == "conv" else y, pooled,
        )  # fmt: skip
    else:
        prologue_grads = (vector(), vector()) if case.prologue else (None, None)
        op.depthwise_conv_bn_act_backward_out(
            y, pooled, image(out), vector(), vector(), vector(), vector(), 1e-3, silu, True,
            x, weight, *geometry, *prologue, image(extent), torch.empty_like(weight),
            vector(), vector(), *prologue_grads,
        )  # fmt: skip


def call_batch_norm_act(case: BatchNormActCase) -> None:
    """Runs the launchers of ``case`` as training blocks do: expand's, the gate's, project's."""
    import torch

    from effnet_kernels.activations import Activation
    from effnet_kernels.triton import batch_norm_act as op

    dtype = getattr(torch, case.dtype)
    N, C = 2, case.channels
    x, y, z, grad = (
        torch.empty((N, C, case.size, case.size), dtype=dtype, memory_format=torch.channels_last)
        for _ in range(4)
    )
    mean, var, weight, bias, grad_weight, grad_bias = (torch.empty(C) for _ in range(6))
    gate, pooled = torch.empty(N, C), torch.empty(N, C)
    op.channel_statistics_out(x, mean, var)
    bn = (mean, var, weight, bias, 1e-3)
    silu, identity = Activation.silu, Activation.identity
    op.batch_norm_act_out(x, *bn, silu, None, None, None, pooled)
    op.batch_norm_act_out(x, *bn, silu, gate, None, y, None)
    op.batch_norm_act_out(x, *bn, identity, gate, z, y, None)
    op.batch_norm_act_gate_out(grad, x, *bn, silu, gate, pooled, y, grad)
    sums = (grad_weight, grad_bias)
    for options in ((silu, gate, pooled), (identity, None, None)):
        op.batch_norm_act_sums_out(grad, x, *bn, *options, *sums)
        op.batch_norm_act_backward_out(grad, x, *bn, *options, *sums, False, grad)
    op.batch_norm_act_backward_out(grad, x, *bn, identity, None, None, *sums, True, grad)


def call_squeeze_excite(case: SqueezeExciteCase) -> None:
    """Runs the three launchers of ``case``, in their order."""
    import torch

    from effnet_kernels.activations import Activation
    from effnet_kernels.triton import squeeze_excite as op

    dtype = getattr(torch, case.dtype)
    N, C, S, pixels = 2, case.channels, case.squeezed, case.size**2
    x, y = (
        torch.empty((N, C, case.size, case.size), dtype=dtype, memory_format=torch.channels_last)
        for _ in range(2)
    )
    pooled, shift, grad_gate, gate, hidden = (torch.empty(N, k) for k in (C, C, C, C, S))
    reduce_weight, expand_weight = torch.empty(S, C, dtype=dtype), torch.empty(C, S, dtype=dtype)
    reduce_bias, expand_bias = torch.empty(S, dtype=dtype), torch.empty(C, dtype=dtype)
    activations = Activation.silu, Activation.sigmoid
    if case.mode == "forward":
        op.channel_sums_out(x, None, pooled)
        op.squeeze_excite_gate_out(
            pooled, pixels, reduce_weight, reduce_bias, expand_weight, expand_bias, *activations,
            hidden, gate,
        )  # fmt: skip
        op.channel_scale_out(x, gate, None, y)
    else:
        op.channel_sums_out(y, x, grad_gate)
        op.squeeze_excite_gate_backward_out(
            grad_gate, pooled, pixels, hidden, gate, reduce_weight, expand_weight, *activations,
            shift, torch.empty_like(reduce_weight), reduce_bias, torch.empty_like(expand_weight),
            expand_bias,
        )  # fmt: skip
        op.channel_scale_out(y, gate, shift, x)


def call_pointwise(case: PointwiseCase) -> None:
    """Runs the one launcher of ``case``."""
    import torch

    from effnet_kernels.activations import Activation
    from effnet_kernels.triton import pointwise_conv_bn_act as op

    dtype = getattr(torch, case.dtype)
    N, C, K = case.batch, case.channels, case.features

    def image(channels: int) -> torch.Tensor:
        shape = (N, channels, case.size, case.size)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    silu = Activation.silu
    prologue = (torch.empty(C), torch.empty(C), silu) if case.prologue else (None, None, silu)
    op.pointwise_conv_bn_act_out(
        image(C), torch.empty(K, C, dtype=dtype), *(torch.empty(K) for _ in range(4)), 1e-3, silu,
        *prologue, torch.empty(N, C) if case.gate else None, image(K) if case.residual else None,
        case.allow_tf32, image(K), torch.empty(N, K) if case.pool else None,
    )  # fmt: skip


def call_expand(case: ExpandCase) -> None:
    """Runs the one launcher of ``case``."""
    import torch

    from effnet_kernels.activations import Activation
    from effnet_kernels.triton import mbconv as op

    dtype = getattr(torch, case.dtype)
    N, C, k, pad = case.batch, case.channels, case.kernel, case.kernel // 2
    out = (case.size + 2 * pad - k) // case.stride + 1

    def image(channels: int, size: int) -> torch.Tensor:
        shape = (N, channels, size, size)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    vectors = [torch.empty(C) for _ in range(4)]
    silu = Activation.silu
    op.expand_depthwise_out(
        image(case.inputs, case.size), torch.empty(C, case.inputs, dtype=dtype), *vectors, 1e-3,
        silu, torch.empty(C, 1, k, k, dtype=dtype), *vectors, 1e-3, case.stride, pad, pad, silu,
        case.allow_tf32, image(C, out), torch.empty(N, C) if case.pool else None,
    )  # fmt: skip


def call_fused(case: FusedCase) -> None:
    """Runs the one launcher of ``case``."""
    import torch

    from effnet_kernels.activations import Activation
    from effnet_kernels.triton import fused_mbconv as op

    dtype = getattr(torch, case.dtype)
    N, M, k, pad = case.batch, case.middle, case.kernel, case.kernel // 2
    out = (case.size + 2 * pad - k) // case.stride + 1

    def image(channels: int, size: int) -> torch.Tensor:
        shape = (N, channels, size, size)
        return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)

    x, y = image(case.channels, case.size), image(case.features or M, out)
    project: list[torch.Tensor | None] = [None] * 5
    if case.features:
        vectors = [torch.empty(case.features) for _ in range(4)]
        project = [torch.empty(case.features, M, dtype=dtype), *vectors]
    op.fused_mbconv_out(
        x, weight(M, case.channels, k, k), *(torch.empty(M) for _ in range(4)), 1e-3,
        Activation.silu, case.stride, pad, pad, *project, 1e-3, Activation.identity,
        x if case.residual else None, case.allow_tf32, y,
        torch.empty(N, M) if case.pool else None,
    )  # fmt: skip


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What Triton's own cuobjdump says of ``cubin``."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [tool, *options, file.name], capture_output=True, text=True, check=True
        )
    return run.stdout


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\S+\s+)?([A-Z][\w.]*)([^;]*);", re.M)


def spills_in_loops(instructions: list[tuple[int, str, str]]) -> int:
    """Accesses to local memory inside the innermost loops."""
    loops = []
    for address, name, operands in instructions:
        target = re.search(r"\b0x([0-9a-f]+)", operands)
        # A branch to itself ends every kernel, as padding.
        if name.startswith("BRA") and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [
        (first, last)
        for first, last in loops
        if not any(first <= inner and end < last for inner, end in loops)
    ]
    return sum(
        name.startswith(("LDL", "STL"))
        and any(first <= address <= last for first, last in innermost)
        for address, name, _ in instructions
    )


def usage(kernel: Any) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, loads (asynchronous copies among them), stores
    and instructions of the tensor cores of a compiled kernel.
    """
    cubin = kernel.asm["cubin"]
    found = re.search(
        r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump(cubin, "--dump-resource-usage")
    )
    assert found is not None
    instructions = [
        (int(address, 16), name, operands)
        for address, name, operands in INSTRUCTION.findall(cuobjdump(cubin, "-sass"))
    ]
    widths: dict[str, dict[str, int]] = {"LDG": {}, "STG": {}, "LDGSTS": {}}
    for _, name, _ in instructions:
        width = re.search(r"\.(U8|U16|S16|64|128)\b", name)
        bits = width[1].strip("US") if width else "32"
        for kind in {name[:3], name.split(".")[0]} & widths.keys():
            widths[kind][bits] = widths[kind].get(bits, 0) + 1
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]) + int(found[3]),
        "spills_in_loops": spills_in_loops(instructions),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "loads": dict(sorted(widths["LDG"].items())),
        "stores": dict(sorted(widths["STG"].items())),
        "copies": dict(sorted(widths["LDGSTS"].items())),
        "instructions": len(instructions),
        "products": " ".join(
            sorted({name.split(".")[0] for _, name, _ in instructions} & {*TENSOR_CORES})
        ),
    }


def compile_all(architecture: str, only: str = "") -> dict[str, dict[str, Any]]:
    """What each kernel of each case uses, by "case: kernel"; the same kernel is compiled once.

    ``only``: of the cases that have this word.

    Where a case compiles a kernel again, for other arguments, "kernel 2" follows and so on.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from effnet_kernels.triton import fused_mbconv
    from effnet_kernels.triton.launch import Hardware

    compiled: list[tuple[str, Any]] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))

    capability = int(architecture.removeprefix("sm_"))
    hardware = Hardware(132, SHARED[architecture], capability // 10)
    fused_mbconv.hardware = lambda tensor: hardware
    driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    results: dict[str, dict[str, Any]] = {}
    seen = set()
    for case in CASES:
        if only not in str(case).split() and only:
            continue
        compiled.clear()
        call(case)
        names: Counter[str] = Counter()
        for name, kernel in compiled:
            if kernel.hash not in seen:
                seen.add(kernel.hash)
                names[name] += 1
                number = f" {names[name]}" if names[name] > 1 else ""
                results[f"{case}: {name}{number}"] = usage(kernel)
    return results


def in_processes(
    architectures: tuple[str, ...], only: str = ""
) -> dict[str, dict[str, dict[str, Any]]]:
    """``compile_all`` of each architecture, each in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {
        architecture: subprocess.Popen(
            [sys.executable, __file__, architecture, "--only", only],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for architecture in architectures
    }
    results = {}
    for architecture, process in processes.items():
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{__file__} {architecture} failed with {process.returncode}")
        results[architecture] = json.loads(output)
    return results


def triton_version() -> str:
    """Triton's major and minor version: another compiles to other registers."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def occupancy(architecture: str, used: dict[str, Any]) -> float:
    """The part of a multiprocessor's warps that its registers and shared memory let be resident."""
    registers = -(-used["registers"] // 8) * 8 * 32 * used["warps"]
    shared = (SHARED[architecture] + RESERVED) // (used["shared"] + RESERVED)
    programs = min(REGISTERS_PER_SM // registers, shared)
    return min(programs * used["warps"], WARPS_PER_SM) / WARPS_PER_SM


BUDGETED = ("registers", "spilled", "spills_in_loops", "shared", "products")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", nargs="?", choices=ARCHITECTURES)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if arguments.write:
        budget: dict[str, Any] = json.loads(BUDGET.read_text()) if arguments.only else {}
        budget["triton"] = triton_version()
        for architecture, results in in_processes(ARCHITECTURES, arguments.only).items():
            # No empty words: most kernels leave the tensor cores alone.
            budget.setdefault(architecture, {}).update(
                (kernel, {key: used[key] for key in BUDGETED if used[key] != ""})
                for kernel, used in results.items()
            )
        BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
        return
    results = compile_all(arguments.architecture, arguments.only)
    if not arguments.table:
        print(json.dumps(results))
        return
    print("registers  spilled  in loops  shared  occupancy  instructions  products  loads  stores")
    for kernel, used in results.items():
        print(
            f"{used['registers']:9}  {used['spilled']:7}  {used['spills_in_loops']:8}  "
            f"{used['shared']:6}  {occupancy(arguments.architecture, used):9.0%}  "
            f"{used['instructions']:12}  {used['products']:8}  {used['loads']}  "
            f"{used['stores']}  {kernel}"
        )


if __name__ == "__main__":
    main()
