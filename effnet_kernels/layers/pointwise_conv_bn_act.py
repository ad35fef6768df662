"""Pointwise (1x1) conv + BN + activation as a module: the head of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effnet_kernels.activations import activation_code
from effnet_kernels.layers.batch_norm_act import run_batch_norm_act
from effnet_kernels.ops.checks import autocast_dtype
from effnet_kernels.ops.pointwise_conv_bn_act import pointwise_conv_bn_act


class PointwiseConvBnAct(nn.Module):
    """``activation(bn(conv(x)))`` with a 1x1 ``conv``: one op in inference; where gradients or the
    batch's statistics are wanted the product is PyTorch's, BN and activation are one op.

    ``conv`` and ``bn`` are stock modules that only hold the parameters, so hooks on ``bn`` do not
    run.

    Args:
        in_channels: C.
        out_channels: K.
        eps: BN's.
        momentum: BN's; None for a cumulative average.
        activation: an activation's name.

    Shapes:
        x: (N, C, H, W); output: (N, K, H, W), x's dtype.

    Raises:
        ValueError: ``activation`` is not known.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        activation_code("activation", activation)
        self.activation = activation
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """The activated features of x, (N, C, H, W)."""
        bn = self.bn
        # Under autocast the product's dtype is PyTorch's to choose.
        if (
            torch.is_grad_enabled()
            or bn.training
            or bn.running_mean is None
            or bn.running_var is None
            or autocast_dtype(x) is not None
        ):
            return run_batch_norm_act(self.conv(x), bn, self.activation)
        return pointwise_conv_bn_act(
            x, self.conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
            self.activation,
        ).output  # fmt: skip

    def extra_repr(self) -> str:
        """The settings that no child shows."""
        return f"activation={self.activation!r}"
