"""``effnet cam``: where models look."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from effnet.cam import activation_map
from effnet.commands.options import add_command, add_model, load_model
from effnet.images import as_input, overlay, read_image, write_image


def add(commands: Any) -> None:
    """Its options."""
    parser = add_command(
        commands, "cam", "where models look: an image with a map of heat over it",
        "example, two models side by side:\n"
        "  effnet cam cat.jpg --model efficientnet_b0 efficientnet_b1 --weights b0.pt b1.pt "
        "--out cat.png",
        run,
    )  # fmt: skip
    parser.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or the like")
    add_model(parser, several=True)
    parser.add_argument("--class", dest="target", type=int, metavar="N",
                        help="default: the likeliest")  # fmt: skip
    parser.add_argument("--method", choices=("grad", "class"), default="grad", help="default: grad")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as cam.png")


def run(arguments: argparse.Namespace) -> int:
    """A picture a model, side by side, as large as the first."""
    if len(arguments.model) != len(arguments.weights):
        raise ValueError(
            f"weights: got {len(arguments.weights)} files for {len(arguments.model)} models, "
            "expected one for each"
        )
    panels: list[torch.Tensor] = []
    captions: list[str] = []
    for name, path in zip(arguments.model, arguments.weights, strict=True):
        model, description = load_model(name, path, arguments)
        classes = description.num_classes
        if arguments.target is not None and not 0 <= arguments.target < classes:
            raise ValueError(f"class: got {arguments.target}, expected 0 to {classes - 1}")
        image = read_image(arguments.image, description.variant.resolution)
        images = as_input(image, description.mean, description.std)
        with torch.no_grad():
            likeliest = int(model(images).argmax())
        target = likeliest if arguments.target is None else arguments.target
        heat = activation_map(model, images, torch.tensor([target]), method=arguments.method)[0]
        panel = overlay(image, heat)
        side = (panels[0] if panels else panel).shape[1]
        panel = torch.nn.functional.interpolate(panel[None], (side, side), mode="bilinear")[0]
        panels.append(panel)
        known = description.class_names
        captions.append(f"{name}, {known[target] if known else f'class {target}'}")
    write_image(arguments.out, torch.cat(panels, 2), captions)
    print(f"wrote {arguments.out}: {'; '.join(captions)}")
    return 0
