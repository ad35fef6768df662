"""A network and what its images are to look like, as a file: what training writes beside weights,
so that they can be used without knowing how they came about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effnet.efficientnet import EfficientNet, create_model
from effnet.files import replace
from effnet.images import MEAN, STD
from effnet.variants import Stage, Variant, variant


class Description(NamedTuple):
    """A network, but for its weights.

    Attributes:
        variant: the table, with its multipliers and its resolution.
        num_classes: outputs of the classifier.
        in_chans: channels of the images, 1 or 3.
        padding: of the convolutions, as ``EfficientNet`` has it.
        eps: BN's.
        mean: of each channel, of values in [0, 1]: images are less it, over ``std``.
        std: likewise.
        class_names: of the classes, in order, if they are known.
    """

    variant: Variant
    num_classes: int = 1000
    in_chans: int = 3
    padding: str | None = None
    eps: float = 1e-5
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    class_names: tuple[str, ...] | None = None

    def build(self, **rates: float) -> EfficientNet:
        """The network, with fresh weights.

        Args:
            rates: ``drop_rate`` and ``drop_path_rate``, where they are not the default ones.
        """
        settings: dict[str, Any] = {"padding": self.padding, "eps": self.eps, **rates}
        model: EfficientNet = create_model(
            self.variant, self.num_classes, self.in_chans, **settings
        )
        return model


def write_description(path: str | Path, description: Description) -> None:
    """Writes ``description`` as JSON.

    Raises:
        ValueError: its folder does not exist, or the like.
    """
    table = description.variant
    stages = [stage._asdict() for stage in table.stages]
    document = {**description._asdict(), "variant": {**table._asdict(), "stages": stages}}
    try:
        replace(Path(path), lambda file: file.write_text(json.dumps(document, indent=1) + "\n"))
    except OSError as error:
        raise ValueError(
            f"out: {str(path)!r} cannot be written; expected a file in a folder that exists"
        ) from error


def read_description(path: str | Path) -> Description:
    """What ``write_description`` wrote.

    Raises:
        ValueError: there is no such file, or it holds something else; the message is one line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"model: there is no file {str(path)!r}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        stages = tuple(Stage(**stage) for stage in document["variant"]["stages"])
        lists = ("mean", "std", "class_names")
        tuples = {name: document[name] and tuple(document[name]) for name in lists}
        table = Variant(**{**document["variant"], "stages": stages})
        description = Description(**{**document, **tuples, "variant": table})
        _check(description)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"model: {str(path)!r} describes no network; expected what effnet train, search or "
            "evolve wrote"
        ) from error
    return description


def _check(description: Description) -> None:
    """That the parts fit each other and a network can be built of them."""
    channels = description.in_chans
    sizes = (len(description.mean), len(description.std))
    if channels not in (1, 3) or sizes != (channels, channels) or not description.variant.stages:
        raise ValueError("channels, their statistics or stages")
    names = description.class_names
    if names is not None and len(names) != description.num_classes:
        raise ValueError("class names")
    if description.variant.resolution < 1:
        raise ValueError("resolution")
    with torch.device("meta"):
        description.build()


def describe(model: str) -> Description:
    """Of a name of the family, or of a file that ends in .json.

    Raises:
        ValueError: there is no such name or file.
    """
    return read_description(model) if model.endswith(".json") else Description(variant(model))
