"""Whole converted models against stock ones, at reduced resolution, in evaluation and training.

By default the models of up to 4.3 million parameters, all kinds of block among them; with
``--exhaustive`` every timm model that converts whole and torchvision's EfficientNets.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from accuracy import FORWARD, GRADIENT, relative_errors
from stock_models import calibrate, family, without_memory
from torch import Tensor, nn

from effnet_kernels import convert, report

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("families"),  # one process makes the models without memory
]

PARTS = 8
SMALL = 4_300_000
DRAWS = 3
"""A model amplifies its first roundings by a factor of chance, the same for all of its outputs: a
draw of weights and images may be unlucky, all of them only if something is wrong.
"""
SAME = 1e-9
"""Error allowed in float64: no rounding moves a value across a kink there, as in float32 one does
in most models with ReLU or hard-swish, after which gradients say nothing about roundings.
"""
SAME_WITH_HARD_SIGMOID = 1e-7
"""PyTorch's float64 gradient of hard-sigmoid is 1/6 as float32 has it, which is off by 3e-8."""


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _whole(model: nn.Module) -> bool:
    """Whether all blocks of ``model`` are taken."""
    return all(entry.reason == "not converted" for entry in report(copy.copy(model)))


def _models(part: int, everything: bool) -> Iterator[str]:
    """One name of each architecture."""
    seen = set()
    for name in family():
        model = without_memory(name)
        architecture = re.sub(r"drop_prob=[\d.]+", "", repr(model))
        if architecture in seen or not _whole(model):
            continue
        seen.add(architecture)
        if (everything or _parameters(model) <= SMALL) and len(seen) % PARTS == part:
            yield name


def _step(model: nn.Module, x: Tensor, training: bool) -> dict[str, list[Tensor]]:
    """Output, buffers and the gradients of all parameters; in evaluation the output."""
    model.train(training)
    torch.manual_seed(3)  # for drop path
    if not training:
        with torch.no_grad():
            return {"output": [model(x)]}
    y = model(x)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    grads = torch.autograd.grad(y, list(model.parameters()), grad)
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    return {"output": [y.detach()], "buffers": buffers, "gradients": list(grads)}


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Norm of the error over the norm, of all tensors as one vector: some gradients are next to
    nothing beside the others, and noise in any precision.
    """
    pairs = [
        relative_errors(a, b)[1] * b.double().norm() for a, b in zip(results, exact, strict=True)
    ]
    whole = torch.stack([b.double().norm() for b in exact]).norm()
    return (torch.stack([torch.as_tensor(p) for p in pairs]).norm() / whole).item()


def _unlucky(stock: nn.Module, x: Tensor, training: bool, smooth: bool) -> list[str]:
    """Runs all four and says what is outside the rule in float32; what is in float64 fails."""
    exact = _step(copy.deepcopy(stock).double(), x.double(), training)
    same = _step(convert(copy.deepcopy(stock)).double(), x.double(), training)
    hard = any("hardsigmoid" in type(m).__name__.lower() for m in stock.modules())
    for key, truth in exact.items():
        error = _error(same[key], truth)
        assert error <= (SAME_WITH_HARD_SIGMOID if hard else SAME), (
            f"{key} in float64, training={training}: error {error:.1e}"
        )
    del same
    ours = _step(convert(copy.deepcopy(stock)), x, training)
    mine = {key: _error(ours[key], truth) for key, truth in exact.items()}
    del ours
    eager = _step(copy.deepcopy(stock), x, training)
    outside = []
    for key, truth in exact.items():
        if key == "gradients" and not smooth:
            continue
        theirs = _error(eager[key], truth)
        if mine[key] > (GRADIENT if key == "gradients" else FORWARD) * theirs:
            outside.append(f"{key}, training={training}: {mine[key]:.1e}, eager's {theirs:.1e}")
    return outside


def _check(name: str, stock: nn.Module) -> None:
    smooth = not any(re.search(r"ReLU|Hard", type(m).__name__) for m in stock.modules())
    channels = next(m for m in stock.modules() if isinstance(m, nn.Conv2d)).in_channels
    unlucky: list[str] = []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        for module in stock.modules():
            if isinstance(module, nn.Conv2d) and draw:
                module.reset_parameters()
        calibrate(stock, (4, channels, 64, 64))
        x = torch.randn(4, channels, 64, 64).contiguous(memory_format=torch.channels_last)
        unlucky = _unlucky(stock, x, False, smooth) + _unlucky(stock, x, True, smooth)
        if not unlucky:
            return
    raise AssertionError(f"{name}: {unlucky}")


@pytest.mark.parametrize("part", range(PARTS))
def test_timm(part: int, exhaustive: bool) -> None:
    """The error rule for every architecture that converts whole."""
    names = list(_models(part, exhaustive))
    assert names
    for name in names:
        _check(name, timm.create_model(name))


@pytest.mark.parametrize("variant", [*(f"b{i}" for i in range(8)), "v2_s", "v2_m", "v2_l"])
def test_torchvision(variant: str, exhaustive: bool) -> None:
    """The error rule for torchvision's EfficientNets."""
    if variant not in ("b0", "b1") and not exhaustive:
        pytest.skip("large: run with --exhaustive")
    _check(variant, torchvision.models.get_model(f"efficientnet_{variant}"))
