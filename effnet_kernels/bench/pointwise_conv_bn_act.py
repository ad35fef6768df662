"""``ops.pointwise_conv_bn_act`` beside its peers, on the 1x1 convolutions of the models."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.bench import kernels, shapes
from effnet_kernels.bench.kernels import EPS, ConvBn
from effnet_kernels.bench.shapes import Pointwise
from effnet_kernels.ops import pointwise_conv_bn_act

NAME = "kernels-pointwise_conv_bn_act"
MODES = ("expand", "project", "head")
"""In inference: BN and SiLU; a gate in front, BN, and the residual where the block has one; BN,
SiLU and the pool.
"""
PEERS = kernels.PEERS


class Problem(kernels.Problem[Pointwise]):
    """One convolution, batch and dtype; the mode is its role."""

    @property
    def input(self) -> tuple[int, int]:
        """Channels and size of the image."""
        return self.shape.in_channels, self.shape.size

    @property
    def output(self) -> tuple[int, int]:
        """Channels and size of the result."""
        return self.shape.out_channels, self.shape.size

    @property
    def residual(self) -> bool:
        """Whether the block's input is added."""
        return self.shape.residual

    @property
    def bytes(self) -> int:
        """x + y, and a y for the residual."""
        x, y = self.image_bytes(self.input), self.image_bytes(self.output)
        return x + y * (1 + self.residual)

    @property
    def flops(self) -> int:
        """FLOPs of the product."""
        s = self.shape
        return 2 * self.batch * s.size**2 * s.in_channels * s.out_channels


class Block(kernels.Block):
    """The op in PyTorch's own words, as timm's blocks run it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        s = problem.shape
        self.conv = ConvBn(s.in_channels, s.out_channels, problem, device)
        self.gate: Tensor | None
        gate = torch.rand(problem.batch, s.in_channels, device=device).to(problem.dtype)
        self.register_buffer("gate", gate[:, :, None, None] if s.gate else None)
        self.role = s.role

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The result, and its sums over height and width of the head."""
        y = self.conv(image if self.gate is None else image * self.gate)
        if self.role != "project":
            y = F.silu(y, inplace=True)
        if residual is not None:
            y = y + residual
        if self.role == "head":
            return y, y.sum((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))
        return (y,)


class OurBlock(Block):
    """The same in one call."""

    def prepare(self) -> None:
        """The gate as ``squeeze_excite_gate`` makes it, float32."""
        if self.gate is not None:
            self.gate = self.gate.flatten(1).float()

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The result, and its sums over height and width of the head."""
        conv, bn = self.conv, self.conv.bn
        result = pointwise_conv_bn_act(
            image, conv.weight, bn.mean, bn.var, bn.weight, bn.bias, EPS,
            "identity" if self.role == "project" else "silu", gate=self.gate, residual=residual,
            pool=self.role == "head",
        )  # fmt: skip
        return (result.output,) if result.pooled is None else (result.output, result.pooled)


match = functools.partial(kernels.match, stock=Block, fused=OurBlock)
"""The contenders on one problem; see ``kernels.match``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    kernels.add_arguments(parser, "1x1 convolutions", MODES)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    return kernels.problems(
        arguments,
        Problem,
        lambda model, mode: [s for s in shapes.pointwise_shapes(model) if s.role == mode],
    )
