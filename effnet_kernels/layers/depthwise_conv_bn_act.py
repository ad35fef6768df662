"""Depthwise conv + BN + activation as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor, nn

from effnet_kernels.activations import activation_code
from effnet_kernels.layers.running_statistics import (
    Batch,
    normalises_by_batch,
    update_running_statistics,
)
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act


class DepthwiseConvBnAct(nn.Module):
    """``activation(bn(conv(x)))`` with a depthwise ``conv``, fused.

    ``conv`` and ``bn`` are stock modules, so that parameters initialise, serialise and convert as
    everywhere else; they only hold the parameters and are not called, so hooks on them do not run.

    Args:
        channels: C, of input and output.
        kernel_size: 3, 5 or 7.
        stride: 1 or 2.
        padding: as ``effnet_kernels.ops.depthwise_conv_bn_act`` takes it: an int,
            (height, width), (left, right, top, bottom) or "same"; None for ``kernel_size // 2``.
        eps: BN's.
        momentum: BN's; None for a cumulative average.
        activation: an activation's name.

    Shapes:
        x: (N, C, H, W); channels-last is taken as it is, other layouts are converted once.
        output: (N, C, OH, OW), channels-last, x's dtype.
        pooled: (N, C) float32, the output's sums over height and width.

    Raises:
        ValueError: ``activation`` is not known; the op checks the other settings when it runs.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | str | Sequence[int] | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        activation_code("activation", activation)
        self.padding = kernel_size // 2 if padding is None else padding
        self.activation = activation
        # The op pads; the module's own padding would not be read.
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=eps, momentum=momentum)

    @overload
    def forward(self, x: Tensor, pool: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, pool: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, pool: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The output; with ``pool`` the pair of it and its sums over height and width."""
        output, pooled = run_depthwise_conv_bn_act(
            x, self.conv, self.bn, self.activation, self.padding, pool=pool
        )
        return output if pooled is None else (output, pooled)

    def extra_repr(self) -> str:
        """The settings that no child shows."""
        return f"padding={self.padding!r}, activation={self.activation!r}"


def run_depthwise_conv_bn_act(
    input: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    activation: str,
    padding: int | str | Sequence[int],
    *,
    pool: bool = False,
    prologue: Prologue | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs ``activation(bn(conv(input)))`` on the op, with all that ``bn.forward`` does.

    The batch's statistics normalise where ``bn.training`` says so or there are no running ones; the
    running ones move as ``nn.BatchNorm2d`` moves them (unbiased variance, ``momentum`` None for a
    cumulative average, an empty batch leaves them alone, ``num_batches_tracked``).

    Args:
        input: (N, C, H, W).
        conv: a depthwise convolution without bias; its weight and stride are read.
        bn: its parameters, buffers, ``eps``, ``momentum`` and modes are read.
        activation: an activation's name.
        padding: as the op takes it.
        pool: also return the (N, C) sums over height and width.
        prologue: applied to ``input`` first.

    Returns:
        The output (N, C, OH, OW), and the sums or None.
    """
    training = normalises_by_batch(bn)
    output, pooled, batch_mean, batch_var = depthwise_conv_bn_act(
        input,
        conv.weight,
        None if training else bn.running_mean,
        None if training else bn.running_var,
        bn.weight,
        bn.bias,
        conv.stride,
        padding,
        conv.dilation,
        training,
        bn.eps,
        activation,
        pool=pool,
        prologue=prologue,
    )
    if batch_mean is not None and batch_var is not None:
        count = output.numel() // output.shape[1]
        update_running_statistics([Batch(bn, batch_mean, batch_var, count)])
    return output, pooled
