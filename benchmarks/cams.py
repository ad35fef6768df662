"""Draws where small networks look that are scaled in different ways, as the compound scaling
paper's figure 7 does: trained here, on scikit-learn's digits somewhere in a picture of clutter.

    python benchmarks/cams.py     # writes benchmarks/figures/cams.png, in some minutes
"""

from __future__ import annotations

import argparse
from pathlib import Path

import effnet
import torch
from effnet.augment import Strength, resize
from effnet.baselines import Baseline, efficientnet
from effnet.cam import activation_map
from effnet.data import Data, InMemory, digits
from effnet.images import normalise, overlay, write_image
from effnet.scaling import CompoundScaling, Scale, single_axis
from effnet.training import Phase, Recipe, Trainer
from torch import Tensor

from effnet_kernels.bench.environment import default_device

SIDE = 32  # of a picture, in which a digit has 12 pixels
FLOPS = 4.0
"""How much larger the scaled networks are."""


def multiply_adds(baseline: Baseline) -> int:
    """Of a network with ten classes, for an image."""
    with torch.device("meta"):
        model = baseline.build(10)
    return effnet.complexity(model, baseline.resolution).multiply_adds


def ways() -> dict[str, Baseline]:
    """A small network, and four with ``FLOPS`` times its multiply-adds, as near as rounding lets
    them: the first four stages of a narrow B0, the last without a stride, so that maps are 1/8.
    """
    stages = effnet.VARIANTS["efficientnet_b0"].stages[:4]
    stages = (*stages[:3], stages[3]._replace(stride=1))
    small = Scale(depth=0.5, width=0.5).apply(efficientnet(stages, 64))
    least = multiply_adds(small)
    compound = min(
        (CompoundScaling().at(quarters / 4).apply(small) for quarters in range(1, 9)),
        key=lambda baseline: abs(multiply_adds(baseline) / least - FLOPS),
    )
    axes = ("depth", "width", "resolution")
    return {
        "the small one": small,
        **{f"{axis} only": single_axis(axis, FLOPS).apply(small) for axis in axes},
        "compound": compound,
    }


def cluttered(images: Tensor, seed: int) -> Tensor:
    """Each digit, enlarged, at a random place among pieces of others.

    Args:
        images: (N, 1, 8, 8) uint8.
        seed: of the places.

    Returns:
        (N, 3, SIDE, SIDE) uint8.
    """
    generator = torch.Generator().manual_seed(seed)

    def below(number: int) -> int:
        return int(torch.randint(number, (), generator=generator))

    pictures = torch.zeros(len(images), 1, SIDE, SIDE)
    for picture in pictures:
        for _ in range(14):
            piece = images[below(len(images)), 0].float()
            top, left = below(5), below(5)
            y, x = below(SIDE - 3), below(SIDE - 3)
            picture[0, y : y + 4, x : x + 4] = piece[top : top + 4, left : left + 4] * 0.6
    large = resize(images, 12) * 255
    for picture, digit in zip(pictures, large, strict=True):
        y, x = below(SIDE - 11), below(SIDE - 11)
        picture[:, y : y + 12, x : x + 12] = digit
    return pictures.expand(-1, 3, -1, -1).round().clamp(0, 255).to(torch.uint8).contiguous()


def data() -> Data:
    """The digits, cluttered; every training image at four places."""
    plain = digits()
    parts = []
    for seed, part in enumerate((plain.train, plain.test)):
        assert isinstance(part, InMemory)
        times = 4 if part is plain.train else 1
        images = torch.cat([cluttered(part.images, 10 * seed + i) for i in range(times)])
        parts.append(InMemory(images, part.classes.repeat(times)))
    return Data(parts[0], parts[1], plain.class_names, 3, mirrors=False)


def main() -> int:
    """Trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6, help="default: 6")
    parser.add_argument("--pictures", type=int, default=4, help="rows (default: 4)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures/cams.png", metavar="FILE"
    )
    arguments = parser.parse_args()
    device, pictures = default_device(), data()
    test = pictures.test
    assert isinstance(test, InMemory)
    shown = test.images[: arguments.pictures]
    side = 160
    columns, captions = [resize(shown, side)], ["picture"]
    for name, baseline in ways().items():
        torch.manual_seed(0)
        model = baseline.build(pictures.classes)
        assert isinstance(model, effnet.EfficientNet)
        phase = Phase(baseline.resolution, 0.1, Strength(0.3))
        recipe = Recipe((phase,), epochs=arguments.epochs, lr=5e-3)
        trainer = Trainer(model.to(device), pictures, recipe)
        trainer.fit()
        accuracy = trainer.evaluate()
        cost = multiply_adds(baseline) / 1e6
        print(f"{name}: {cost:.1f} M multiply-adds, {accuracy:.2%}", flush=True)
        images = normalise(resize(shown, baseline.resolution)).to(device)
        heat = activation_map(model.eval(), images, test.classes[: len(shown)].to(device)).cpu()
        heat = torch.nn.functional.interpolate(heat[:, None], (side, side), mode="bilinear")[:, 0]
        columns.append(torch.stack([overlay(i, h) for i, h in zip(columns[0], heat, strict=True)]))
        captions.append(name)
    rows = torch.cat(columns, 3)  # each is a picture and the maps of it
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_image(arguments.out, torch.cat(list(rows), 1), captions)
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
