"""Fused-MBConv as a module, and from the modules that hold its parameters elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.layers.block import (
    BlockModule,
    Excite,
    Stage,
    update,
)
from effnet_kernels.layers.running_statistics import normalises_by_batch
from effnet_kernels.ops import fused_mbconv, fused_mbconv_train
from effnet_kernels.ops.prepared import PreparedStage, prepare_fused_mbconv


class FusedBlock(NamedTuple):
    """The modules of a block.

    Attributes:
        expand: the dense k x k stage; its convolution's stride is read, its padding is not.
        excite: squeeze-and-excitation, or None.
        project: the 1x1 projection, or None where the block does not expand.
        padding: of the k x k convolution, as the ops take it.
        residual: whether the input is added.
    """

    expand: Stage
    excite: Excite | None
    project: Stage | None
    padding: int | str | Sequence[int]
    residual: bool

    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The BNs, in the order that they run in."""
        project = () if self.project is None else (self.project.norm,)
        return (self.expand.norm, *project)

    def prepared(self) -> PreparedStage | None:
        """The block in inference with its weights packed, or None where it has
        squeeze-and-excitation, with which it is not one kernel.
        """
        if self.excite is not None:
            return None
        return prepare_fused_mbconv(
            self.expand.arguments(),
            None if self.project is None else self.project.arguments(),
            self.expand.conv.stride[0],
            self.padding,
            residual=self.residual,
        )


def run_fused_mbconv(
    input: Tensor, block: FusedBlock, sample_scale: Callable[[], Tensor | None]
) -> Tensor:
    """Runs ``block``, with which ``statistics_refusal`` has no difficulty, on one op, with all that
    its BNs do to their buffers.

    Args:
        input: (N, C, H, W).
        block: the modules.
        sample_scale: draws what drop path multiplies images by, (N,), or gives None.
    """
    squeeze_excite = None if block.excite is None else block.excite.arguments()
    norms = block.norms()
    training = normalises_by_batch(norms[0])
    scale = sample_scale() if block.residual else None
    expand = block.expand.arguments(training)
    project = None if block.project is None else block.project.arguments(training)
    stride = block.expand.conv.stride[0]
    if not training and scale is None and not torch.is_grad_enabled():
        return fused_mbconv(
            input, expand, squeeze_excite, project, stride, block.padding, residual=block.residual
        )
    output, *statistics = fused_mbconv_train(
        input, expand, squeeze_excite, project, stride, block.padding,
        training=training, residual=block.residual, sample_scale=scale,
    )  # fmt: skip
    if training:
        update(norms, statistics)
    return output


class FusedMBConv(BlockModule):
    """The Fused-MBConv block of EfficientNetV2: a dense k x k convolution that expands, BN,
    activation, squeeze-and-excitation if wanted, a 1x1 projection, BN, and the input where the
    shapes allow it.

    The children are stock modules, so that parameters initialise, serialise and convert as
    everywhere else; they only hold the parameters and are not called, so hooks on them do not run.

    Args:
        in_channels: C.
        out_channels: K.
        expand_ratio: M = C * expand_ratio channels in between. With 1 there is no projection: the
            convolution itself has K channels.
        kernel_size: 3, 5 or 7.
        stride: 1 or 2.
        padding: as ``effnet_kernels.ops.fused_mbconv`` takes it: an int, (height, width),
            (left, right, top, bottom) or "same"; None for ``kernel_size // 2``.
        squeezed: channels of squeeze-and-excitation's hidden values; 0 for none.
        drop_path: the probability that a training image skips the block, where there is a residual.
        eps: BN's.
        momentum: BN's; None for a cumulative average.
        activation: an activation's name.
        gate: of squeeze-and-excitation: sigmoid or hardsigmoid.

    Shapes:
        x: (N, C, H, W); channels-last is taken as it is, other layouts are converted once.
        output: (N, K, OH, OW), channels-last, x's dtype.

    Raises:
        ValueError: ``activation`` or ``gate`` is not known, ``drop_path`` is no probability, or
            ``squeezed`` is given without an expansion; the op checks the other settings when it
            runs.

    Source: "EfficientNetV2: Smaller Models and Faster Training" (arXiv:2104.00298).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: int = 4,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str | Sequence[int] | None = None,
        squeezed: int = 0,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "silu",
        gate: str = "sigmoid",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, drop_path, activation, gate
        )
        if squeezed and expand_ratio == 1:
            raise ValueError(f"squeezed: got {squeezed}, expected 0 where expand_ratio is 1")

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps=eps, momentum=momentum)

        channels = out_channels if expand_ratio == 1 else in_channels * expand_ratio
        # The op pads; the module's own padding would not be read.
        self.expand_conv = nn.Conv2d(in_channels, channels, kernel_size, stride, bias=False)
        self.expand_bn = norm(channels)
        self.project_conv = self.project_bn = None
        self.add_squeeze_excite(channels, squeezed)
        if expand_ratio != 1:
            self.project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
            self.project_bn = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        project = None
        if self.project_conv is not None and self.project_bn is not None:
            project = Stage(self.project_conv, self.project_bn, "identity")
        expand = Stage(self.expand_conv, self.expand_bn, self.activation)
        block = FusedBlock(expand, self.squeeze_excite(), project, self.padding, self.residual)
        return run_fused_mbconv(x, block, lambda: self.sample_scale(x))
