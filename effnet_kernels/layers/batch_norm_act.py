"""BN + activation on the op, from the module that holds the parameters."""

from __future__ import annotations

from torch import Tensor, nn

from effnet_kernels.layers.running_statistics import (
    Batch,
    normalises_by_batch,
    update_running_statistics,
)
from effnet_kernels.ops.batch_norm_act import batch_norm_act


def run_batch_norm_act(
    input: Tensor,
    bn: nn.BatchNorm2d,
    activation: str,
    *,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
) -> Tensor:
    """Runs ``activation(bn(input)) * sample_scale + residual``, with all that ``bn.forward`` does.

    Args:
        input: (N, C, H, W).
        bn: its parameters, buffers, ``eps``, ``momentum`` and modes are read.
        activation: an activation's name.
        residual: (N, C, H, W) or None.
        sample_scale: (N,) or None.
    """
    training = normalises_by_batch(bn)
    output, batch_mean, batch_var = batch_norm_act(
        input,
        None if training else bn.running_mean,
        None if training else bn.running_var,
        bn.weight,
        bn.bias,
        training,
        bn.eps,
        activation,
        residual=residual,
        sample_scale=sample_scale,
    )
    if batch_mean is not None and batch_var is not None:
        count = input.numel() // input.shape[1]
        update_running_statistics([Batch(bn, batch_mean, batch_var, count)])
    return output
