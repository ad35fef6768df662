"""Calls one backend's kernels on the GPU, for compute-sanitizer and ncu to watch.

``small`` goes through kernel sizes, strides, odd shapes, dtypes and options on a few pixels;
``model`` runs EfficientNet-B0's depthwise convolutions in inference, and the first in training.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from effnet_kernels import backends, use_backend
from effnet_kernels.bench import shapes
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act


def call(
    batch: int, channels: int, size: int, kernel: int, stride: int, dtype: torch.dtype,
    *, training: bool, options: bool,
) -> None:  # fmt: skip
    """One forward pass, and the backward in training; with pool and prologue if ``options``."""
    image = torch.randn(batch, channels, size, size, device="cuda").to(dtype)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_(training)
    weight = torch.randn(channels, 1, kernel, kernel, device="cuda").to(dtype)
    weight.requires_grad_(training)
    ones = torch.ones(channels, device="cuda")
    result = depthwise_conv_bn_act(
        image, weight, ones * 0, ones, ones, ones, stride, "same", training=training,
        pool=options, prologue=Prologue(ones, ones, "silu") if options else None,
    )  # fmt: skip
    if training:
        result.output.float().square().mean().backward()


def small() -> None:
    """Little of everything."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    grid = itertools.product((3, 5, 7), (1, 2), ((1, 13, 7), (2, 24, 17), (1, 72, 9)), dtypes)
    for kernel, stride, (batch, channels, size), dtype in grid:
        for training, options in itertools.product((False, True), repeat=2):
            call(batch, channels, size, kernel, stride, dtype, training=training, options=options)


def model(batch: int) -> None:
    """The depthwise convolutions of EfficientNet-B0 in bfloat16."""
    of_model = shapes.depthwise_shapes("efficientnet_b0")
    for training, chosen in ((False, of_model), (True, of_model[:4])):
        for shape in chosen:
            call(
                batch, shape.channels, shape.size, shape.kernel, shape.stride, torch.bfloat16,
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
            small()
        else:
            model(arguments.batch)
    torch.cuda.synchronize()
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
