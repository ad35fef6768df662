"""Weights in files: of this package, timm or torchvision, as safetensors or PyTorch's own."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from effnet.efficientnet import EfficientNet
from effnet.weights import from_any


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name; no code in it is run.

    Raises:
        ValueError: there is no such file, or it holds no weights; the message is one line.
        ImportError: it is a safetensors file, and that package is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights: there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"weights: {str(path)!r} is no safetensors file") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen kinds for what is no checkpoint
        raise ValueError(
            f"weights: {str(path)!r} cannot be read; expected a .safetensors file or what "
            "torch.save wrote of a state_dict"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"weights: {str(path)!r} holds no state_dict of tensors")
    return found


def classes_of(weights: dict[str, Tensor]) -> int:
    """How many classes the classifier of ``weights`` has, whosever names they have.

    Raises:
        ValueError: there is no classifier among them.
    """
    return weights[f"{_classifier_of(weights)}.weight"].shape[0]


def channels_of(weights: dict[str, Tensor]) -> int:
    """How many channels the images of ``weights`` have, whosever names they have.

    Raises:
        ValueError: there is no stem among them.
    """
    for name in ("stem.expand_conv", "conv_stem", "features.0.0"):
        if f"{name}.weight" in weights:
            return weights[f"{name}.weight"].shape[1]
    raise ValueError("weights: there is no stem among them; is it a model of this family?")


def _classifier_of(weights: dict[str, Tensor]) -> str:
    for name in ("classifier", "classifier.1"):
        if f"{name}.weight" in weights:
            return name
    raise ValueError("weights: there is no classifier among them; is it a model of this family?")


def load_features(model: EfficientNet, weights: dict[str, Tensor]) -> None:
    """Loads all of ``weights`` but the classifier, which stays as it is: for other classes.

    Raises:
        ValueError: they are of another model; the message names a key.
    """
    name = _classifier_of(weights)
    own = {f"{name}.{key}": tensor for key, tensor in model.classifier.state_dict().items()}
    load_weights(model, {key: own.get(key, tensor) for key, tensor in weights.items()})


def load_weights(model: EfficientNet, weights: dict[str, Tensor]) -> None:
    """Loads ``weights`` into ``model``, whichever of the three kinds of names they have.

    Raises:
        ValueError: they are of another model; the message names a key.
    """
    model.load_state_dict(from_any(model, weights))
