"""Weights under timm's and torchvision's names, and back.

A converter needs the network, whose blocks say what there is to rename. Parameters have the same
shapes in all three; only their names differ.

>>> model.load_state_dict(from_timm(model, timm.create_model("efficientnet_b0").state_dict()))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from effnet.efficientnet import EfficientNet
from effnet_kernels.layers import FusedMBConv, MBConv

Names = Iterator[tuple[str, str]]
"""(ours, theirs) of modules that hold parameters."""


def from_timm(model: EfficientNet, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's weights under our names.

    Args:
        model: the network that they are for; it stays as it is.
        state_dict: of timm's model of the same variant; a ``tf_`` one wants ``padding="same"`` and
            ``eps=1e-3``.

    Returns:
        The same tensors.

    Raises:
        ValueError: it is of another model; the message names a key.
    """
    return _from(model, state_dict, _timm_names, "timm")


def to_timm(model: EfficientNet) -> dict[str, Tensor]:
    """The network's weights under timm's names."""
    return _to(model, _timm_names)


def from_torchvision(model: EfficientNet, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's weights under our names, as ``from_timm``; its V2, and B5 to B7, want
    ``eps=1e-3``.

    Raises:
        ValueError: it is of another model; the message names a key.
    """
    return _from(model, state_dict, _torchvision_names, "torchvision")


def to_torchvision(model: EfficientNet) -> dict[str, Tensor]:
    """The network's weights under torchvision's names."""
    return _to(model, _torchvision_names)


def from_any(model: EfficientNet, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, whether they have timm's, torchvision's or ours already.

    Raises:
        ValueError: they are of another model; the message names a key.
    """
    if "conv_stem.weight" in state_dict:
        return from_timm(model, state_dict)
    if "features.0.0.weight" in state_dict:
        return from_torchvision(model, state_dict)
    return _from(model, state_dict, _our_names, "effnet")


def _from(
    model: EfficientNet, state_dict: Mapping[str, Tensor], names: Callable[[EfficientNet], Names],
    library: str,
) -> dict[str, Tensor]:  # fmt: skip
    renamed = {}
    sources = set()
    for key, source, tensor in _parameters(model, names):
        sources.add(source)
        if source not in state_dict:
            raise ValueError(
                f"state_dict: there is no {source!r}, which {library}'s model of this variant has; "
                "is it another variant's?"
            )
        renamed[key] = state_dict[source]
        if renamed[key].shape != tensor.shape:
            raise ValueError(
                f"state_dict: {source!r} is {tuple(renamed[key].shape)}, expected "
                f"{tuple(tensor.shape)}; is it another variant's, or of other classes?"
            )
    if len(state_dict) > len(renamed):
        extra = next(key for key in state_dict if key not in sources)
        raise ValueError(
            f"state_dict: got {extra!r}, which {library}'s model of this variant does not have"
        )
    return renamed


def _to(model: EfficientNet, names: Callable[[EfficientNet], Names]) -> dict[str, Tensor]:
    return {source: tensor for _, source, tensor in _parameters(model, names)}


def _parameters(
    model: EfficientNet, names: Callable[[EfficientNet], Names]
) -> Iterator[tuple[str, str, Tensor]]:
    """(our name, theirs, the tensor) of all that a ``state_dict`` holds."""
    theirs = dict(names(model))
    for key, tensor in model.state_dict().items():
        module, _, parameter = key.rpartition(".")
        yield key, f"{theirs[module]}.{parameter}", tensor


def _blocks(model: EfficientNet) -> Iterator[tuple[str, int, int, Any]]:
    for s, stage in enumerate(model.stages):
        for i, block in enumerate(stage.children()):
            yield f"stages.{s}.{i}", s, i, block


def _our_names(model: EfficientNet) -> Names:
    for name, _ in model.named_modules():
        yield name, name


def _timm_names(model: EfficientNet) -> Names:
    """timm numbers a block's BNs by their place."""
    yield "stem.expand_conv", "conv_stem"
    yield "stem.expand_bn", "bn1"
    for ours, s, i, block in _blocks(model):
        if isinstance(block, FusedMBConv):
            expand = "conv" if block.project_conv is None else "conv_exp"
            children = [("expand_conv", expand, "expand_bn")]
            project = "conv_pwl"
        else:
            assert isinstance(block, MBConv)
            expands = block.expand_conv is not None
            children = [("expand_conv", "conv_pw", "expand_bn")] if expands else []
            children += [("depthwise_conv", "conv_dw", "depthwise_bn")]
            project = "conv_pwl" if expands else "conv_pw"
        if block.project_conv is not None:
            children.append(("project_conv", project, "project_bn"))
        for place, (conv, theirs, bn) in enumerate(children):
            yield f"{ours}.{conv}", f"blocks.{s}.{i}.{theirs}"
            yield f"{ours}.{bn}", f"blocks.{s}.{i}.bn{place + 1}"
        if block.reduce is not None:
            yield f"{ours}.reduce", f"blocks.{s}.{i}.se.conv_reduce"
            yield f"{ours}.excite", f"blocks.{s}.{i}.se.conv_expand"
    yield "head.conv", "conv_head"
    yield "head.bn", "bn2"
    yield "classifier", "classifier"


def _torchvision_names(model: EfficientNet) -> Names:
    """torchvision's blocks are lists of (convolution, BN, activation), with the gate among them."""
    yield "stem.expand_conv", "features.0.0"
    yield "stem.expand_bn", "features.0.1"
    for ours, s, i, block in _blocks(model):
        parts = ["expand", "depthwise"] if isinstance(block, MBConv) else ["expand"]
        parts = [part for part in parts if getattr(block, f"{part}_conv") is not None]
        parts += ["excite"] if block.reduce is not None else []
        parts += ["project"] if block.project_conv is not None else []
        for place, part in enumerate(parts):
            theirs = f"features.{s + 1}.{i}.block.{place}"
            if part == "excite":
                yield f"{ours}.reduce", f"{theirs}.fc1"
                yield f"{ours}.excite", f"{theirs}.fc2"
            else:
                yield f"{ours}.{part}_conv", f"{theirs}.0"
                yield f"{ours}.{part}_bn", f"{theirs}.1"
    last = len(model.stages) + 1
    yield "head.conv", f"features.{last}.0"
    yield "head.bn", f"features.{last}.1"
    yield "classifier", "classifier.1"
