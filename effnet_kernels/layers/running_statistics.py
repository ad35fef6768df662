"""What ``nn.BatchNorm2d`` keeps of its batches, which the ops leave to their callers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normalises_by_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether ``bn`` uses the statistics of the batch: in training, or where it has no others."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


@torch.no_grad()
def update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves ``bn``'s buffers towards a batch's as ``bn.forward`` does, if it does.

    Args:
        bn: its buffers, ``momentum`` (None for a cumulative average) and modes are read.
        mean: (C,) of the batch.
        var: (C,), biased; the running one is unbiased.
        count: elements of a channel in the batch; an empty one leaves the averages alone.
    """
    if not (bn.training and bn.track_running_stats):
        return
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    if bn.running_mean is None or bn.running_var is None or count == 0:
        return
    momentum: float | Tensor
    if bn.momentum is not None:
        momentum = bn.momentum
    elif bn.num_batches_tracked is not None:
        # Stays on the device: reading the count would make every step wait for it.
        momentum = 1.0 / bn.num_batches_tracked.to(mean.dtype)
    else:
        momentum = 0.0
    _lerp(bn.running_mean, mean, momentum)
    _lerp(bn.running_var, var * (count / (count - 1)), momentum)


def _lerp(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    if running.dtype == batch.dtype:
        running.lerp_(batch, momentum)
    else:  # 16-bit buffers: one rounding, after the sum
        running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))
