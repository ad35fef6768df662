"""What training does to images: to each where it is loaded (RandAugment), to a batch on the device
(the rest), and always from seeds of their own, so that the same step sees the same images.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset


class Strength(NamedTuple):
    """How much is done; V2's progressive learning lets it grow.

    Attributes:
        magnitude: of the random crops, turns and shears and of the changes of contrast and
            brightness, from 0 (none) to 1.
        mixup: of Beta(mixup, mixup), the shares of two images that are mixed (arXiv:1710.09412); 0
            for none.
        cutmix: of Beta(cutmix, cutmix), likewise of a rectangle that is replaced
            (arXiv:1905.04899); 0 for none.
        randaugment: magnitude of torchvision's RandAugment (arXiv:1909.13719), of which two ops
            change each image, to 30; 0 for none.
    """

    magnitude: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: float = 0.0


class RandAugmented(Dataset[tuple[Tensor, int]]):
    """Images that RandAugment has changed.

    A key says how: ``(index, magnitude, seed)``, so that processes that load images need to know
    nothing of the step that they are for.

    Args:
        source: of ((C, H, W) uint8, class).

    Raises:
        ImportError: torchvision is not installed.
    """

    def __init__(self, source: Dataset[tuple[Tensor, int]]) -> None:
        from torchvision.transforms import v2

        self._source, self._transform = source, v2.RandAugment

    def __getitem__(self, key: tuple[int, float, int]) -> tuple[Tensor, int]:
        index, magnitude, seed = key
        image, label = self._source[index]
        if round(magnitude) < 1:  # its ops without a magnitude would change the image still
            return image, label
        transform: Any = self._transform(2, round(magnitude), num_magnitude_bins=31)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return transform(image), label


def resize(images: Tensor, resolution: int) -> Tensor:
    """(N, C, H, W) uint8 as (N, C, resolution, resolution) float32 in [0, 1]."""
    images = images.float() / 255
    if images.shape[2:] != (resolution, resolution):
        images = F.interpolate(images, (resolution, resolution), mode="bilinear", antialias=True)
    return images


def distort(
    images: Tensor, resolution: int, magnitude: float, mirrors: bool, generator: torch.Generator
) -> Tensor:
    """Every image cropped, turned, sheared, mirrored and re-lit at random, at a new size.

    Args:
        images: (N, C, H, W) uint8.
        resolution: side of the result, in pixels.
        magnitude: 0 to 1.
        mirrors: half of them are mirrored.
        generator: of the CPU.

    Returns:
        (N, C, resolution, resolution) float32, about [0, 1].
    """
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator) * (high - low) + low

    x = resize(images, max(resolution, images.shape[2]))
    area = uniform(1 - 0.6 * magnitude, 1 + 0.8 * magnitude).sqrt()
    ratio = torch.exp(uniform(-0.3, 0.3) * magnitude)
    turn = uniform(-15, 15) * magnitude * (math.pi / 180)
    shear = uniform(-0.15, 0.15) * magnitude
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if mirrors else torch.ones(n)
    across, down = area * ratio, area / ratio
    cos, sin = turn.cos(), turn.sin()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * across * flip, (shear - sin) * down
    theta[:, 1, 0], theta[:, 1, 1] = sin * across * flip, cos * down
    theta[:, 0, 2] = uniform(-1, 1) * ((1 - across).clamp_min(0) + 0.1 * magnitude)
    theta[:, 1, 2] = uniform(-1, 1) * ((1 - down).clamp_min(0) + 0.1 * magnitude)
    grid = F.affine_grid(
        theta.to(x.device), [n, x.shape[1], resolution, resolution], align_corners=False
    )
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast = (1 + uniform(-0.4, 0.4) * magnitude).to(x.device)[:, None, None, None]
    brightness = (uniform(-0.1, 0.1) * magnitude).to(x.device)[:, None, None, None]
    return (x - 0.5) * contrast + (brightness + 0.5)


def mix(
    images: Tensor, targets: Tensor, strength: Strength, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix, one of them at random where both are wanted, with the batch's reverse.

    Args:
        images: (N, C, H, W).
        targets: (N, classes) the shares of each class.
        strength: says which, and how much.
        generator: of the CPU.

    Returns:
        Images and targets mixed in the same shares.
    """
    ways = [way for way in ("mixup", "cutmix") if getattr(strength, way) > 0]
    if not ways:
        return images, targets
    way = ways[int(torch.randint(len(ways), (), generator=generator))]
    share = _beta(getattr(strength, way), generator)
    if way == "mixup":
        images = images * share + images.flip(0) * (1 - share)
    else:
        height, width = images.shape[2:]
        side = math.sqrt(1 - share)
        rows, columns = round(height * side), round(width * side)
        top = int(torch.randint(height - rows + 1, (), generator=generator))
        left = int(torch.randint(width - columns + 1, (), generator=generator))
        box = (..., slice(top, top + rows), slice(left, left + columns))
        mixed = images.clone()
        mixed[box] = images.flip(0)[box]
        images, share = mixed, 1 - rows * columns / (height * width)
    return images, targets * share + targets.flip(0) * (1 - share)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """From Beta(alpha, alpha), by Johnk's method, which needs a generator's uniforms alone."""
    while True:
        a, b = (torch.rand(2, generator=generator, dtype=torch.float64) ** (1 / alpha)).tolist()
        if 0 < a + b <= 1:
            return float(a / (a + b))
