"""The depthwise convolutions of EfficientNet, derived from the stage tables of the papers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A row of the papers' table: ``repeats`` blocks, the first with ``stride``.

    Attributes:
        block: ``mbconv``, or ``fused`` for a block without a depthwise convolution.
        expand: the expanded channels over the input's; 1 is a depthwise-separable block.
    """

    block: str
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


# "EfficientNet: Rethinking Model Scaling for CNNs", table 1.
_B0 = (
    Stage("mbconv", 1, 3, 1, 1, 16),
    Stage("mbconv", 2, 3, 2, 6, 24),
    Stage("mbconv", 2, 5, 2, 6, 40),
    Stage("mbconv", 3, 3, 2, 6, 80),
    Stage("mbconv", 3, 5, 1, 6, 112),
    Stage("mbconv", 4, 5, 2, 6, 192),
    Stage("mbconv", 1, 3, 1, 6, 320),
)
# "EfficientNetV2: Smaller Models and Faster Training", table 4.
_V2_S = (
    Stage("fused", 2, 3, 1, 1, 24),
    Stage("fused", 4, 3, 2, 4, 48),
    Stage("fused", 4, 3, 2, 4, 64),
    Stage("mbconv", 6, 3, 2, 4, 128),
    Stage("mbconv", 9, 3, 1, 6, 160),
    Stage("mbconv", 15, 3, 2, 6, 256),
)


@dataclass(frozen=True)
class Model:
    """Stage table, compound scaling and training resolution of one variant."""

    stages: tuple[Stage, ...]
    resolution: int
    stem: int = 32
    width: float = 1.0
    depth: float = 1.0


MODELS = {
    "efficientnet_b0": Model(_B0, 224),
    "efficientnet_b4": Model(_B0, 380, width=1.4, depth=1.8),
    "efficientnetv2_s": Model(_V2_S, 300, stem=24),
}
"""The variants whose shapes are measured, by timm's name."""


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution as a model calls it, with padding k // 2.

    Attributes:
        model: a key of ``MODELS``.
        channels: of input and output.
        size: height and width of the input.
        count: how many blocks of the model have this shape.
    """

    model: str
    channels: int
    size: int
    kernel: int
    stride: int
    count: int = 1

    @property
    def output_size(self) -> int:
        """Height and width of the output."""
        return -(-self.size // self.stride)

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} k{self.kernel}s{self.stride}"


def _round_channels(channels: float) -> int:
    """To the nearest multiple of 8, but never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def depthwise_shapes(name: str, resolution: int | None = None) -> list[Depthwise]:
    """The distinct depthwise convolutions of a model, in order, each with its count.

    Args:
        name: a key of ``MODELS``.
        resolution: height and width of the image; the model's own unless given.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(MODELS)}")
    model = MODELS[name]
    size = -(-(resolution or model.resolution) // 2)  # after the stem
    channels = _round_channels(model.stem * model.width)
    counts: dict[tuple[int, int, int, int], int] = {}
    for stage in model.stages:
        repeats = -int(-stage.repeats * model.depth // 1)
        for block in range(repeats):
            stride = stage.stride if block == 0 else 1
            if stage.block == "mbconv":
                key = (channels * stage.expand, size, stage.kernel, stride)
                counts[key] = counts.get(key, 0) + 1
            size = -(-size // stride)
            channels = _round_channels(stage.channels * model.width)
    return [Depthwise(name, *key, count=count) for key, count in counts.items()]
