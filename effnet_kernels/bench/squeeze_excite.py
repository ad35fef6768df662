"""``ops.squeeze_excite`` beside its peers, on the squeeze-and-excitations of the models."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from effnet_kernels.bench import kernels, shapes
from effnet_kernels.bench.shapes import SqueezeExcite
from effnet_kernels.ops import squeeze_excite

NAME = "kernels-squeeze_excite"
MODES = ("inference", "inference+pool", "training")
"""Gate and scale, with the image's sums (for eager, its mean) given; with the pool; forward with
the pool, and backward.
"""
PEERS = kernels.PEERS


class Problem(kernels.Problem[SqueezeExcite]):
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
    def bytes(self) -> int:
        """2y with the sums given, 3y without, 7y forward and back."""
        passes = {"inference": 2, "inference+pool": 3, "training": 7}
        return passes[self.mode] * self.image_bytes(self.input)

    @property
    def flops(self) -> int:
        """FLOPs of the two products, and of their gradients in training."""
        forward = 4 * self.batch * self.shape.channels * self.shape.squeezed
        return 3 * forward if self.training else forward


class Block(kernels.Block):
    """The op in PyTorch's own words, as timm's blocks run it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        s = problem.shape
        self.excite = kernels.SqueezeExcite(s.channels, s.squeezed, problem, device)
        self.pooled: Tensor | None
        # Those of some other image: the gate of its own would be next to the same for all.
        sums = torch.randn(problem.batch, s.channels, device=device) * s.size**2
        self.register_buffer("pooled", sums if problem.mode == "inference" else None)
        self.mean: Tensor | None = None
        self.pixels = s.size**2

    def prepare(self) -> None:
        """The mean that is given, in the dtype of the image."""
        if self.pooled is not None:
            mean = (self.pooled / self.pixels)[:, :, None, None]
            self.mean = mean.to(self.excite.reduce_weight.dtype)

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The image times its gate."""
        mean = image.mean((2, 3), keepdim=True) if self.mean is None else self.mean
        return (image * self.excite(mean),)


class OurBlock(Block):
    """The same in one call."""

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The image times its gate."""
        excite = self.excite
        return (
            squeeze_excite(
                image, excite.reduce_weight, excite.reduce_bias, excite.expand_weight,
                excite.expand_bias, pooled=self.pooled,
            ),
        )  # fmt: skip


match = functools.partial(kernels.match, stock=Block, fused=OurBlock)
"""The contenders on one problem; see ``kernels.match``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    kernels.add_arguments(parser, "squeeze-and-excitations", MODES)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    return kernels.problems(
        arguments, Problem, lambda model, _: shapes.squeeze_excite_shapes(model)
    )
