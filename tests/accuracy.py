"""The error rule: at most a small multiple of eager PyTorch's own error from float64."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0


def relative_errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    """(largest error over the largest value, norm of the error over the norm)."""
    difference = result.detach().double().cpu() - exact.detach().double().cpu()
    exact = exact.detach().double().cpu()
    if exact.numel() == 0:
        return 0.0, 0.0
    largest = exact.abs().max().clamp_min(1e-30)
    norm = exact.norm().clamp_min(1e-30)
    return (difference.abs().max() / largest).item(), (difference.norm() / norm).item()


def assert_error_rule(
    name: str,
    result: Tensor,
    eager: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    factor: float,
    roundings: int | None = None,
) -> None:
    """``result`` is at most ``factor`` times as far from ``exact`` as ``eager`` is.

    One rounding to ``dtype``, or the four of a few float32 operations, are always allowed: on a
    handful of values eager is now and then exact. ``roundings`` allows more of them.
    """
    assert result.shape == exact.shape, f"{name}: shape {result.shape}, expected {exact.shape}"
    assert torch.isfinite(result).all() or not torch.isfinite(exact).all(), f"{name}: not finite"
    if roundings is None:
        roundings = 4 if dtype == torch.float32 else 1
    rounding = torch.finfo(dtype).eps * roundings
    for kind, ours, theirs in zip(
        ("largest", "norm"),
        relative_errors(result, exact),
        relative_errors(eager, exact),
        strict=True,
    ):
        allowed = max(factor * theirs, rounding)
        assert ours <= allowed, (
            f"{name}: {kind} error {ours:.3e}, eager's {theirs:.3e}, allowed {allowed:.3e}"
        )
