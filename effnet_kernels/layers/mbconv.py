"""MBConv as a module, and from the modules that hold its parameters elsewhere."""

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
from effnet_kernels.ops import mbconv, mbconv_train
from effnet_kernels.ops.prepared import PreparedStage, prepare_mbconv


class Block(NamedTuple):
    """The modules of a block.

    Attributes:
        expand: the 1x1 expansion, or None.
        depthwise: the depthwise stage; its convolution's stride is read, its padding is not.
        excite: squeeze-and-excitation, or None.
        project: the 1x1 projection.
        padding: of the depthwise convolution, as the ops take it.
        residual: whether the input is added.
    """

    expand: Stage | None
    depthwise: Stage
    excite: Excite | None
    project: Stage
    padding: int | str | Sequence[int]
    residual: bool

    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The BNs, in the order that they run in."""
        expand = () if self.expand is None else (self.expand.norm,)
        return (*expand, self.depthwise.norm, self.project.norm)

    def prepared(self) -> PreparedStage:
        """The block in inference with its weights packed."""
        return prepare_mbconv(
            None if self.expand is None else self.expand.arguments(),
            self.depthwise.arguments(),
            None if self.excite is None else self.excite.arguments(),
            self.project.arguments(),
            self.depthwise.conv.stride[0],
            self.padding,
            residual=self.residual,
        )


def run_mbconv(input: Tensor, block: Block, sample_scale: Callable[[], Tensor | None]) -> Tensor:
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
    expand = None if block.expand is None else block.expand.arguments(training)
    depthwise, project = block.depthwise.arguments(training), block.project.arguments(training)
    stride = block.depthwise.conv.stride[0]
    if not training and scale is None and not torch.is_grad_enabled():
        return mbconv(
            input, expand, depthwise, squeeze_excite, project, stride, block.padding,
            residual=block.residual,
        )  # fmt: skip
    output, *statistics = mbconv_train(
        input, expand, depthwise, squeeze_excite, project, stride, block.padding,
        training=training, residual=block.residual, sample_scale=scale,
    )  # fmt: skip
    if training:
        update(norms, statistics)
    return output


class MBConv(BlockModule):
    """The MBConv block of EfficientNet: a 1x1 convolution that expands, a depthwise k x k one,
    squeeze-and-excitation, a 1x1 projection, BN after each convolution, an activation after all but
    the last, and the input where the shapes allow it.

    The children are stock modules, so that parameters initialise, serialise and convert as
    everywhere else; they only hold the parameters and are not called, so hooks on them do not run.

    Args:
        in_channels: C.
        out_channels: K.
        expand_ratio: M = C * expand_ratio channels in between. With 1 there is no expansion.
        kernel_size: of the depthwise convolution: 3, 5 or 7.
        stride: 1 or 2.
        padding: as ``effnet_kernels.ops.depthwise_conv_bn_act`` takes it: an int, (height, width),
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
        ValueError: ``activation`` or ``gate`` is not known, or ``drop_path`` is no probability; the
            op checks the other settings when it runs.

    Source: "EfficientNet: Rethinking Model Scaling for CNNs" (arXiv:1905.11946), after
    "MobileNetV2" (arXiv:1801.04381) and "MnasNet" (arXiv:1807.11626).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: int = 6,
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

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps=eps, momentum=momentum)

        channels = in_channels * expand_ratio
        self.expand_conv = self.expand_bn = None
        if expand_ratio != 1:
            self.expand_conv = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.expand_bn = norm(channels)
        # The op pads; the module's own padding would not be read.
        self.depthwise_conv = nn.Conv2d(
            channels, channels, kernel_size, stride, groups=channels, bias=False
        )
        self.depthwise_bn = norm(channels)
        self.add_squeeze_excite(channels, squeezed)
        self.project_conv = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.project_bn = norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        expand = None
        if self.expand_conv is not None and self.expand_bn is not None:
            expand = Stage(self.expand_conv, self.expand_bn, self.activation)
        depthwise = Stage(self.depthwise_conv, self.depthwise_bn, self.activation)
        project = Stage(self.project_conv, self.project_bn, "identity")
        block = Block(
            expand, depthwise, self.squeeze_excite(), project, self.padding, self.residual
        )
        return run_mbconv(x, block, lambda: self.sample_scale(x))
