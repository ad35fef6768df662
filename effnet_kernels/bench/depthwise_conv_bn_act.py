"""``ops.depthwise_conv_bn_act`` beside its peers, on the depthwise convolutions of the models."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.bench import kernels, shapes
from effnet_kernels.bench.kernels import EPS, BatchNorm, ConvBn
from effnet_kernels.bench.shapes import Depthwise
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act

NAME = "kernels-depthwise_conv_bn_act"
MODES = ("inference", "inference+prologue", "inference+pool", "training")
"""Inference alone, with the BN and activation of the convolution before, with the pool for
squeeze-and-excitation; forward and backward with batch statistics.
"""
PEERS = kernels.PEERS


class Problem(kernels.Problem[Depthwise]):
    """One shape, batch, dtype and mode."""

    @property
    def input(self) -> tuple[int, int]:
        """Channels and size of the image."""
        return self.shape.channels, self.shape.size

    @property
    def output(self) -> tuple[int, int]:
        """Channels and size of the result."""
        return self.shape.channels, self.shape.output_size

    @property
    def bytes(self) -> int:
        """x + y in inference, 3x + 7y forward and back."""
        x, y = self.image_bytes(self.input), self.image_bytes(self.output)
        return 3 * x + 7 * y if self.training else x + y

    @property
    def flops(self) -> int:
        """FLOPs of the convolution, and of its two gradients in training."""
        s = self.shape
        forward = 2 * s.kernel**2 * self.batch * s.channels * s.output_size**2
        return 3 * forward if self.training else forward


class Block(kernels.Block):
    """The op in PyTorch's own words, as timm's blocks run it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        s = problem.shape
        conv = ConvBn(s.channels, s.channels, problem, device, s.kernel, s.stride, s.channels)
        self.weight, self.bn = conv.weight, conv.bn
        self.before = BatchNorm(s.channels, device, learns=False)
        self.shape, self.mode, self.by_batch = s, problem.mode, problem.training

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The activated output, and its sums over height and width in the pool's mode."""
        if self.mode == "inference+prologue":
            image = F.silu(self.before(image), inplace=True)
        k, stride = self.shape.kernel, self.shape.stride
        y = F.conv2d(image, self.weight, None, stride, k // 2, 1, self.shape.channels)
        y = F.silu(self.bn(y, self.by_batch), inplace=True)
        if self.mode == "inference+pool":
            return y, y.sum((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))
        return (y,)


class OurBlock(Block):
    """The same in one call."""

    prologue: Prologue | None = None

    def prepare(self) -> None:
        """Makes the BN before the convolution a scale and a shift."""
        if self.mode == "inference+prologue":
            before = self.before
            scale = before.weight * (before.var + EPS).rsqrt()
            self.prologue = Prologue(scale, before.bias - before.mean * scale, "silu")

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The activated output, and its sums over height and width in the pool's mode."""
        bn = self.bn
        result = depthwise_conv_bn_act(
            image, self.weight, bn.mean, bn.var, bn.weight, bn.bias, self.shape.stride,
            self.shape.kernel // 2, training=self.by_batch, eps=EPS,
            pool=self.mode == "inference+pool", prologue=self.prologue,
        )  # fmt: skip
        return (result.output,) if result.pooled is None else (result.output, result.pooled)


match = functools.partial(kernels.match, stock=Block, fused=OurBlock)
"""The contenders on one problem; see ``kernels.match``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    kernels.add_arguments(parser, "depthwise convolutions", MODES)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    return kernels.problems(arguments, Problem, lambda model, _: shapes.depthwise_shapes(model))
