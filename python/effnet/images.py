"""Images from files and back: what the commands read and draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of values in [0, 1]."""
CROP = 0.875
"""How much of an image's shorter side the network sees."""

# From cold to hot, at equal steps; red, green and blue in [0, 1].
_COLOURS = ((0.0, 0.0, 0.5), (0.0, 0.5, 1.0), (0.5, 1.0, 0.5), (1.0, 0.5, 0.0), (0.6, 0.0, 0.0))


def read_image(path: str | Path, resolution: int) -> Tensor:
    """The centre of an image, as a network is evaluated on it.

    Args:
        path: of a file that Pillow knows: PNG, JPEG, WebP ...
        resolution: side of the result, in pixels.

    Returns:
        (3, resolution, resolution), float32 in [0, 1].

    Raises:
        ValueError: there is no such file, or it is no image; the message is one line.
        ImportError: Pillow is not installed.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except FileNotFoundError as error:
        raise ValueError(f"image: there is no file {str(path)!r}") from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(
            f"image: {str(path)!r} cannot be read as an image; expected a PNG, JPEG or the like"
        ) from error
    side = round(min(image.size) * CROP)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize(
        (resolution, resolution), Image.Resampling.BICUBIC, (left, top, left + side, top + side)
    )
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(resolution, resolution, 3).permute(2, 0, 1).float() / 255


def normalise(
    images: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> Tensor:
    """(..., C, H, W) in [0, 1] as networks take it: less ``mean``, over ``std``."""

    def channels(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, device=images.device).view(-1, 1, 1)

    return (images - channels(mean)) / channels(std)


def as_input(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """A colour image (3, H, W) in [0, 1] as a batch of one, (1, C, H, W), normalised.

    C is as many as there are means; one channel is the image's luminance (ITU-R 601).
    """
    if len(mean) == 1:
        image = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0, keepdim=True)
    return normalise(image, mean, std)[None]


def overlay(image: Tensor, heat: Tensor, strength: float = 0.5) -> Tensor:
    """An image with a map of heat over it.

    Args:
        image: (3, H, W) in [0, 1].
        heat: (H, W) in [0, 1].
        strength: of the colours, where the heat is 1.

    Returns:
        (3, H, W) in [0, 1].
    """
    colours = torch.tensor(_COLOURS)
    place = heat.clamp(0, 1) * (len(colours) - 1)
    below = place.floor().long().clamp(max=len(colours) - 2)
    part = (place - below)[..., None]
    coloured = (colours[below] * (1 - part) + colours[below + 1] * part).permute(2, 0, 1)
    weight = strength * heat.clamp(0, 1).sqrt()
    return image * (1 - weight) + coloured * weight


def write_image(path: str | Path, image: Tensor, captions: list[str] | None = None) -> None:
    """Writes (3, H, W) in [0, 1] to a file of the kind that its name says.

    Args:
        path: of the file.
        image: what to write.
        captions: one below each of as many parts of the width.

    Raises:
        ValueError: the name says no kind of image, or its folder does not exist.
    """
    from PIL import Image, ImageDraw

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    height, width, _ = pixels.shape
    picture: Any = Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
    if captions:
        line = 16
        framed = Image.new("RGB", (width, height + line), "white")
        framed.paste(picture)
        draw = ImageDraw.Draw(framed)
        for i, caption in enumerate(captions):
            draw.text((i * width // len(captions) + 4, height + 2), caption, fill="black")
        picture = framed
    try:
        picture.save(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"out: {str(path)!r} cannot be written; expected a name such as out.png in a folder "
            "that exists"
        ) from error
