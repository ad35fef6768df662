"""``ops.batch_norm_act`` beside its peers, on the BNs of the models."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels.bench import kernels, shapes
from effnet_kernels.bench.kernels import EPS, BatchNorm
from effnet_kernels.bench.shapes import Norm
from effnet_kernels.ops import batch_norm_act

NAME = "kernels-batch_norm_act"
MODES = ("inference", "inference+residual", "training", "training+residual")
"""By running statistics; forward and backward by the batch's. With a residual are those BNs that a
model has one after, without one all others.
"""
PEERS = kernels.PEERS


class Problem(kernels.Problem[Norm]):
    """One shape, batch, dtype and mode."""

    @property
    def input(self) -> tuple[int, int]:
        """Channels and size of the image."""
        return self.shape.channels, self.shape.size

    @property
    def output(self) -> tuple[int, int]:
        """Channels and size of the result."""
        return self.input

    @property
    def residual(self) -> bool:
        """Whether the block's input is added."""
        return self.shape.residual

    @property
    def bytes(self) -> int:
        """2y in inference, 3y + 5y forward and back; a y for the residual."""
        return ((8 if self.training else 2) + self.residual) * self.image_bytes(self.input)

    @property
    def flops(self) -> int:
        """There is no convolution."""
        return 0


class Block(kernels.Block):
    """The op in PyTorch's own words, as timm's blocks run it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        self.bn = BatchNorm(problem.shape.channels, device, learns=problem.training)
        self.activation, self.by_batch = problem.shape.activation, problem.training

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """BN and the activation of ``image``, and ``residual``."""
        y = self.bn(image, self.by_batch)
        if self.activation == "silu":
            y = F.silu(y, inplace=True)
        return (y if residual is None else y + residual,)


class OurBlock(Block):
    """The same in one call."""

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """BN and the activation of ``image``, and ``residual``."""
        bn = self.bn
        return (
            batch_norm_act(
                image, bn.mean, bn.var, bn.weight, bn.bias, self.by_batch, EPS, self.activation,
                residual=residual,
            ).output,
        )  # fmt: skip


match = functools.partial(kernels.match, stock=Block, fused=OurBlock)
"""The contenders on one problem; see ``kernels.match``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    kernels.add_arguments(parser, "BNs", MODES)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""

    def shapes_of(model: str, mode: str) -> list[Norm]:
        return [s for s in shapes.norm_shapes(model) if s.residual == mode.endswith("residual")]

    return kernels.problems(arguments, Problem, shapes_of)
