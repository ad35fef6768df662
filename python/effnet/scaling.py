"""Compound scaling (arXiv:1905.11946, section 3): depth, width and resolution grow together.

FLOPs are proportional to depth, to the square of width and to the square of resolution, so under

    depth = alpha ** phi,   width = beta ** phi,   resolution = gamma ** phi,
    alpha * beta ** 2 * gamma ** 2 = 2

they double with every step of phi. ``search_coefficients`` finds alpha, beta and gamma for a small
network; they then serve for every larger one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from effnet.baselines import Baseline
from effnet.efficientnet import scale_channels, scale_stages


class Scale(NamedTuple):
    """By how much a network's dimensions are multiplied."""

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0

    @property
    def flops(self) -> float:
        """By how much the FLOPs grow, but for what rounding does."""
        return self.depth * self.width**2 * self.resolution**2

    def apply(self, baseline: Baseline) -> Baseline:
        """The scaled baseline: channels to multiples of 8, layers up, resolution to the nearest."""
        return baseline._replace(
            stages=scale_stages(baseline.stages, self.width, self.depth),
            resolution=round(baseline.resolution * self.resolution),
            stem_channels=scale_channels(baseline.stem_channels, self.width),
            head_channels=baseline.head_channels
            and scale_channels(baseline.head_channels, self.width),
        )


class CompoundScaling(NamedTuple):
    """One step's coefficients.

    >>> CompoundScaling().at(1).apply(BASELINES["efficientnet_b0"]).build()

    Attributes:
        alpha: of depth.
        beta: of width.
        gamma: of resolution.
    """

    alpha: float = 1.2
    beta: float = 1.1
    gamma: float = 1.15

    def at(self, phi: float) -> Scale:
        """The scale of ``phi`` steps."""
        return Scale(self.alpha**phi, self.beta**phi, self.gamma**phi)


def single_axis(axis: str, flops: float) -> Scale:
    """The scale of one dimension alone that multiplies the FLOPs by ``flops``: what compound
    scaling is compared with.

    Args:
        axis: depth, width or resolution.
        flops: the factor.

    Raises:
        ValueError: there is no such axis.
    """
    factors = {"depth": flops, "width": math.sqrt(flops), "resolution": math.sqrt(flops)}
    if axis not in factors:
        raise ValueError(f"axis: got {axis!r}, expected one of {', '.join(factors)}")
    return Scale(**{axis: factors[axis]})


class Candidate(NamedTuple):
    """Coefficients that the search tried, and their score."""

    coefficients: CompoundScaling
    score: float


def search_coefficients(
    score: Callable[[Scale], float],
    *,
    flops: float = 2.0,
    step: float = 0.05,
    most: float = 1.5,
    tolerance: float = 0.1,
) -> list[Candidate]:
    """The paper's grid search at phi = 1.

    Args:
        score: of a small network scaled so: its accuracy, say; the larger the better.
        flops: what alpha * beta ** 2 * gamma ** 2 is to be near.
        step: of the grid, from 1 on.
        most: the largest coefficient.
        tolerance: how far from ``flops``, relatively, candidates may be.

    Returns:
        All candidates, the best first.

    Raises:
        ValueError: no point of the grid is near ``flops``.
    """
    axis = [1 + step * i for i in range(math.floor((most - 1) / step + 1e-9) + 1)]
    grid = (CompoundScaling(*point) for point in itertools.product(axis, repeat=3))
    near = [c for c in grid if abs(c.at(1).flops / flops - 1) <= tolerance]
    if not near:
        raise ValueError(
            f"flops: got {flops}, but no coefficients from 1 to {most} by {step} come within "
            f"{tolerance:.0%} of it"
        )
    candidates = [Candidate(c, score(c.at(1))) for c in near]
    return sorted(candidates, key=lambda candidate: candidate.score, reverse=True)
