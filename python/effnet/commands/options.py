"""What several commands ask for, and how they get a model from it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effnet.checkpoints import channels_of, classes_of, load_weights, read_weights
from effnet.data import TORCHVISION, Data, load
from effnet.description import Description, describe
from effnet.efficientnet import EfficientNet
from effnet.variants import Variant

MODEL = "see effnet models; or the model.json of effnet train"
WEIGHTS = "a .safetensors file, or what torch.save wrote: of this package, timm or torchvision"


def add_command(
    commands: Any, name: str, summary: str, epilog: str, run: Callable[[argparse.Namespace], int]
) -> Any:
    """A command of its own, as an ``ArgumentParser``."""
    parser = commands.add_parser(
        name, help=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    """An integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected a positive number")
    return value


def add_data(parser: Any) -> None:
    """--data and what belongs to it."""
    option = parser.add_argument_group("data").add_argument
    option("--data", required=True, metavar="NAME",
           help=f"digits (offline), folder, {', '.join(TORCHVISION)}")  # fmt: skip
    option("--root", type=Path, default=Path("data"), metavar="FOLDER", help="default: data")
    option("--download", action="store_true", help="fetch torchvision's where it is not there")


def add_table(parser: Any) -> None:
    """--model and how it is varied, of a table that weights need not fit; of ``varied``."""
    option = parser.add_argument_group("model").add_argument
    option("--model", default="efficientnet_b0", metavar="NAME",
           help=f"{MODEL} (default: efficientnet_b0)")  # fmt: skip
    option(
        "--depth", type=positive_number, default=1.0, metavar="X", help="times its own (default: 1)"
    )
    option(
        "--width", type=positive_number, default=1.0, metavar="X", help="times its own (default: 1)"
    )
    option("--stem-stride", type=int, choices=(1, 2), help="1 suits small images (default: 2)")
    option("--resolution", type=positive, metavar="PIXELS", help="default: the model's own")


def varied(arguments: argparse.Namespace) -> Description:
    """The model that ``add_table``'s options make, at the resolution to train it on."""
    description = describe(arguments.model)
    table = description.variant
    table = table._replace(
        width=table.width * arguments.width,
        depth=table.depth * arguments.depth,
        stem_stride=arguments.stem_stride or table.stem_stride,
        resolution=arguments.resolution or table.train_resolution or table.resolution,
        train_resolution=None,
    )
    return description._replace(variant=table)


def of_data(description: Description, data: Data) -> Description:
    """The model for the classes and images of ``data``; normalised as before, where it can be."""
    if description.in_chans != data.in_chans:
        description = description._replace(mean=data.mean, std=data.std)
    return description._replace(
        num_classes=data.classes, in_chans=data.in_chans, class_names=data.class_names
    )


def load_data(table: Variant, arguments: argparse.Namespace) -> Data:
    """What ``add_data``'s options ask for, with pictures somewhat larger than the table's."""
    return load(
        arguments.data, arguments.root, size=round(table.resolution * 1.15),
        download=arguments.download,
    )  # fmt: skip


def add_model(parser: Any, *, several: bool = False) -> None:
    """--model and what belongs to it; of ``load_model``."""
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    option = parser.add_argument
    option("--model", required=True, metavar="NAME", help=MODEL, **many)
    option("--weights", required=True, metavar="FILE", help=WEIGHTS, **many)
    option("--resolution", type=positive, metavar="PIXELS", help="default: the model's own")
    add_origin(parser)


def add_origin(parser: Any) -> None:
    """Of ``with_origin``."""
    parser.add_argument(
        "--tensorflow", action="store_true", help="weights of TensorFlow: same padding, eps 1e-3"
    )
    parser.add_argument(
        "--half", action="store_true",
        help="weights for images in [-1, 1], as TensorFlow's of V2, instead of ones normalised by "
        "ImageNet's mean and deviation",
    )  # fmt: skip


def with_origin(description: Description, arguments: argparse.Namespace) -> Description:
    """As weights want it that come from somewhere else."""
    if arguments.tensorflow:
        description = description._replace(padding="same", eps=1e-3)
    if arguments.half:
        half = (0.5,) * description.in_chans
        description = description._replace(mean=half, std=half)
    return description


def load_model(
    name: str, path: str, arguments: argparse.Namespace
) -> tuple[EfficientNet, Description]:
    """The model in evaluation mode with its weights, and what it is, at the resolution asked for.

    Raises:
        ValueError: there is no such model or file, or the weights are of another model.
    """
    description = describe(name)
    weights = read_weights(path)
    if not name.endswith(".json"):
        in_chans = channels_of(weights)
        description = description._replace(num_classes=classes_of(weights), in_chans=in_chans)
        if in_chans == 1:  # ImageNet's are of colours
            description = description._replace(mean=(0.5,), std=(0.5,))
    description = with_origin(description, arguments)
    model = description.build()
    load_weights(model, weights)
    resolution = arguments.resolution or description.variant.resolution
    variant = description.variant._replace(resolution=resolution)
    return model.eval(), description._replace(variant=variant)
