"""EfficientNet (arXiv:1905.11946): the B0 network as a table, and its compound scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels.layers import DepthwiseConvBnAct


class Stage(NamedTuple):
    """A run of MBConv blocks; the first one has the stride.

    Attributes:
        expand: expanded channels over input channels.
        kernel_size: of the depthwise convolution.
        stride: of the first block.
        channels: output channels, before the width multiplier.
        layers: blocks, before the depth multiplier.
    """

    expand: int
    kernel_size: int
    stride: int
    channels: int
    layers: int


B0_STAGES = (
    Stage(expand=1, kernel_size=3, stride=1, channels=16, layers=1),
    Stage(expand=6, kernel_size=3, stride=2, channels=24, layers=2),
    Stage(expand=6, kernel_size=5, stride=2, channels=40, layers=2),
    Stage(expand=6, kernel_size=3, stride=2, channels=80, layers=3),
    Stage(expand=6, kernel_size=5, stride=1, channels=112, layers=3),
    Stage(expand=6, kernel_size=5, stride=2, channels=192, layers=4),
    Stage(expand=6, kernel_size=3, stride=1, channels=320, layers=1),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
SQUEEZE = 0.25  # squeezed channels over the block's input channels


class ConvBn(nn.Module):
    """A convolution without bias, BN, and SiLU if ``activate``.

    Shapes: (N, in_channels, H, W) to (N, out_channels, OH, OW).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        activate: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """The normalised convolution of x."""
        x = self.bn(self.conv(x))
        return F.silu(x, inplace=True) if self.activate else x


class SqueezeExcite(nn.Module):
    """The gate of squeeze-and-excitation (arXiv:1709.01507), from sums the depthwise op left."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        """x, (N, C, H, W), scaled by the gate of ``pooled``, its (N, C) sums over H and W."""
        mean = pooled[:, :, None, None] / (x.shape[2] * x.shape[3])
        gate = self.expand(F.silu(self.reduce(mean.to(x.dtype))))
        scaled: Tensor = x * gate.sigmoid()
        return scaled


class MBConv(nn.Module):
    """Expand, depthwise, squeeze-and-excite, project; plus the input where the shapes agree.

    Shapes: (N, in_channels, H, W) to (N, out_channels, OH, OW).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand: int,
        kernel_size: int,
        stride: int,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        channels = in_channels * expand
        self.residual = stride == 1 and in_channels == out_channels
        self.drop_path = drop_path
        self.expand = ConvBn(in_channels, channels) if expand > 1 else nn.Identity()
        self.depthwise = DepthwiseConvBnAct(channels, kernel_size, stride)
        self.squeeze_excite = SqueezeExcite(channels, max(1, int(in_channels * SQUEEZE)))
        self.project = ConvBn(channels, out_channels, activate=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block of x."""
        y, pooled = self.depthwise(self.expand(x), pool=True)
        y = self.project(self.squeeze_excite(y, pooled))
        if not self.residual:
            return y  # type: ignore[no-any-return]
        return x + drop_path(y, self.drop_path, self.training)


def drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): zeroes samples at ``rate``, scales up the others."""
    if not training or rate == 0:
        return x
    keep = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
    return x * keep.bernoulli_(1 - rate).div_(1 - rate)


def scale_channels(channels: int, width: float) -> int:
    """``channels * width`` to the nearest multiple of 8, at least 8 and at most 10 % below."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


class EfficientNet(nn.Module):
    """EfficientNet, B0 unless scaled.

    Args:
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        stages: the table of the blocks.
        width: multiplies channels (then rounded to a multiple of 8).
        depth: multiplies the blocks of a stage (then rounded up).
        dropout: rate before the classifier.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
        stem_stride: 2; 1 suits small images.

    Shapes:
        (N, in_channels, H, W) to (N, num_classes). Any H and W; channels-last is faster.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        stages: Sequence[Stage] = B0_STAGES,
        width: float = 1.0,
        depth: float = 1.0,
        dropout: float = 0.2,
        drop_path: float = 0.2,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        channels = scale_channels(STEM_CHANNELS, width)
        self.stem = ConvBn(in_channels, channels, 3, stem_stride)
        stages = [stage._replace(layers=math.ceil(stage.layers * depth)) for stage in stages]
        total = sum(stage.layers for stage in stages)
        blocks: list[MBConv] = []
        for stage in stages:
            out_channels = scale_channels(stage.channels, width)
            for layer in range(stage.layers):
                blocks.append(
                    MBConv(
                        channels,
                        out_channels,
                        stage.expand,
                        stage.kernel_size,
                        stage.stride if layer == 0 else 1,
                        drop_path * len(blocks) / total,
                    )
                )
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvBn(channels, scale_channels(HEAD_CHANNELS, width))
        self.dropout = dropout
        self.classifier = nn.Linear(self.head.conv.out_channels, num_classes)
        self.apply(_initialise)

    def features(self, x: Tensor) -> Tensor:
        """The last feature map, before pooling."""
        features: Tensor = self.head(self.blocks(self.stem(x)))
        return features

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images x."""
        pooled = self.features(x).mean((2, 3))
        logits: Tensor = self.classifier(F.dropout(pooled, self.dropout, self.training))
        return logits


def _initialise(module: nn.Module) -> None:
    """Weights as in the authors' code: normal by fan-out, the classifier uniform by its outputs."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def efficientnet_b0(num_classes: int = 1000, **settings: Any) -> EfficientNet:
    """EfficientNet-B0, 224 px, 5.3 M parameters; ``settings`` as ``EfficientNet`` takes them."""
    return EfficientNet(num_classes, **settings)
