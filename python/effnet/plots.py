"""What the searches found, drawn with matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnet.evolution import Individual
from effnet.search import StageCosts


def plot_stages(measured: Sequence[StageCosts], path: str | Path) -> None:
    """Bars of both kinds of block, a group a stage.

    Raises:
        ValueError: the name says no kind of image, or its folder does not exist.
        ImportError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for offset, label in ((-0.2, "mbconv"), (0.2, "fused")):
        times = [getattr(costs, label).seconds * 1e3 for costs in measured]
        axes.bar([i + offset for i in range(len(measured))], times, 0.4, label=label)
    labels = [f"{costs.stage.channels}\nat {costs.resolution}" for costs in measured]
    axes.set_xticks(range(len(measured)), labels)
    axes.set_xlabel("channels of the stage, side of its output")
    axes.set_ylabel("ms an image")
    axes.legend()
    _save(figure, path)


def plot_evolution(history: Sequence[Individual], path: str | Path, unit: str) -> None:
    """On the left the best reward so far, on the right every table's accuracy by its cost.

    Args:
        history: of the search.
        path: of the picture.
        unit: of the cost.

    Raises:
        ValueError: the name says no kind of image, or its folder does not exist.
        ImportError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    rewards = [individual.reward for individual in history]
    left.plot(rewards, ".", color="0.6", label="a table")
    left.plot(list(itertools.accumulate(rewards, max)), label="the best so far")
    left.set_xlabel("tables trained")
    left.set_ylabel("reward")
    left.legend()
    drawn = right.scatter(
        [individual.cost for individual in history],
        [individual.accuracy for individual in history],
        c=range(len(history)), s=14,
    )  # fmt: skip
    right.plot(history[0].cost, history[0].accuracy, "rx", label="the first")
    best = max(history, key=lambda individual: individual.reward)
    right.plot(best.cost, best.accuracy, "ro", mfc="none", ms=10, label="the best")
    right.set_xscale("log")
    right.set_xlabel(unit)
    right.set_ylabel("accuracy")
    right.legend()
    figure.colorbar(drawn, ax=right, label="tables trained before")
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=100)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"plot: {str(path)!r} cannot be written; expected a name such as plot.png in a folder "
            "that exists"
        ) from error
