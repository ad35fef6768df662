"""``ops.fused_mbconv`` and ``ops.fused_mbconv_train`` beside their peers, on the models' blocks."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import ops
from effnet_kernels.bench import kernels, peers, shapes
from effnet_kernels.bench.peers import Match
from effnet_kernels.bench.shapes import FusedMbconv

NAME = "kernels-fused_mbconv"
MODES = ("inference", "training")
"""``fused_mbconv``; ``fused_mbconv_train`` forward and backward, with batch statistics."""
PEERS = (*kernels.PEERS, "folded", "folded+compile")
"""The last two have BN folded into the convolutions, in inference: see ``FoldedBlock``, and
``CompiledFoldedBlock``, which is for GPUs.
"""
MODELS = ("efficientnetv2_s", "efficientnetv2_s@384")
"""What is measured by default: EfficientNetV2-S at its sizes in training and after it."""


class Problem(kernels.Problem[FusedMbconv]):
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
        """x + y in inference, 3x + 16e + 11y forward and back.

        A residual is an x more forward and 3x back. Without an expansion the result is all there is
        of e: 3x + 11y forward and back.
        """
        s = self.shape
        x, y = self.image_bytes(self.input), self.image_bytes(self.output)
        e = self.image_bytes((s.channels, s.output_size))
        if not self.training:
            return x + y + s.residual * x
        return 3 * x + s.expands * 16 * e + 11 * y + 4 * s.residual * x

    @property
    def flops(self) -> int:
        """FLOPs of the convolutions, and of their two gradients in training."""
        s = self.shape
        filters = s.kernel**2 * s.in_channels + s.expands * s.out_channels
        forward = 2 * self.batch * s.output_size**2 * s.channels * filters
        return 3 * forward if self.training else forward


class Block(kernels.Block):
    """The block in PyTorch's own words, as timm runs it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        s = problem.shape
        self.expand = kernels.ConvBn(s.in_channels, s.channels, problem, device, s.kernel, s.stride)
        self.project = (
            kernels.ConvBn(s.channels, s.out_channels, problem, device) if s.expands else None
        )
        self.shape, self.by_batch = s, problem.training

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The block of ``image``."""
        x = F.silu(self.expand(image, self.by_batch), inplace=True)
        if self.project is not None:
            x = self.project(x, self.by_batch)
        return (x + image if self.shape.residual else x,)


class FoldedBlock(Block):
    """The block in inference with BN folded into the convolutions' weights and biases.

    On a GPU the convolutions are the fastest that cuDNN finds by trying; PyTorch then adds the bias
    in a pass of its own, as the activation is everywhere.
    """

    expand_folded: tuple[Tensor, Tensor]
    project_folded: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> None:
        """Folds BN."""
        self.expand_folded = self.expand.folded()
        if self.project is not None:
            self.project_folded = self.project.folded()

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The block of ``image``."""
        with _cudnn_tries():
            return (self.run(image),)

    def run(self, image: Tensor) -> Tensor:
        """The block of ``image``, with what algorithms cuDNN is set to."""
        s = self.shape
        x = F.conv2d(image, *self.expand_folded, s.stride, s.kernel // 2)
        x = F.silu(x, inplace=True)
        if self.project_folded is not None:
            x = F.conv2d(x, *self.project_folded)
        return x.add_(image) if s.residual else x


class CompiledFoldedBlock(FoldedBlock):
    """The same through ``torch.compile``, which makes a pass of bias, activation and residual.

    On a CPU ``compile`` freezes the parameters, and folds BN itself.
    """

    compiled: Callable[[Tensor], Tensor]

    def prepare(self) -> None:
        """Folds BN; the compilation happens in the first call."""
        super().prepare()
        self.compiled = peers.compiled(super().run, peers.COMPILED["compile"], freezing=False)

    def run(self, image: Tensor) -> Tensor:
        """The block of ``image``, with what algorithms cuDNN is set to."""
        return self.compiled(image)


@contextlib.contextmanager
def _cudnn_tries() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class OurBlock(Block):
    """The same in one call."""

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The block of ``image``."""
        arguments = (
            image,
            self.expand.stage("silu"),
            None,
            None if self.project is None else self.project.stage("identity"),
            self.shape.stride,
            self.shape.kernel // 2,
        )
        if self.by_batch:
            return (ops.fused_mbconv_train(*arguments, residual=self.shape.residual).output,)
        return (ops.fused_mbconv(*arguments, residual=self.shape.residual),)


def match(problem: Problem, device: torch.device, **options: Any) -> Match:
    """The contenders on one problem; see ``kernels.match``."""
    others: dict[str, type[Block]] = {"folded": FoldedBlock}
    if device.type == "cuda":
        others["folded+compile"] = CompiledFoldedBlock
    return kernels.match(problem, device, Block, OurBlock, others=others, **options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    kernels.add_arguments(parser, "blocks without a depthwise convolution", MODES, MODELS)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    return kernels.problems(arguments, Problem, lambda model, _: shapes.fused_mbconv_shapes(model))
