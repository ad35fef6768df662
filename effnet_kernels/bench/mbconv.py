"""``ops.mbconv`` and ``ops.mbconv_train`` beside their peers, on the blocks of the models."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import ops
from effnet_kernels.bench import kernels, shapes
from effnet_kernels.bench.shapes import Mbconv

NAME = "kernels-mbconv"
MODES = ("inference", "training")
"""``mbconv``; ``mbconv_train`` forward and backward, with batch statistics."""
PEERS = kernels.PEERS


class Problem(kernels.Problem[Mbconv]):
    """One block, batch, dtype and mode."""

    @property
    def input(self) -> tuple[int, int]:
        """Channels and size of the image."""
        return self.shape.in_channels, self.shape.size

    @property
    def output(self) -> tuple[int, int]:
        """Channels and size of the result."""
        return self.shape.out_channels, self.shape.output_size

    @property
    def bytes(self) -> int:
        """2x + 2d + y in inference, 5x + 10e + 15d + 11y forward and back.

        That is an x less each way without a residual. Without an expansion the depthwise
        convolution has x where it else has e, and the rest of what e and x cost is not there.
        """
        s = self.shape
        x, y = self.image_bytes(self.input), self.image_bytes(self.output)
        e = self.image_bytes((s.channels, s.size))
        d = self.image_bytes((s.channels, s.output_size))
        residual = s.residual * x
        if not self.training:
            return x + 2 * d + y + residual
        if s.expands:
            return 3 * x + 10 * e + 15 * d + 11 * y + 2 * residual
        return 3 * x + 15 * d + 11 * y + 2 * residual

    @property
    def flops(self) -> int:
        """FLOPs of all convolutions, and of their two gradients in training."""
        s = self.shape
        pixels, out_pixels = self.batch * s.size**2, self.batch * s.output_size**2
        forward = 2 * (
            s.expands * pixels * s.in_channels * s.channels
            + out_pixels * s.channels * (s.kernel**2 + s.out_channels)
            + self.batch * 2 * s.channels * s.squeezed
        )
        return 3 * forward if self.training else forward


class Block(kernels.Block):
    """The block in PyTorch's own words, as timm runs it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        s = problem.shape
        self.expand = (
            kernels.ConvBn(s.in_channels, s.channels, problem, device) if s.expands else None
        )
        self.depthwise = kernels.ConvBn(
            s.channels, s.channels, problem, device, s.kernel, s.stride, s.channels
        )
        self.excite = kernels.SqueezeExcite(s.channels, s.squeezed, problem, device)
        self.project = kernels.ConvBn(s.channels, s.out_channels, problem, device)
        self.shape, self.by_batch = s, problem.training

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The block of ``image``."""
        x = image
        if self.expand is not None:
            x = F.silu(self.expand(x, self.by_batch), inplace=True)
        x = F.silu(self.depthwise(x, self.by_batch), inplace=True)
        x = x * self.excite(x.mean((2, 3), keepdim=True))
        x = self.project(x, self.by_batch)
        return (x + image if self.shape.residual else x,)


class OurBlock(Block):
    """The same in one call."""

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The block of ``image``."""
        excite = self.excite
        arguments = (
            image,
            None if self.expand is None else self.expand.stage("silu"),
            self.depthwise.stage("silu"),
            ops.SqueezeExcite(
                excite.reduce_weight, excite.reduce_bias, excite.expand_weight, excite.expand_bias
            ),
            self.project.stage("identity"),
            self.shape.stride,
            self.shape.kernel // 2,
        )
        if self.by_batch:
            return (ops.mbconv_train(*arguments, residual=self.shape.residual).output,)
        return (ops.mbconv(*arguments, residual=self.shape.residual),)


match = functools.partial(kernels.match, stock=Block, fused=OurBlock)
"""The contenders on one problem; see ``kernels.match``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    kernels.add_arguments(parser, "blocks with a depthwise convolution", MODES)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    return kernels.problems(arguments, Problem, lambda model, _: shapes.mbconv_shapes(model))
