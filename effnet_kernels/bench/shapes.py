"""The ops' shapes in EfficientNet, derived from the stage tables of the papers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar


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
# The paper has no table of M and L; its code does: google/automl, effnetv2_configs.py.
_V2_M = (
    Stage("fused", 3, 3, 1, 1, 24),
    Stage("fused", 5, 3, 2, 4, 48),
    Stage("fused", 5, 3, 2, 4, 80),
    Stage("mbconv", 7, 3, 2, 4, 160),
    Stage("mbconv", 14, 3, 1, 6, 176),
    Stage("mbconv", 18, 3, 2, 6, 304),
    Stage("mbconv", 5, 3, 1, 6, 512),
)
_V2_L = (
    Stage("fused", 4, 3, 1, 1, 32),
    Stage("fused", 7, 3, 2, 4, 64),
    Stage("fused", 7, 3, 2, 4, 96),
    Stage("mbconv", 10, 3, 2, 4, 192),
    Stage("mbconv", 19, 3, 1, 6, 224),
    Stage("mbconv", 25, 3, 2, 6, 384),
    Stage("mbconv", 7, 3, 1, 6, 640),
)


@dataclass(frozen=True)
class Model:
    """Stage table, compound scaling and training resolution of one variant."""

    stages: tuple[Stage, ...]
    resolution: int
    stem: int = 32
    head: int = 1280
    width: float = 1.0
    depth: float = 1.0


MODELS = {
    "efficientnet_b0": Model(_B0, 224),
    "efficientnet_b4": Model(_B0, 380, width=1.4, depth=1.8),
    "efficientnetv2_s": Model(_V2_S, 300, stem=24),
    "efficientnetv2_m": Model(_V2_M, 384, stem=24),
    "efficientnetv2_l": Model(_V2_L, 384, stem=32),
}
"""The variants whose shapes are measured, by timm's name. ``NAME@SIZE`` is one at another
resolution, wherever a model is asked for.
"""

_SQUEEZE = 4  # the input's channels over the squeezed ones


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution as a model calls it, with padding k // 2.

    Attributes:
        model: as it was asked for.
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


@dataclass(frozen=True)
class Mbconv:
    """A block with a depthwise convolution, whose padding is k // 2.

    Attributes:
        model: as it was asked for.
        in_channels: of the block's input.
        channels: of the depthwise convolution; the input's where nothing is expanded.
        out_channels: of the block's output.
        squeezed: hidden channels of squeeze-and-excitation.
        size: height and width of the input.
        residual: whether the input is added to the output.
        count: how many blocks of the model have this shape.
    """

    model: str
    in_channels: int
    channels: int
    out_channels: int
    squeezed: int
    size: int
    kernel: int
    stride: int
    residual: bool
    count: int = 1

    @property
    def output_size(self) -> int:
        """Height and width of the output."""
        return -(-self.size // self.stride)

    @property
    def expands(self) -> bool:
        """Whether there is an expansion."""
        return self.channels != self.in_channels

    def __str__(self) -> str:
        channels = f"{self.in_channels}-{self.channels}-{self.out_channels}"
        return f"{channels} {self.size}x{self.size} k{self.kernel}s{self.stride}"


@dataclass(frozen=True)
class FusedMbconv:
    """A Fused-MBConv block without squeeze-and-excitation, whose padding is k // 2.

    Attributes:
        model: as it was asked for.
        in_channels: of the block's input.
        channels: of the k x k convolution's output.
        out_channels: of the block's output; ``channels`` where nothing is expanded.
        size: height and width of the input.
        residual: whether the input is added to the output.
        count: how many blocks of the model have this shape.
    """

    model: str
    in_channels: int
    channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int
    residual: bool
    count: int = 1

    @property
    def output_size(self) -> int:
        """Height and width of the output."""
        return -(-self.size // self.stride)

    @property
    def expands(self) -> bool:
        """Whether a 1x1 convolution follows."""
        return self.channels != self.out_channels

    def __str__(self) -> str:
        channels = f"{self.in_channels}-{self.channels}"
        if self.expands:
            channels += f"-{self.out_channels}"
        return f"{channels} {self.size}x{self.size} k{self.kernel}s{self.stride}"


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution between the stem and the classifier; squeeze-and-excitation's are no such.

    Attributes:
        model: as it was asked for.
        role: ``expand``, ``project``, or ``head``, which is pooled.
        in_channels: of the input.
        out_channels: of the output.
        size: height and width of both.
        gate: whether squeeze-and-excitation multiplies the input.
        residual: whether the block's input is added.
        count: how many of the model have this shape.
    """

    model: str
    role: str
    in_channels: int
    out_channels: int
    size: int
    gate: bool = False
    residual: bool = False
    count: int = 1

    def __str__(self) -> str:
        channels = f"{self.in_channels}-{self.out_channels}"
        return f"{channels} {self.size}x{self.size}{' residual' * self.residual}"


@dataclass(frozen=True)
class SqueezeExcite:
    """Squeeze-and-excitation as a block calls it.

    Attributes:
        model: as it was asked for.
        channels: of the image that is scaled.
        squeezed: hidden channels.
        size: height and width of the image.
        count: how many blocks of the model have this shape.
    """

    model: str
    channels: int
    squeezed: int
    size: int
    count: int = 1

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} through {self.squeezed}"


@dataclass(frozen=True)
class Norm:
    """BN as a model calls it, with what comes after it.

    Attributes:
        model: as it was asked for.
        channels: of the image.
        size: its height and width.
        activation: ``silu`` or ``identity``.
        residual: whether the block's input is added.
        count: how many of the model have this shape.
    """

    model: str
    channels: int
    size: int
    activation: str
    residual: bool
    count: int = 1

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size} {self.activation}"


