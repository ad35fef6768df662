"""Draws how multiply-adds grow under compound scaling, and along one axis, of several networks.

    python benchmarks/scaling.py     # writes benchmarks/figures/scaling.png

Nothing is measured: networks are built without memory and counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import effnet
import torch
from effnet.baselines import BASELINES
from effnet.scaling import CompoundScaling, Scale, single_axis

STEPS = (0, 1, 2, 3, 4, 5)
AXES = ("depth", "width", "resolution")


def multiply_adds(name: str, scale: Scale) -> int:
    """Of the scaled network, for one image at its scaled resolution."""
    baseline = scale.apply(BASELINES[name])
    with torch.device("meta"):
        model = baseline.build()
    return effnet.complexity(model, baseline.resolution).multiply_adds


def growth(name: str) -> dict[str, list[float]]:
    """The factors over the baseline at each step, by way of scaling."""
    base = multiply_adds(name, Scale())
    found = {"compound": [multiply_adds(name, CompoundScaling().at(phi)) / base for phi in STEPS]}
    for axis in AXES:
        found[axis] = [multiply_adds(name, single_axis(axis, 2.0**phi)) / base for phi in STEPS]
    return found


def main() -> int:
    """Writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures/scaling.png", metavar="FILE"
    )
    arguments = parser.parse_args()
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(9, 7), sharex=True, sharey=True)
    for name, axes in zip(BASELINES, grid.flat, strict=True):
        axes.plot(STEPS, [2.0**phi for phi in STEPS], color="0.7", lw=6, label="2^phi")
        for way, factors in growth(name).items():
            axes.plot(STEPS, factors, "o-", ms=4, label=way)
        axes.set_yscale("log", base=2)
        axes.set_title(name)
        axes.grid(alpha=0.3)
    grid[0, 0].legend()
    for axes in grid[:, 0]:
        axes.set_ylabel("multiply-adds, over the baseline's")
    for axes in grid[-1]:
        axes.set_xlabel("phi")
    figure.tight_layout()
    figure.savefig(arguments.out, dpi=100)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
