"""Measures progressive learning beside training at one size, on scikit-learn's digits.

    python benchmarks/progressive.py     # writes results/<device>/training/progressive.json

Both train a small EfficientNet for the same number of epochs to the same resolution; progressive
learning begins with smaller images and weaker regularisation. They take turns, seed by seed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import effnet
import torch
from effnet.augment import Strength
from effnet.data import digits
from effnet.training import Phase, Recipe, Trainer, progressive
from family import progressive_table, save, speedup

from effnet_kernels.bench import environment


def train(phases: tuple[Phase, ...], epochs: int, seed: int, device: torch.device) -> list[float]:
    """(seconds, accuracy) of a run."""
    torch.manual_seed(seed)
    table = effnet.VARIANTS["efficientnet_b0"]._replace(
        width=0.25, depth=0.3, stem_stride=1, resolution=phases[-1].resolution
    )
    model = effnet.create_model(table, 10, 1, drop_path_rate=0.1).to(device)
    recipe = Recipe(phases, epochs=epochs, batch=64, lr=5e-3, ema=0.98, seed=seed)
    trainer = Trainer(model, digits(), recipe)
    began = time.perf_counter()
    trainer.fit()
    return [time.perf_counter() - began, trainer.evaluate()]


def main() -> int:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=48, help="at the end (default: 48)")
    parser.add_argument("--first", type=int, default=24, help="progressive's (default: 24)")
    parser.add_argument("--phases", type=int, default=4, help="default: 4")
    parser.add_argument("--hold", type=int, default=2,
                        help="how many of them are of the last size (default: 2)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=32, help="default: 32")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each (default: 5)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device = environment.default_device()
    last = Phase(arguments.resolution, 0.2, Strength(0.4))
    first = Phase(arguments.first, 0.1, Strength(0.1))
    ways = {
        "one size": (last,),
        "progressive": progressive(first, last, arguments.phases, hold=arguments.hold, multiple=4),
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in ways}
    for seed in range(arguments.seeds):
        for name in list(ways)[:: 1 if seed % 2 else -1]:
            runs[name].append(train(ways[name], arguments.epochs, seed, device))
            print(f"seed {seed} {name}: {runs[name][-1][0]:.1f} s, {runs[name][-1][1]:.2%}")
    found = {
        "epochs": arguments.epochs,
        "resolutions": {name: [phase.resolution for phase in way] for name, way in ways.items()},
        "runs": runs,
    }
    report, out = save(found, "training/progressive", arguments.out)
    print(progressive_table(report))
    print(f"progressive learning is {speedup(report):.2f}x as fast; wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