@dataclass(frozen=True)
class _Block:
    """A block of any kind."""

    kind: str
    kernel: int
    stride: int
    size: int
    in_channels: int
    channels: int
    out_channels: int

    @property
    def output_size(self) -> int:
        return -(-self.size // self.stride)

    @property
    def expands(self) -> bool:
        return self.channels != self.in_channels

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


def model_of(name: str) -> Model:
    """The variant that ``name`` asks for, at the resolution that it has after ``@``, if any.

    Raises:
        ValueError: there is no such model, or the size is no number of pixels.
    """
    known, at, size = name.partition("@")
    if known not in MODELS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(MODELS)}")
    if not at:
        return MODELS[known]
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"name: got size {size!r} of {known}, expected a number of pixels")
    return replace(MODELS[known], resolution=int(size))


def _round_channels(channels: float) -> int:
    """To the nearest multiple of 8, but never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _blocks(name: str) -> Iterator[_Block]:
    """The blocks of a model, in order."""
    model = model_of(name)
    size = -(-model.resolution // 2)  # after the stem
    channels = _round_channels(model.stem * model.width)
    for stage in model.stages:
        out_channels = _round_channels(stage.channels * model.width)
        for index in range(-int(-stage.repeats * model.depth // 1)):
            stride = stage.stride if index == 0 else 1
            block = _Block(
                stage.block, stage.kernel, stride, size, channels, channels * stage.expand,
                out_channels,
            )  # fmt: skip
            yield block
            size, channels = block.output_size, out_channels


_Shape = TypeVar("_Shape", Depthwise, FusedMbconv, Mbconv, Norm, Pointwise, SqueezeExcite)


def _distinct(found: Iterable[_Shape]) -> list[_Shape]:
    """The distinct ones, in order, each with its count."""
    return [replace(shape, count=count) for shape, count in Counter(found).items()]


def mbconv_shapes(name: str) -> list[Mbconv]:
    """The distinct blocks with a depthwise convolution, in order, each with its count.

    Args:
        name: a key of ``MODELS``, or with ``@SIZE`` after it.

    Raises:
        ValueError: there is no such model, or the size is no number of pixels.
    """
    return _distinct(
        Mbconv(
            name, b.in_channels, b.channels, b.out_channels, max(1, b.in_channels // _SQUEEZE),
            b.size, b.kernel, b.stride, b.residual,
        )
        for b in _blocks(name)
        if b.kind == "mbconv"
    )  # fmt: skip


def fused_mbconv_shapes(name: str) -> list[FusedMbconv]:
    """The distinct blocks without a depthwise convolution; arguments as of ``mbconv_shapes``."""
    return _distinct(
        FusedMbconv(
            name, b.in_channels, b.channels if b.expands else b.out_channels, b.out_channels,
            b.size, b.kernel, b.stride, b.residual,
        )
        for b in _blocks(name)
        if b.kind == "fused"
    )  # fmt: skip


def depthwise_shapes(name: str) -> list[Depthwise]:
    """The distinct depthwise convolutions of a model; arguments as of ``mbconv_shapes``."""
    return _distinct(
        Depthwise(name, b.channels, b.size, b.kernel, b.stride)
        for b in _blocks(name)
        if b.kind == "mbconv"
    )


def squeeze_excite_shapes(name: str) -> list[SqueezeExcite]:
    """The distinct squeeze-and-excitations of a model; arguments as of ``mbconv_shapes``."""
    return _distinct(
        SqueezeExcite(name, b.channels, max(1, b.in_channels // _SQUEEZE), b.output_size)
        for b in _blocks(name)
        if b.kind == "mbconv"
    )


def pointwise_shapes(name: str) -> list[Pointwise]:
    """The distinct 1x1 convolutions of a model; arguments as of ``mbconv_shapes``."""

    def all_of_them() -> Iterator[Pointwise]:
        model = model_of(name)
        for b in _blocks(name):
            expands, has_depthwise = b.expands, b.kind == "mbconv"
            if expands and has_depthwise:
                yield Pointwise(name, "expand", b.in_channels, b.channels, b.size)
            if expands or has_depthwise:
                yield Pointwise(
                    name, "project", b.channels, b.out_channels, b.output_size, has_depthwise,
                    b.residual,
                )  # fmt: skip
        head = _round_channels(model.head * model.width)
        yield Pointwise(name, "head", b.out_channels, head, b.output_size)

    return _distinct(all_of_them())


def norm_shapes(name: str) -> list[Norm]:
    """The distinct BNs of a model; arguments as of ``mbconv_shapes``."""

    def all_of_them() -> Iterator[Norm]:
        model = model_of(name)
        stem = _round_channels(model.stem * model.width)
        yield Norm(name, stem, -(-model.resolution // 2), "silu", False)
        for b in _blocks(name):
            if b.kind == "mbconv":
                if b.expands:
                    yield Norm(name, b.channels, b.size, "silu", False)
                yield Norm(name, b.channels, b.output_size, "silu", False)
            elif b.expands:
                yield Norm(name, b.channels, b.output_size, "silu", False)
            # A fused block that expands nothing is one convolution, with its activation.
            last = "identity" if b.kind == "mbconv" or b.expands else "silu"
            yield Norm(name, b.out_channels, b.output_size, last, b.residual)
        head = _round_channels(model.head * model.width)
        yield Norm(name, head, b.output_size, "silu", False)

    return _distinct(all_of_them())
