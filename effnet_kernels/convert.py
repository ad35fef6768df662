"""The drop-in: ``convert`` makes a stock model run on the fused ops, ``prepare`` packs its weights
for inference on the CPU too, ``restore`` undoes both, and ``report`` says block by block what is
taken and why the rest is not.

>>> model = effnet_kernels.convert(timm.create_model("efficientnet_b0"))
>>> print(effnet_kernels.report(model))
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from torch import nn

from effnet_kernels import backends
from effnet_kernels.layers.adapter import Adapter
from effnet_kernels.layers.prepared import forget_module, prepare_module

# A library's adapters are imported once the library is: only then can a model hold its blocks.
_ADAPTER_MODULES = {
    "timm.models._efficientnet_blocks": "effnet_kernels.layers.timm",
    "torchvision.models.efficientnet": "effnet_kernels.layers.torchvision",
}

# What ``report`` lists; whatever of it has no adapter is not supported.
_BLOCKS = {
    "timm.models._efficientnet_blocks": (
        "ConvBnAct",
        "DepthwiseSeparableConv",
        "InvertedResidual",
        "CondConvResidual",
        "EdgeResidual",
        "UniversalInvertedResidual",
        "MobileAttention",
    ),
    "torchvision.models.efficientnet": ("MBConv", "FusedMBConv"),
    "torchvision.models.mobilenetv2": ("InvertedResidual",),
    "torchvision.models.mobilenetv3": ("InvertedResidual",),
}

# What of a model outside its blocks is taken: by the model's class, the paths of its stem and head;
# "" is the model, which runs its head's convolution with its BN.
_ENDS = {
    ("timm.models.efficientnet", "EfficientNet"): ("", "bn1", "bn2"),
    ("effnet_kernels.layers.timm", "FusedEfficientNet"): ("", "bn1", "bn2"),
    ("timm.models.efficientnet", "EfficientNetFeatures"): ("bn1",),
    ("timm.models.mobilenetv3", "MobileNetV3"): ("bn1",),
    ("timm.models.mobilenetv3", "MobileNetV3Features"): ("bn1",),
    ("effnet_kernels.layers.timm", "PreparedMobileNetV3"): ("bn1",),
    ("torchvision.models.efficientnet", "EfficientNet"): ("features.0", "features.-1"),
    ("effnet_kernels.layers.torchvision", "PreparedTorchvisionEfficientNet"): (
        "features.0",
        "features.-1",
    ),
}


@dataclass(frozen=True)
class BlockReport:
    """What ``report`` says of one block.

    Attributes:
        name: the block's name in the model, "" for the model itself.
        class_name: its class, as it stands.
        taken: whether the block runs on the fused ops.
        reason: why not, or "".
    """

    name: str
    class_name: str
    taken: bool
    reason: str


class Report(list[BlockReport]):
    """The blocks of a model in its order; prints as a table."""

    @property
    def taken(self) -> int:
        """How many blocks run on the fused ops."""
        return sum(entry.taken for entry in self)

    def __str__(self) -> str:
        rows = [("block", "class", "fused", "reason")]
        rows += [(e.name, e.class_name, "yes" if e.taken else "no", e.reason) for e in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), f"{self.taken} of {len(self)} fused"])


def convert(
    model: nn.Module,
    *,
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Makes the eligible blocks of ``model`` run on the fused ops, in place.

    Only the class of a block changes: modules, parameters, buffers, hooks and ``state_dict`` stay
    as they are, and copies and pickles of the model work (where effnet_kernels can be imported).
    A block is looked at again at each call: one that a hook, a new child, tracing, an unsupported
    dtype or device or ``EFFNET_KERNELS_DISABLE=1`` has made ineligible runs its stock forward.
    Outputs are channels-last. Converting again changes nothing. A second derivative is an error,
    and so is ``torch.jit.script``, which reads source: ``restore`` the model before it.

    Args:
        model: any module with blocks of timm (``InvertedResidual``, ``DepthwiseSeparableConv``,
            ``EdgeResidual``, ``ConvBnAct``) or torchvision (``MBConv``, ``FusedMBConv``).
        filter_fn: called with the name and module of each block; False leaves it as it is.
        strict: convert all the blocks that ``filter_fn`` admits, or none and raise.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or ``filter_fn`` cannot be called.
        ValueError: ``strict``, and a block cannot be converted or there is none.
    """
    _check_module(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: got {type(filter_fn).__name__}, expected a callable or None")
    blocks = [
        (name, block)
        for name, block in _blocks(model)
        if filter_fn is None or filter_fn(name, block)
    ]
    refusals = {name: _refusal(block) for name, block in blocks}
    refused = [f"{name or '(the model)'}: {why}" for name, why in refusals.items() if why]
    if len(refused) == len(blocks):
        message = f"nothing in this {type(model).__name__} can be converted: " + (
            "; ".join(refused)
            or "it has no block that is known"
            + (filter_fn is not None) * " and that filter_fn admits"
        )
        if strict:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    elif strict and refused:
        raise ValueError(f"{len(refused)} of {len(blocks)} blocks: " + "; ".join(refused))
    for name, block in blocks:
        if refusals[name] is None:
            block.__class__ = _adapters()[type(block)].fused
    return model


def prepare(model: nn.Module) -> nn.Module:
    """Makes a model ready for inference on the CPU: converted, BN folded, weights packed.

    Each block's weights are packed once, into memory of their own, and a timm ``EfficientNet`` or
    ``MobileNetV3`` or torchvision ``EfficientNet`` runs as one call from image to logits. The model
    itself stays as ``convert`` leaves it: training, hooks, gradients, autocast, ``torch.compile``
    and other devices go the way they go without. Weights that change by any means but ``.data`` or
    an array that shares their memory are packed again at the next call; settings of modules (a
    stride, an epsilon) are read here, so prepare again after changing one. Copies and pickles of
    the model are not prepared.

    Args:
        model: in evaluation mode, its parameters on the CPU.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it is in training mode or on another device, its tensors were made under
            ``torch.inference_mode``, or no block of it can run on packed weights.
        RuntimeError: there are no CPU kernels.
    """
    _check_module(model)
    if backends.CPU.missing is not None:
        raise RuntimeError(f"there are no CPU kernels: {backends.CPU.missing}")
    if any(module.training for module in model.modules()):
        raise ValueError("model: got one in training mode, expected evaluation mode: model.eval()")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(
                f"model: got {name} on {tensor.device}, expected the CPU, whose kernels read "
                "packed weights; on another device convert is all there is to do"
            )
        if tensor.is_inference():
            raise ValueError(
                f"model: got {name} made under torch.inference_mode, expected tensors whose "
                "changes can be seen"
            )
    convert(model)
    prepared = 0
    adapters = {**_adapters(), **_networks()}
    blocks = {module for _, module in _blocks(model)}
    # Blocks before the models that are made of them.
    for module in reversed(list(model.modules())):
        adapter = adapters.get(type(module))
        if module not in blocks and type(module) not in _networks():
            continue
        if adapter is None or adapter.stages is None:
            continue
        if module in blocks and _refusal(module) is not None:
            continue
        if prepare_module(module, adapter.stages):
            module.__class__ = adapter.fused
            prepared += 1
        else:
            forget_module(module)
    if not prepared:
        raise ValueError(
            f"model: got a {type(model).__name__} without a block that could run on packed "
            "weights: effnet_kernels.report(model) says why"
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives every converted block of ``model`` its stock class back, in place, and lets go of the
    weights that ``prepare`` packed.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_module(model)
    for _, block in _blocks(model):
        adapter = _adapters().get(type(block))
        if adapter is not None:
            block.__class__ = adapter.stock
    for module in model.modules():
        forget_module(module)
        network = _networks().get(type(module))
        if network is not None:
            module.__class__ = network.stock
    return model


def report(model: nn.Module) -> Report:
    """What of ``model`` runs on the fused ops, as it stands, and why the rest does not.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_module(model)
    entries = Report()
    for name, block in _blocks(model):
        reason = _refusal(block) or _idle(block) or ""
        entries.append(BlockReport(name, type(block).__name__, not reason, reason))
    return entries


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")


def _adapters(table: str = "ADAPTERS") -> dict[type[nn.Module], Adapter]:
    """The adapters of the libraries that are imported, by stock and by fused class."""
    adapters = {}
    for library, module in _ADAPTER_MODULES.items():
        if library in sys.modules:
            for adapter in getattr(importlib.import_module(module), table):
                adapters[adapter.stock] = adapters[adapter.fused] = adapter
    return adapters


def _networks() -> dict[type[nn.Module], Adapter]:
    """Likewise of the models that are nothing but their parts until they are prepared."""
    return _adapters("NETWORKS")


def _stock_name(cls: type) -> str | None:
    """The name of the block class that ``cls`` is or derives from."""
    for base in cls.__mro__:
        if base.__name__ in _BLOCKS.get(base.__module__, ()):
            return base.__name__
    return None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of ``model``, and the stems and heads of the models in it, in its order."""
    ends: set[nn.Module] = set()
    for name, module in model.named_modules():
        cls = type(module)
        for path in _ENDS.get((cls.__module__, cls.__name__), ()):
            ends.update(_descendant(module, path))
        if module in ends or _stock_name(cls) is not None:
            yield name, module


def _descendant(module: nn.Module, path: str) -> list[nn.Module]:
    """The module at ``path``, which may count children from the end, if it is there."""
    for name in path.split(".") if path else ():
        children = dict(module.named_children())
        if name.startswith("-") and len(children) >= -int(name):
            module = list(children.values())[int(name)]
        elif name in children:
            module = children[name]
        else:
            return []
    # A model without a head has an Identity in its place.
    head = module if path else getattr(module, "conv_head", None)
    return [] if type(head) is nn.Identity else [module]


def _refusal(block: nn.Module) -> str | None:
    """Why ``block`` cannot be converted, or None where it can be or is."""
    cls = type(block)
    adapter = _adapters().get(cls)
    if adapter is None:
        stock = _stock_name(cls)
        if stock != cls.__name__ and stock in {a.stock.__name__ for a in _adapters().values()}:
            return f"{cls.__name__} is a subclass of {stock}, and may compute something else"
        return f"{cls.__module__.partition('.')[0]}'s {cls.__name__} is not supported"
    if "forward" in block.__dict__:
        return "it has a forward of its own (patched on the instance)"
    return adapter.refusal(block)


def _idle(block: nn.Module) -> str | None:
    """Why an eligible block does not run on the fused ops as things stand."""
    if type(block) is not _adapters()[type(block)].fused:
        return "not converted"
    if backends.disabled():
        return "EFFNET_KERNELS_DISABLE is set"
    weight = next(block.parameters())
    refusals = backends.refusals(weight)
    if all(refusals.values()):
        return "; ".join(f"{name}: {why}" for name, why in refusals.items())
    return None
