"""The error rule: at most a small multiple of eager PyTorch's own error from float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD = 2.0
"""How many times eager's error a result may have."""
GRADIENT = 3.0
"""The same for a gradient: a tensor whose name starts with ``grad``."""


@dataclass(frozen=True)
class Errors:
    """Distance of a tensor from its float64 value.

    Attributes:
        largest: the largest absolute error over the largest absolute value; NaN for non-finite
            results.
        norm: the norm of the error over the norm of the value.
    """

    largest: float
    norm: float


def errors(result: Tensor, exact: Tensor) -> Errors:
    """The errors of ``result``, any dtype, from ``exact``, float64."""
    exact = exact.detach().double()
    difference = result.detach().double() - exact.to(result.device)
    exact = exact.to(result.device)
    largest = exact.abs().max().clamp_min(1e-30)
    norm = exact.norm().clamp_min(1e-30)
    return Errors((difference.abs().max() / largest).item(), (difference.norm() / norm).item())


def excess(
    measured: Mapping[str, Errors], eager: Mapping[str, Errors], dtype: torch.dtype
) -> float:
    """How far the rule is used up by the worst tensor: 1 is the limit, above it the row is wrong.

    One rounding to ``dtype`` is always allowed: on a handful of values eager is now and then exact.
    A tensor that is missing, or not finite, is infinitely wrong.
    """
    rounding = torch.finfo(dtype).eps
    worst = 0.0
    for name, theirs in eager.items():
        if name not in measured:
            return float("inf")
        ours = measured[name]
        factor = GRADIENT if name.startswith("grad") else FORWARD
        for error, limit in ((ours.largest, theirs.largest), (ours.norm, theirs.norm)):
            share = error / max(factor * limit, rounding)
            # A comparison with NaN is false, so the test is the other way round.
            worst = worst if share <= worst else share
            if not worst < float("inf"):
                return float("inf")
    return worst
