"""The family as tables: a line a stage, a line a variant.

V1 (arXiv:1905.11946): B1 to B8 and L2 are B0's table under a width and a depth multiplier.
V2 (arXiv:2104.00298): B0 to B3 are a table of their own under B0's to B3's multipliers; S, M, L and
XL are a table each.
"""

from __future__ import annotations

from typing import NamedTuple

HEAD_CHANNELS = 1280
"""Of every published variant, before the width multiplier."""


class Stage(NamedTuple):
    """A run of blocks; the first one has the stride.

    Attributes:
        expand: expanded channels over input channels.
        kernel_size: of the depthwise convolution, or of the dense one.
        stride: of the first block.
        channels: output channels, before the width multiplier.
        layers: blocks, before the depth multiplier.
        squeeze: hidden channels of squeeze-and-excitation over the block's input channels; 0: none.
        fused: Fused-MBConv, with a dense convolution in place of expansion and depthwise one.
    """

    expand: int
    kernel_size: int
    stride: int
    channels: int
    layers: int
    squeeze: float = 0.25
    fused: bool = False


class Variant(NamedTuple):
    """A member of the family.

    Attributes:
        stages: its table.
        resolution: side of the square images that it is evaluated on, in pixels.
        width: multiplies channels, which are then rounded to a multiple of 8.
        depth: multiplies the blocks of a stage, rounded up.
        drop_rate: of dropout before the classifier.
        stem: channels of the stem, before the width multiplier.
        least: how much of the scaled channels rounding must leave.
        train_resolution: side of the images at the end of training, if it is another.
        stem_stride: 2; 1 suits small images.
        head: channels of the head, before the width multiplier.
    """

    stages: tuple[Stage, ...]
    resolution: int
    width: float = 1.0
    depth: float = 1.0
    drop_rate: float = 0.2
    stem: int = 32
    least: float = 0.9
    train_resolution: int | None = None
    stem_stride: int = 2
    head: int = HEAD_CHANNELS


def _fused(expand: int, stride: int, channels: int, layers: int) -> Stage:
    return Stage(expand, 3, stride, channels, layers, squeeze=0.0, fused=True)


# expand, kernel size, stride, channels, layers
_B0 = (
    Stage(1, 3, 1, 16, 1), Stage(6, 3, 2, 24, 2), Stage(6, 5, 2, 40, 2), Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3), Stage(6, 5, 2, 192, 4), Stage(6, 3, 1, 320, 1),
)  # fmt: skip
# Fused: expand, stride, channels, layers
_V2_B = (
    _fused(1, 1, 16, 1), _fused(4, 2, 32, 2), _fused(4, 2, 48, 2), Stage(4, 3, 2, 96, 3),
    Stage(6, 3, 1, 112, 5), Stage(6, 3, 2, 192, 8),
)  # fmt: skip
_V2_S = (
    _fused(1, 1, 24, 2), _fused(4, 2, 48, 4), _fused(4, 2, 64, 4), Stage(4, 3, 2, 128, 6),
    Stage(6, 3, 1, 160, 9), Stage(6, 3, 2, 256, 15),
)  # fmt: skip
_V2_M = (
    _fused(1, 1, 24, 3), _fused(4, 2, 48, 5), _fused(4, 2, 80, 5), Stage(4, 3, 2, 160, 7),
    Stage(6, 3, 1, 176, 14), Stage(6, 3, 2, 304, 18), Stage(6, 3, 1, 512, 5),
)  # fmt: skip
_V2_L = (
    _fused(1, 1, 32, 4), _fused(4, 2, 64, 7), _fused(4, 2, 96, 7), Stage(4, 3, 2, 192, 10),
    Stage(6, 3, 1, 224, 19), Stage(6, 3, 2, 384, 25), Stage(6, 3, 1, 640, 7),
)  # fmt: skip
_V2_XL = (
    _fused(1, 1, 32, 4), _fused(4, 2, 64, 8), _fused(4, 2, 96, 8), Stage(4, 3, 2, 192, 16),
    Stage(6, 3, 1, 256, 24), Stage(6, 3, 2, 512, 32), Stage(6, 3, 1, 640, 8),
)  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "efficientnet_b0": Variant(_B0, 224),
    "efficientnet_b1": Variant(_B0, 240, 1.0, 1.1),
    "efficientnet_b2": Variant(_B0, 260, 1.1, 1.2, 0.3),
    "efficientnet_b3": Variant(_B0, 300, 1.2, 1.4, 0.3),
    "efficientnet_b4": Variant(_B0, 380, 1.4, 1.8, 0.4),
    "efficientnet_b5": Variant(_B0, 456, 1.6, 2.2, 0.4),
    "efficientnet_b6": Variant(_B0, 528, 1.8, 2.6, 0.5),
    "efficientnet_b7": Variant(_B0, 600, 2.0, 3.1, 0.5),
    "efficientnet_b8": Variant(_B0, 672, 2.2, 3.6, 0.5),
    "efficientnet_l2": Variant(_B0, 800, 4.3, 5.3, 0.5),
    "efficientnetv2_b0": Variant(_V2_B, 224, least=0.0, train_resolution=192),
    "efficientnetv2_b1": Variant(_V2_B, 240, 1.0, 1.1, least=0.0, train_resolution=192),
    "efficientnetv2_b2": Variant(_V2_B, 260, 1.1, 1.2, 0.3, least=0.0, train_resolution=208),
    "efficientnetv2_b3": Variant(_V2_B, 300, 1.2, 1.4, 0.3, least=0.0, train_resolution=240),
    "efficientnetv2_s": Variant(_V2_S, 384, drop_rate=0.2, stem=24, train_resolution=300),
    "efficientnetv2_m": Variant(_V2_M, 480, drop_rate=0.3, stem=24, train_resolution=384),
    "efficientnetv2_l": Variant(_V2_L, 480, drop_rate=0.4, stem=32, train_resolution=384),
    "efficientnetv2_xl": Variant(_V2_XL, 512, drop_rate=0.4, stem=32, train_resolution=384),
}
"""By the names that timm has for them (V2-B0 to B3 there with ``tf_`` before)."""


def variant(name: str) -> Variant:
    """The variant called ``name``.

    Raises:
        ValueError: there is none; the message has the names most like it.
    """
    if name not in VARIANTS:
        import difflib

        near = difflib.get_close_matches(name, VARIANTS, n=3) or list(VARIANTS)[:3]
        raise ValueError(f"name: there is no model {name!r}; the nearest are {', '.join(near)}")
    return VARIANTS[name]
