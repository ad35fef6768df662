"""Every timm model of the MobileNet and EfficientNet families: what converts, and each kind of
block in them, numerically.
"""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from accuracy import FORWARD, GRADIENT
from stock_models import assert_norm_error_rule, calibrate, family, without_memory
from timm.models import _efficientnet_blocks as timm_blocks
from torch import Tensor, nn

from effnet_kernels import convert, report

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("families"),  # one process makes the models without memory
]

STOCK = ("ConvBnAct", "DepthwiseSeparableConv", "EdgeResidual", "InvertedResidual")
LEFT = (
    r"timm's \w+ is not supported",
    r"bn\d is a (GroupNormAct|GroupNorm1Act|LayerNormAct2d|EvoNorm2dS0|RmsNormAct2d)",
    r"conv_dw is a MixedConv2d",
    r"conv_dw is not depthwise",
    r"conv_dw has kernel size \(2, 2\)",
    r"conv_exp has \d groups",
    r"aa is a (AvgPool2d|BlurPool2d)",
    r"(bn\d|it)\.act is a GELU",
)
"""Why blocks stay stock."""


@pytest.mark.parametrize("part", range(4))
def test_every_model(part: int) -> None:
    """All blocks of the supported classes are taken, or the report says why not."""
    whole = 0
    for name in family()[part::4]:
        model = copy.copy(without_memory(name))
        entries = report(model)
        reasons = {e.name: e.reason for e in entries if e.reason != "not converted"}
        for reason in reasons.values():
            assert any(re.match(pattern, reason) for pattern in LEFT), (name, reason)
        whole += not reasons
    assert whole >= 25, "a quarter of the family"


def _signature(block: nn.Module) -> str:
    """A block's settings, but for its widths."""
    text = re.sub(r"Conv2d(Same)?\(\d+, \d+,", r"Conv2d\1(", repr(block))
    text = re.sub(r"(groups=)\d+", r"\1C", text)
    text = re.sub(r"BatchNormAct2d\(\s*\d+", "BatchNormAct2d(", text)
    return re.sub(r"drop_prob=[\d.]+", "drop_prob=", text) + str(getattr(block, "has_skip", ""))


@functools.cache
def _kinds() -> dict[str, tuple[str, str]]:
    """(model, path) of one block of each kind that there is, by a short name."""
    kinds: dict[str, tuple[str, str]] = {}
    for name in family():
        for path, block in without_memory(name).named_modules():
            if type(block).__module__ == timm_blocks.__name__ and type(block).__name__ in STOCK:
                kinds.setdefault(_signature(block), (name, path))
    return kinds


def _narrow(block: nn.Module) -> nn.Module:
    """``block`` with memory and parameters, and no wider than it must be."""
    block = copy.deepcopy(block).to_empty(device="cpu")
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return block


def _run(block: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    y = block(x)
    generator = torch.Generator().manual_seed(4)
    grad = torch.randn(y.shape, generator=generator).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *block.parameters()], grad)
    flat = torch.cat([g.flatten().double() for g in grads[1:]])
    return {"output": y, "grad input": grads[0], "grad parameters": flat}


def test_every_kind_of_block() -> None:
    """One block of each kind, in evaluation and training, by the error rule in norm."""
    checked = 0
    for name, path in _kinds().values():
        block = without_memory(name).get_submodule(path)
        convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        if max(m.in_channels for m in convolutions) > 400:
            continue  # a kind that only wide blocks have is another's but for its drop path
        if report(copy.copy(block))[0].reason != "not converted":
            continue  # it stays stock
        torch.manual_seed(0)
        stock = _narrow(block)
        first = next(m for m in stock.children() if hasattr(m, "in_channels"))
        shape = (3, first.in_channels, 10, 9)
        calibrate(stock, shape)
        fused = convert(copy.deepcopy(stock))
        assert type(fused) is not type(stock)
        checked += 1
        exact = copy.deepcopy(stock).double()
        x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        for training in (False, True):
            for model in (stock, fused, exact):
                model.train(training)
            ours, eager, truth = _run(fused, x), _run(stock, x), _run(exact, x.double())
            kinked = any("ReLU" in type(m).__name__ or "Hard" in type(m).__name__
                         for m in stock.modules())  # fmt: skip
            for key, tensor in truth.items():
                factor = GRADIENT if key.startswith("grad") else FORWARD
                if kinked and key.startswith("grad"):
                    factor *= 10  # a value on the other side of a kink
                assert_norm_error_rule(
                    f"{name} {path} {key}", ours[key], eager[key], tensor, factor
                )
    assert checked > 40
