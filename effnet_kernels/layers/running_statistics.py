"""What ``nn.BatchNorm2d`` keeps of its batches, which the ops leave to their callers."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


def normalises_by_batch(bn: nn.BatchNorm2d) -> bool:
    """Whether ``bn`` uses the statistics of the batch: in training, or where it has no others."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


class Batch(NamedTuple):
    """The statistics of a batch, for the buffers of a BN.

    Attributes:
        bn: its buffers, ``momentum`` (None for a cumulative average) and modes are read.
        mean: (C,).
        var: (C,), biased; the running one is unbiased.
        elements: of a channel in the batch; an empty one leaves the averages alone.
    """

    bn: nn.BatchNorm2d
    mean: Tensor
    var: Tensor
    elements: int


class _Waiting(threading.local):
    """The batches that wait for the end of ``updates_together``, or None outside of it."""

    batches: list[Batch] | None = None


_waiting = _Waiting()


@contextlib.contextmanager
def updates_together() -> Iterator[None]:
    """Puts off what ``update_running_statistics`` is called for within until its end.

    The tensors are small: one at a time, their launches would be a third of a training step's.
    """
    if torch.compiler.is_compiling() or _waiting.batches is not None:
        yield
        return
    _waiting.batches = []
    try:
        yield
    finally:
        batches, _waiting.batches = _waiting.batches, None
        update_running_statistics(batches)


def update_running_statistics(batches: Sequence[Batch]) -> None:
    """Moves the buffers of each BN towards its batch as ``bn.forward`` does, if it does."""
    if not torch.compiler.is_compiling() and _waiting.batches is not None:
        _waiting.batches += batches
        return
    batches = [b for b in batches if b.bn.training and b.bn.track_running_stats]
    while batches:
        first: dict[nn.BatchNorm2d, Batch] = {}
        # A BN that several layers share has its batches in turn.
        later = [b for b in batches if first.setdefault(b.bn, b) is not b]
        _update(list(first.values()))
        batches = later


@torch.no_grad()
def _update(batches: Sequence[Batch]) -> None:
    """Moves the buffers of BNs that are there once each, all at once."""
    counters: list[Tensor] = []
    moving: list[tuple[Batch, Tensor, Tensor]] = []
    for batch in batches:
        buffers = batch.bn._buffers  # nn.Module.__getattr__ takes longer than all else here
        counter, running_mean, running_var = (
            buffers.get(name) for name in ("num_batches_tracked", "running_mean", "running_var")
        )
        if counter is not None:
            counters.append(counter)
        if running_mean is not None and running_var is not None and batch.elements > 0:
            moving.append((batch, running_mean, running_var))
    if counters:
        torch._foreach_add_(counters, 1)
    if not moving:
        return
    # One element has no unbiased variance; in training no op takes it.
    unbiased = torch._foreach_mul(
        [batch.var for batch, _, _ in moving],
        [batch.elements / (batch.elements - 1) for batch, _, _ in moving],
    )
    moves = [(batch.bn, running_mean, batch.mean) for batch, running_mean, _ in moving]
    moves += [
        (batch.bn, running_var, var)
        for (batch, _, running_var), var in zip(moving, unbiased, strict=True)
    ]
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for bn, running, value in moves:
        if bn.momentum is None or running.dtype != value.dtype:
            _move(running, value, _momentum(bn, value.dtype))
        else:
            averages, values = together.setdefault(bn.momentum, ([], []))
            averages.append(running)
            values.append(value)
    for momentum, (averages, values) in together.items():
        torch._foreach_lerp_(averages, values, momentum)


def _momentum(bn: nn.BatchNorm2d, dtype: torch.dtype) -> float | Tensor:
    """How far ``bn``, whose counter has counted this batch, moves its averages."""
    if bn.momentum is not None:
        return bn.momentum
    if bn.num_batches_tracked is None:
        return 0.0
    # Stays on the device: reading the count would make every step wait for it.
    return 1.0 / bn.num_batches_tracked.to(dtype)


def _move(running: Tensor, batch: Tensor, momentum: float | Tensor) -> None:
    if running.dtype == batch.dtype:
        running.lerp_(batch, momentum)
    else:  # 16-bit buffers: one rounding, after the sum
        running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))
