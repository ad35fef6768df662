"""Calls one backend's kernels on the GPU, for compute-sanitizer and ncu to watch.

``small`` goes through ops, kernel sizes, strides, odd shapes, dtypes and options on a few pixels;
``model`` runs EfficientNet-B0's blocks and depthwise convolutions in inference, and the first in
training.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch

from effnet_kernels import backends, use_backend
from effnet_kernels.bench import (
    batch_norm_act,
    fused_mbconv,
    kernels,
    mbconv,
    pointwise_conv_bn_act,
    shapes,
    squeeze_excite,
)
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act
from effnet_kernels.ops.mbconv_cost import fuse_expand

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODEL = "efficientnet_b0"


def call(suite: Any, shape: Any, batch: int, dtype: torch.dtype, mode: str, device: str) -> None:
    """Our block of a suite, once, with its backward if the mode has one."""
    problem = suite.Problem(shape, batch, dtype, mode)
    where = torch.device(device)
    block = suite.OurBlock(problem, where)
    block.prepare()
    with torch.set_grad_enabled(problem.training):
        kernels.caller(block, None)(kernels.inputs_of(problem, where))


def call_depthwise(
    batch: int, channels: int, size: int, kernel: int, stride: int, dtype: torch.dtype,
    device: str, *, training: bool, options: bool,
) -> None:  # fmt: skip
    """The depthwise op, once, with its backward in training; with pool and prologue if ``options``.

    Padded as TensorFlow does it.
    """
    image = torch.randn(batch, channels, size, size, device=device).to(dtype)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_(training)
    weight = torch.randn(channels, 1, kernel, kernel, device=device).to(dtype)
    weight.requires_grad_(training)
    ones = torch.ones(channels, device=device)
    result = depthwise_conv_bn_act(
        image, weight, ones * 0, ones, ones, ones, stride, "same", training=training,
        pool=options, prologue=Prologue(ones, ones, "silu") if options else None,
    )  # fmt: skip
    if training:
        result.output.float().square().mean().backward()


def small_problems() -> Iterator[tuple[Any, Any, str]]:
    """(suite, shape, mode) of all but the depthwise op: channels that no vector divides, images
    that no tile does.
    """
    for kernel, stride in ((3, 1), (5, 2), (7, 1)):
        for channels, expanded, out_channels, size in ((5, 13, 5, 9), (8, 40, 16, 17)):
            residual = stride == 1 and channels == out_channels
            geometry = (size, kernel, stride, residual)
            for mode in mbconv.MODES:
                block = shapes.Mbconv(MODEL, channels, expanded, out_channels, 3, *geometry)
                yield mbconv, block, mode
    for mode in mbconv.MODES:  # without an expansion
        yield mbconv, shapes.Mbconv(MODEL, 12, 12, 12, 2, 11, 3, 1, True), mode
    widths = ((5, 13, 5), (8, 40, 16), (7, 7, 7))  # the last without an expansion
    for (kernel, stride), width in itertools.product(((3, 1), (3, 2), (5, 1)), widths):
        residual = stride == 1 and width[0] == width[2]
        block = shapes.FusedMbconv(MODEL, *width, 17, kernel, stride, residual)
        for mode in fused_mbconv.MODES:
            yield fused_mbconv, block, mode
    for channels, features, size in ((13, 7, 9), (40, 136, 5)):
        for role in pointwise_conv_bn_act.MODES:
            options = (role == "project",) * 2
            convolution = shapes.Pointwise(MODEL, role, channels, features, size, *options)
            yield pointwise_conv_bn_act, convolution, role
    for channels, size in ((13, 9), (40, 5)):
        for mode in squeeze_excite.MODES:
            yield squeeze_excite, shapes.SqueezeExcite(MODEL, channels, 3, size), mode
        for mode in batch_norm_act.MODES:
            residual = mode.endswith("residual")
            yield batch_norm_act, shapes.Norm(MODEL, channels, size, "silu", residual), mode


def small(device: str) -> None:
    """Little of everything."""
    grid = itertools.product((3, 5, 7), (1, 2), ((1, 13, 7), (2, 24, 17), (1, 72, 9)), DTYPES)
    for kernel, stride, (batch, channels, size), dtype in grid:
        for training, options in itertools.product((False, True), repeat=2):
            call_depthwise(
                batch, channels, size, kernel, stride, dtype, device, training=training,
                options=options,
            )  # fmt: skip
    for (suite, shape, mode), dtype in itertools.product(small_problems(), DTYPES):
        for fused in (True, False) if (suite, mode) == (mbconv, "inference") else (None,):
            with fuse_expand(fused):
                call(suite, shape, 2, dtype, mode, device)


def model(batch: int, device: str) -> None:
    """EfficientNet-B0's blocks and depthwise convolutions in bfloat16."""
    blocks = shapes.mbconv_shapes(MODEL)
    convolutions = shapes.depthwise_shapes(MODEL)
    for training in (False, True):
        for block in blocks[:2] if training else blocks:
            mode = "training" if training else "inference"
            call(mbconv, block, batch, torch.bfloat16, mode, device)
        for s in convolutions[:4] if training else convolutions:
            call_depthwise(
                batch, s.channels, s.size, s.kernel, s.stride, torch.bfloat16, device,
                training=training, options=True,
            )  # fmt: skip


def main() -> int:
    """Runs what is asked for, and waits for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("small", "model"))
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--batch", type=int, default=128, help="of model (default: 128)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("exercise.py: PyTorch sees no GPU", file=sys.stderr)
        return 2
    missing = backends.KERNEL_BACKENDS[arguments.backend].missing
    if missing is not None:
        print(f"exercise.py: backend {arguments.backend} is missing: {missing}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with use_backend(arguments.backend):
        if arguments.what == "small":
            small("cuda")
        else:
            model(arguments.batch, "cuda")
    torch.cuda.synchronize()
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
