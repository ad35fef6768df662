"""Searches small stage tables on scikit-learn's digits, by evolution and without selection.

    python benchmarks/evolution.py   # writes results/<device>/search/evolution.json and .png

Both begin with a small EfficientNet-B0, train as many tables and are judged by the same reward,
accuracy * (multiply-adds / the first table's) ** -0.07. Without selection every table is a mutant
of the first one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import effnet
from effnet.augment import Strength
from effnet.data import digits
from effnet.description import Description
from effnet.evolution import Individual, Proxy, evolve
from effnet.plots import plot_evolution
from effnet.training import Phase, Recipe
from effnet.variants import Stage
from family import evolution_table, save

from effnet_kernels.bench import environment

TABLE = effnet.VARIANTS["efficientnet_b0"]._replace(
    width=0.25, depth=0.3, resolution=16, stem_stride=1
)


def described(stages: Sequence[Stage]) -> str:
    """A table as one line."""
    words = []
    for stage in stages:
        block = "fused" if stage.fused else "mbconv" if stage.squeeze else "mbconv without se"
        words.append(
            f"{stage.layers} x {block} {stage.channels} expand {stage.expand} kernel "
            f"{stage.kernel_size} stride {stage.stride}"
        )
    return "; ".join(words)


def main() -> int:
    """Searches, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="tables (default: 100)")
    parser.add_argument("--epochs", type=int, default=3, help="for each table (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = environment.default_device()
    recipe = Recipe(
        (Phase(TABLE.resolution, 0.1, Strength(0.3)),), epochs=arguments.epochs, lr=5e-3
    )
    data = digits()
    network = Description(TABLE, 10, 1, mean=data.mean, std=data.std)
    judge = Proxy(network, data, recipe, device)
    histories: dict[str, list[Individual]] = {}
    for name, population in (("evolution", 10), ("no selection", arguments.rounds)):

        def progress(found: Individual, name: str = name) -> None:
            print(f"{name}: {found.accuracy:.2%}, {found.cost / 1e6:.3g} M, {found.reward:.4f}")

        histories[name] = evolve(
            effnet.scaled(TABLE).stages, judge, rounds=arguments.rounds, population=population,
            seed=arguments.seed, progress=progress,
        )  # fmt: skip
    found = {
        "epochs": arguments.epochs,
        "histories": {
            name: [
                {**individual._asdict(), "stages": described(individual.stages)}
                for individual in history
            ]
            for name, history in histories.items()
        },
    }
    report, out = save(found, "search/evolution", arguments.out)
    plot_evolution(histories, out.with_suffix(".png"), "multiply-adds")
    print(evolution_table(report))
    print(f"wrote {out} and {out.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
