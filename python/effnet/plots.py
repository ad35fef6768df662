"""What the searches found, drawn with matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effnet.evolution import Individual
from effnet.search import StageCosts


def plot_stages(measured: Mapping[str, Sequence[StageCosts]], path: str | Path) -> None:
    """Bars of both kinds of block, a group a stage.

    Args:
        measured: the stages of each panel, by its title.
        path: of the picture.

    Raises:
        ValueError: the name says no kind of image, or its folder does not exist.
        ImportError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(measured), figsize=(7 * len(measured), 4), squeeze=False)
    for axes, (title, stages) in zip(panels[0], measured.items(), strict=True):
        for offset, label in ((-0.2, "mbconv"), (0.2, "fused")):
            times = [getattr(costs, label).seconds * 1e3 for costs in stages]
            axes.bar([i + offset for i in range(len(stages))], times, 0.4, label=label)
        labels = [f"{costs.stage.channels}\nat {costs.resolution}" for costs in stages]
        axes.set_xticks(range(len(stages)), labels)
        axes.set_xlabel("channels of the stage, side of its output")
        axes.set_ylabel("ms an image")
        axes.set_title(title)
        axes.legend()
    _save(figure, path)


def plot_evolution(
    histories: Mapping[str, Sequence[Individual]], path: str | Path, unit: str
) -> None:
    """On the left the best reward so far, on the right every table's accuracy by its cost.

    Args:
        histories: of searches from the same table, by their names.
        path: of the picture.
        unit: of the cost.

    Raises:
        ValueError: the name says no kind of image, or its folder does not exist.
        ImportError: matplotlib is not installed.
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for place, (name, history) in enumerate(histories.items()):
        colour = f"C{place}"
        rewards = [individual.reward for individual in history]
        left.plot(rewards, ".", color=colour, alpha=0.3)
        left.plot(list(itertools.accumulate(rewards, max)), color=colour, label=name)
        costs, accuracies = [i.cost for i in history], [i.accuracy for i in history]
        right.plot(costs, accuracies, ".", color=colour, alpha=0.4)
        best = max(history, key=lambda individual: individual.reward)
        right.plot(best.cost, best.accuracy, "o", color=colour, label=f"{name}'s best")
    first = next(iter(histories.values()))[0]
    right.plot(first.cost, first.accuracy, "kx", ms=9, label="the first")
    left.set_xlabel("tables trained")
    left.set_ylabel("reward, and the best so far")
    left.legend()
    right.set_xscale("log")
    right.set_xlabel(unit)
    right.set_ylabel("accuracy")
    right.legend()
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
