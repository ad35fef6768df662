"""MBConv from the modules that hold its parameters: what the adapters of several libraries share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from effnet_kernels.ops import ConvBn, SqueezeExcite, mbconv


class Stage(NamedTuple):
    """A convolution without bias, the BN after it and the name of the activation after that."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: str

    def arguments(self) -> ConvBn:
        """The stage as the op takes it, normalised by running statistics."""
        norm = self.norm
        return ConvBn(
            self.conv.weight,
            norm.running_mean,  # type: ignore[arg-type]
            norm.running_var,  # type: ignore[arg-type]
            norm.weight,
            norm.bias,
            norm.eps,
            self.activation,
        )


class Excite(NamedTuple):
    """The two 1x1 convolutions of squeeze-and-excitation and the names of their activations."""

    reduce: nn.Conv2d
    expand: nn.Conv2d
    activation: str
    gate: str


def run_mbconv(
    input: Tensor,
    expand: Stage | None,
    depthwise: Stage,
    excite: Excite | None,
    project: Stage,
    padding: int | str | Sequence[int],
    *,
    residual: bool,
) -> Tensor:
    """The block in inference, on the op ``mbconv``.

    Args:
        input: (N, C, H, W).
        expand: the 1x1 expansion, or None.
        depthwise: the depthwise stage; its convolution's stride is read, its padding is not.
        excite: squeeze-and-excitation, or None.
        project: the 1x1 projection.
        padding: of the depthwise convolution, as the op takes it.
        residual: add the input.
    """
    return mbconv(
        input,
        None if expand is None else expand.arguments(),
        depthwise.arguments(),
        None
        if excite is None
        else SqueezeExcite(
            excite.reduce.weight,
            excite.reduce.bias,
            excite.expand.weight,
            excite.expand.bias,
            excite.activation,
            excite.gate,
        ),
        project.arguments(),
        depthwise.conv.stride[0],
        padding,
        residual=residual,
    )
