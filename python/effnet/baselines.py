"""Networks to scale beside EfficientNet-B0, as tables: MobileNetV1 (arXiv:1704.04861), MobileNetV2
(arXiv:1801.04381) and ResNet-50 (arXiv:1512.03385), the paper's table 3.

A baseline is a table of stages and what stands around them; ``scaling`` makes other tables of it,
and ``Baseline.build`` a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from effnet.efficientnet import EfficientNet
from effnet.variants import HEAD_CHANNELS, VARIANTS, Stage
from effnet_kernels.layers import DepthwiseConvBnAct, MBConv, PointwiseConvBnAct


class PlainStage(NamedTuple):
    """A run of blocks without settings of their own; the first one has the stride.

    Attributes:
        stride: of the first block.
        channels: output channels, before scaling.
        layers: blocks, before scaling.
        expand: expanded channels over input channels, where the block has such.
    """

    stride: int
    channels: int
    layers: int
    expand: int = 1


class SeparableConv(nn.Sequential):
    """MobileNetV1's block: depthwise 3x3 and 1x1 convolution, each with BN and ReLU.

    Shapes: (N, in_channels, H, W) to (N, out_channels, OH, OW).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            DepthwiseConvBnAct(in_channels, 3, stride, activation="relu"),
            PointwiseConvBnAct(in_channels, out_channels, activation="relu"),
        )


class Bottleneck(nn.Module):
    """ResNet's block: 1x1, 3x3 and 1x1 convolution with a quarter of the channels in between, and
    the input, through a 1x1 convolution where the shapes differ. Stock PyTorch.

    Shapes: (N, in_channels, H, W) to (N, out_channels, OH, OW).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        between = out_channels // 4

        def conv_bn(inputs: int, outputs: int, kernel_size: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
            return [conv, nn.BatchNorm2d(outputs)]

        self.body = nn.Sequential(
            *conv_bn(in_channels, between, 1, 1), nn.ReLU(inplace=True),
            *conv_bn(between, between, 3, stride), nn.ReLU(inplace=True),
            *conv_bn(between, out_channels, 1, 1),
        )  # fmt: skip
        same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity() if same else nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block of x."""
        return (self.body(x) + self.shortcut(x)).relu()  # type: ignore[no-any-return]


class PlainNet(nn.Module):
    """Stem, stages, head and classifier of a baseline that is no EfficientNet.

    Shapes: (N, 3, H, W) to (N, num_classes).
    """

    def __init__(self, baseline: Baseline, num_classes: int) -> None:
        super().__init__()
        channels = baseline.stem_channels
        kernel_size = 7 if baseline.pooled_stem else 3
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size, 2, kernel_size // 2, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        if baseline.pooled_stem:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        self.stages = nn.Sequential()
        for stage in baseline.stages:
            for layer in range(stage.layers):
                stride = stage.stride if layer == 0 else 1
                self.stages.append(_BLOCKS[baseline.kind](channels, stage, stride))
                channels = stage.channels
        self.head: nn.Module = nn.Identity()
        if baseline.head_channels:
            self.head = PointwiseConvBnAct(channels, baseline.head_channels, activation="relu6")
            channels = baseline.head_channels
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images x."""
        features = self.head(self.stages(self.stem(x)))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


_BLOCKS: dict[str, Callable[[int, Any, int], nn.Module]] = {
    "separable": lambda c, stage, stride: SeparableConv(c, stage.channels, stride),
    "inverted": lambda c, stage, stride: MBConv(
        c, stage.channels, stage.expand, 3, stride, activation="relu6"
    ),
    "bottleneck": lambda c, stage, stride: Bottleneck(c, stage.channels, stride),
}


class Baseline(NamedTuple):
    """A network's table and what stands around it.

    Attributes:
        kind: of its blocks: efficientnet, separable, inverted or bottleneck.
        stages: the table.
        resolution: side of its images, in pixels.
        stem_channels: of the stem.
        head_channels: of the head; 0 for none.
        pooled_stem: the stem is a 7x7 convolution and a pool.
    """

    kind: str
    stages: tuple[Any, ...]
    resolution: int = 224
    stem_channels: int = 32
    head_channels: int = 0
    pooled_stem: bool = False

    def build(self, num_classes: int = 1000) -> nn.Module:
        """The network, with fresh weights."""
        if self.kind == "efficientnet":
            return EfficientNet(
                self.stages, num_classes, stem_channels=self.stem_channels,
                head_channels=self.head_channels,
            )  # fmt: skip
        return PlainNet(self, num_classes)


def efficientnet(stages: tuple[Stage, ...], resolution: int = 224) -> Baseline:
    """A table of V1 or V2 as a baseline."""
    return Baseline("efficientnet", stages, resolution, head_channels=HEAD_CHANNELS)


BASELINES: dict[str, Baseline] = {
    "efficientnet_b0": efficientnet(VARIANTS["efficientnet_b0"].stages),
    # stride, channels, layers
    "mobilenet_v1": Baseline("separable", tuple(PlainStage(*s) for s in (
        (1, 64, 1), (2, 128, 2), (2, 256, 2), (2, 512, 6), (2, 1024, 2),
    ))),
    # stride, channels, layers, expand
    "mobilenet_v2": Baseline("inverted", tuple(PlainStage(*s) for s in (
        (1, 16, 1, 1), (2, 24, 2, 6), (2, 32, 3, 6), (2, 64, 4, 6), (1, 96, 3, 6), (2, 160, 3, 6),
        (1, 320, 1, 6),
    )), head_channels=1280),
    "resnet50": Baseline("bottleneck", tuple(PlainStage(*s) for s in (
        (1, 256, 3), (2, 512, 4), (2, 1024, 6), (2, 2048, 3),
    )), stem_channels=64, pooled_stem=True),
}  # fmt: skip
