"""Stock models in a state worth comparing: fresh ones let no signal through in evaluation."""

from __future__ import annotations

import functools

import timm
import torch
from accuracy import relative_errors
from timm.models._registry import _model_to_module
from torch import Tensor, nn

FAMILIES = ("efficientnet", "mobilenetv3", "hardcorenas", "mobilenetv5")


@functools.cache
def family() -> tuple[str, ...]:
    """Every timm model of the MobileNet and EfficientNet families."""
    return tuple(n for n in timm.list_models() if _model_to_module[n] in FAMILIES)


@functools.cache
def without_memory(name: str) -> nn.Module:
    """A timm model on the meta device: its structure, at no cost."""
    with torch.device("meta"):
        return timm.create_model(name)


@torch.no_grad()
def calibrate(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Gives every BN the statistics of random images and an affine map that is not the identity."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.weight.uniform_(0.7, 1.3)
        norm.bias.uniform_(-0.3, 0.3)
    for block in model.modules():
        if getattr(block, "has_skip", False):
            # Else fifty blocks and more make anything of a rounding, in any precision.
            last = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)][-1]
            last.weight.mul_(0.3)
    model.train()
    for _ in range(2):
        model(torch.randn(shape))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def assert_norm_error_rule(
    name: str, ours: Tensor, eager: Tensor, exact: Tensor, factor: float
) -> None:
    """The error rule in norm: on the few values of a small block the largest error is chance.

    A block is a dozen operations deep: a dozen roundings of float32 are always allowed, for where
    eager happens to be exact.
    """
    mine, theirs = relative_errors(ours, exact)[1], relative_errors(eager, exact)[1]
    roundings = 16 if ours.dtype == torch.float32 else 1
    allowed = max(factor * theirs, torch.finfo(ours.dtype).eps * roundings)
    assert mine <= allowed, f"{name}: error {mine:.3e}, eager's {theirs:.3e}"
