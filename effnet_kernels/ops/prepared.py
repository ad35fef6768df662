"""Networks whose weights were packed beforehand: BN folded, in the CPU kernels' own layout.

An op packs its weights at each call, since it knows nothing of the calls before. Where the weights
stay, they are packed once, a stage each, and images then go through all stages in one call. Each
thread takes an image through them in its own caches: no tensor lies between two stages.

| B0 at 224, one image, float32 | as ops | prepared |
|---|---|---|
| weights read (written again as packed) | 21 MB (21 MB) | 21 MB |
| tensors between stages, written and read (counted) | 8.4 MB | in cache |
| calls from Python | 20 | 1 |

A prepared stage is of one dtype and one instruction set. It is for inference on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.activations import activation_code
from effnet_kernels.ops import checks
from effnet_kernels.ops.block import (
    ConvBn,
    SqueezeExcite,
    check_conv_bn,
    check_pointwise,
    flat_conv_bn,
    kernel_stages,
)
from effnet_kernels.ops.depthwise_conv_bn_act import check_padding
from effnet_kernels.ops.fused_mbconv import check_block as check_fused_mbconv
from effnet_kernels.ops.mbconv import check_block as check_mbconv
from effnet_kernels.ops.mbconv import kernel_block as kernel_mbconv

_KEPT_SIZES = 64


class PreparedStage(NamedTuple):
    """One op with its weights packed.

    Attributes:
        packed: bytes, for the kernels alone to read.
        dtype: of the images.
        in_channels: of the images that it takes.
        kernel: extent of its window, 1 where there is none.
        stride: of its window.
        padding: of its window, as ``depthwise_conv_bn_act`` takes it.
        pools: an image becomes the mean of its pixels.
    """

    packed: Tensor
    dtype: torch.dtype
    in_channels: int
    kernel: int = 1
    stride: int = 1
    padding: int | str | Sequence[int] = 0
    pools: bool = False


def prepare_mbconv(
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int = 1,
    padding: int | str | Sequence[int] = 0,
    *,
    residual: bool = False,
) -> PreparedStage:
    """``mbconv`` with these weights, which are on the CPU, for images of the weights' dtype.

    Raises:
        TypeError, ValueError: as ``mbconv``.
        RuntimeError: there are no CPU kernels.
    """
    check_conv_bn("depthwise", depthwise)
    checks.check_image("depthwise.weight", depthwise.weight)
    channels, _, kernel, _ = depthwise.weight.shape
    if expand is not None:
        check_conv_bn("expand", expand)
        channels = _in_channels("expand.weight", expand.weight)
    like = _example(depthwise.weight, channels, kernel)
    checked = check_mbconv(
        like, expand, depthwise, squeeze_excite, project, stride, padding, residual
    )
    arguments = kernel_mbconv(like, expand, depthwise, squeeze_excite, project, checked)
    packed = torch.ops.effnet_kernels_cpp.mbconv_prepare(like, *arguments, residual, False)
    return PreparedStage(packed, like.dtype, channels, kernel, checked.stride, padding)


def prepare_fused_mbconv(
    expand: ConvBn,
    project: ConvBn | None,
    stride: int = 1,
    padding: int | str | Sequence[int] = 0,
    *,
    residual: bool = False,
) -> PreparedStage:
    """``fused_mbconv`` with these weights, which are on the CPU, for images of the weights' dtype.

    Raises:
        TypeError, ValueError: as ``fused_mbconv``.
        RuntimeError: there are no CPU kernels.
    """
    check_conv_bn("expand", expand)
    checks.check_image("expand.weight", expand.weight)
    _, channels, kernel, _ = expand.weight.shape
    like = _example(expand.weight, channels, kernel)
    checked = check_fused_mbconv(like, expand, None, project, stride, padding, residual)
    expand, project = kernel_stages((expand, project), like)
    packed = torch.ops.effnet_kernels_cpp.fused_mbconv_prepare(
        like, *flat_conv_bn(expand), checked.stride, checked.pads, *flat_conv_bn(project), residual
    )
    return PreparedStage(packed, like.dtype, channels, kernel, checked.stride, padding)


def prepare_pointwise_conv_bn_act(conv: ConvBn) -> PreparedStage:
    """``pointwise_conv_bn_act`` with these weights, on the CPU, for images of the weights' dtype.

    Raises:
        TypeError, ValueError: as ``pointwise_conv_bn_act``.
        RuntimeError: there are no CPU kernels.
    """
    check_conv_bn("conv", conv)
    channels = _in_channels("conv.weight", conv.weight)
    like = _example(conv.weight, channels, 1)
    check_pointwise("conv", conv, like, channels, True, False)
    (conv,) = kernel_stages((conv,), like)
    packed = torch.ops.effnet_kernels_cpp.pointwise_conv_bn_act_prepare(like, *flat_conv_bn(conv))
    return PreparedStage(packed, like.dtype, channels)


def prepare_linear(
    weight: Tensor, bias: Tensor | None, activation: str = "identity"
) -> PreparedStage:
    """``activation(linear(x))`` for vectors, or for the pixels of an image.

    Args:
        weight: (K, C) or (K, C, 1, 1), on the CPU.
        bias: (K,) or None.
        activation: an activation's name.

    Raises:
        TypeError, ValueError: an argument is wrong.
        RuntimeError: there are no CPU kernels.
    """
    activation_code("activation", activation)
    _in_channels("weight", weight)
    mean, var = (weight.new_full((weight.shape[0],), value) for value in (0, 1))
    return prepare_pointwise_conv_bn_act(ConvBn(weight, mean, var, None, bias, 0.0, activation))


def prepare_average_pool(channels: int, dtype: torch.dtype) -> PreparedStage:
    """The mean of an image's pixels: stages after it take vectors of ``channels`` values.

    Raises:
        RuntimeError: there are no CPU kernels.
    """
    like = _example(torch.empty(0, dtype=dtype), channels, 1)
    packed = torch.ops.effnet_kernels_cpp.average_pool_prepare(like)
    return PreparedStage(packed, dtype, channels, pools=True)


class PreparedNetwork:
    """Stages one after the other, in one call.

    Args:
        stages: of one dtype, each taking the channels that the one before it gives, at most one
            of them a pool.

    Raises:
        ValueError: there is no stage.
    """

    def __init__(self, stages: Sequence[PreparedStage]) -> None:
        if not stages:
            raise ValueError("stages: got none, expected one or more")
        self.stages = tuple(stages)
        self._packed = [stage.packed for stage in stages]
        self._padding: dict[tuple[int, int], list[int]] = {}
        self._features: PreparedNetwork | None = None

    @property
    def pools(self) -> bool:
        """Whether the result is vectors."""
        return any(stage.pools for stage in self.stages)

    @property
    def features(self) -> PreparedNetwork:
        """The stages before the pool; all where that is the first."""
        if self._features is None:
            pool = [i for i, stage in enumerate(self.stages) if stage.pools]
            self._features = PreparedNetwork(self.stages[: pool[0]]) if any(pool) else self
        return self._features

    def takes(self, input: Tensor) -> bool:
        """Whether ``__call__`` is for ``input``, and nothing but a call of the CPU kernels."""
        first = self.stages[0]
        return (
            backends.takes_as_given(input)
            and input.dtype == first.dtype
            and input.dim() == 4
            and input.shape[1] == first.in_channels
        )

    def __call__(self, input: Tensor) -> Tensor:
        """The network of ``input``.

        Args:
            input: (N, C, H, W) on the CPU, of the stages' dtype; channels-last is taken as it is,
                other layouts are converted once.

        Returns:
            (N, K, OH, OW), channels-last; with a pool among the stages (N, K).

        Raises:
            TypeError: ``input`` is no tensor or of another dtype.
            ValueError: its rank, channels or extent is not what the stages take.
            RuntimeError: a gradient is asked for, or the kernels in use are not those that the
                stages were prepared for.
        """
        checks.check_image("input", input)
        first = self.stages[0]
        if input.dtype != first.dtype:
            raise TypeError(f"input: got {input.dtype}, expected {first.dtype}")
        if input.device.type != "cpu":
            raise ValueError(f"input: got a tensor on {input.device}, expected one on the CPU")
        if input.shape[1] != first.in_channels:
            raise ValueError(f"input: got {input.shape[1]} channels, expected {first.in_channels}")
        size = (input.shape[2], input.shape[3])
        padding = self._padding.get(size)
        if padding is None:
            padding = self._paddings(*size)
            if len(self._padding) >= _KEPT_SIZES:
                self._padding.clear()
            self._padding[size] = padding
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError("a prepared network has no derivative: it is for inference")
        result = torch.ops.effnet_kernels_cpp.prepared_network(input, self._packed, padding)
        return result  # type: ignore[no-any-return]

    def _paddings(self, height: int, width: int) -> list[int]:
        """(top, left, bottom, right) of each stage for images of this extent."""
        paddings: list[int] = []
        for stage in self.stages:
            image = torch.empty((1, 1, height, width), device="meta")
            top, left, bottom, right = check_padding(
                stage.padding, image, stage.kernel, stage.stride
            )
            paddings += (top, left, bottom, right)
            height = (height + top + bottom - stage.kernel) // stage.stride + 1
            width = (width + left + right - stage.kernel) // stage.stride + 1
            if stage.pools:
                height = width = 1
        return paddings


def _in_channels(argument: str, weight: Tensor) -> int:
    """C of a (K, C) or (K, C, 1, 1) weight."""
    if weight.ndim not in (2, 4):
        raise ValueError(
            f"{argument}: got shape {tuple(weight.shape)}, expected (K, C) or (K, C, 1, 1)"
        )
    return weight.shape[1]


def _example(weight: Tensor, channels: int, kernel: int) -> Tensor:
    """An image such as a stage with this weight takes."""
    if backends.CPU.missing is not None:
        raise RuntimeError(f"there are no CPU kernels: {backends.CPU.missing}")
    checks.check_same_device("weight", weight, torch.device("cpu"))
    shape: Any = (1, channels, kernel, kernel)
    return weight.detach().new_zeros(shape).contiguous(memory_format=torch.channels_last)
