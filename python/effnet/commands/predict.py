"""``effnet predict``: the likeliest classes of an image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from effnet.commands.options import add_command, add_model, load_model, positive
from effnet.images import as_input, read_image


def add(commands: Any) -> None:
    """Its options."""
    parser = add_command(
        commands, "predict", "the likeliest classes of an image",
        "examples:\n"
        "  effnet predict cat.jpg --model efficientnet_b0 --weights b0.safetensors\n"
        "  effnet predict seven.png --model runs/digits/model.json "
        "--weights runs/digits/weights.pt\n",
        run,
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or the like")
    add_model(parser)
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="their names, a line each (default: those of a model.json)",
    )  # fmt: skip
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="default: 5")


def run(arguments: argparse.Namespace) -> int:
    """A line a class."""
    model, description = load_model(arguments.model, arguments.weights, arguments)
    names = description.class_names or [f"class {i}" for i in range(description.num_classes)]
    if arguments.classes is not None:
        names = _read_names(arguments.classes, description.num_classes)
    image = read_image(arguments.image, description.variant.resolution)
    with torch.no_grad():
        likely = model(as_input(image, description.mean, description.std)).softmax(1)[0]
    for share, index in zip(*likely.topk(min(arguments.top, len(likely))), strict=True):
        print(f"{share:7.2%}  {names[int(index)]}")
    return 0


def _read_names(path: Path, wanted: int) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"classes: {str(path)!r} cannot be read") from error
    if len(names) != wanted:
        raise ValueError(
            f"classes: got {len(names)} lines, expected one for each of the {wanted} classes"
        )
    return names
