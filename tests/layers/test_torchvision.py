"""torchvision's MBConv on the ops: what is taken, what is not, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import FORWARD
from fused_calls import Calls
from layers.block_runs import assert_exact_enough, run
from stock_models import assert_norm_error_rule, calibrate
from torch import nn
from torchvision.models import efficientnet as tv
from torchvision.models.efficientnet import (
    FusedMBConv,
    FusedMBConvConfig,
    MBConv,
    MBConvConfig,
)

from effnet_kernels import convert, report, restore
from effnet_kernels.layers.torchvision import whole_refusal

pytestmark = pytest.mark.usefixtures("one_thread")

C = 16


def make_blocks(
    expand_ratio: float = 2, kernel: int = 3, stride: int = 1, out: int = C, drop: float = 0.0
) -> tuple[MBConv, MBConv]:
    """A stock block with statistics and affine maps of some kind, and a converted copy of it."""
    torch.manual_seed(0)
    config = MBConvConfig(expand_ratio, kernel, stride, C, out, 1)
    block = MBConv(config, drop, partial(nn.BatchNorm2d, eps=1e-3))
    calibrate(block, (4, C, 8, 8))
    return block, convert(copy.deepcopy(block))


def images(*, batch: int = 4, size: tuple[int, int] = (9, 12)) -> torch.Tensor:
    x = torch.randn(batch, C, *size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def assert_same(stock: MBConv, fused: MBConv, x: torch.Tensor, *, whole: int) -> None:
    """The error rule for everything ``run`` gives, and what ran."""
    exact = copy.deepcopy(stock).double()
    for training in (False, True):
        eager = run(stock, x, training)
        with Calls() as calls:
            ours = run(fused, x, training)
        assert (calls.whole, calls.fused) == (whole, 2)
        assert_exact_enough(ours, eager, run(exact, x.double(), training))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"expand_ratio": 1},
        {"kernel": 5, "stride": 2, "out": 24},
        {"expand_ratio": 6, "drop": 0.5},
        {"expand_ratio": 1, "kernel": 5, "out": 8},
    ],
    ids=str,
)
def test_blocks(settings: dict[str, Any]) -> None:
    """Every setting a block can have, in both modes, with gradients and without."""
    stock, fused = make_blocks(**settings)
    assert type(fused) is not type(stock)
    assert_same(stock, fused, images(), whole=2)
    assert type(restore(fused)) is MBConv


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.block[0].register_forward_hook(lambda *_: None), "block.0 has forward hooks"),
        (lambda b: b.block[3][1].register_forward_hook(lambda *_: None), "block.3.1 has forward"),
        (
            lambda b: b.stochastic_depth.register_forward_hook(lambda *_: None),
            "stochastic_depth has forward hooks",
        ),
        (lambda b: setattr(b.stochastic_depth, "mode", "batch"), "does not drop whole images"),
        (lambda b: b.block[3].insert(2, nn.GELU()), "block.3.2 is a GELU"),
    ],
)
def test_depthwise_stage_alone(change: Callable[[Any], Any], reason: str) -> None:
    """Where something hangs on a child, the ops run that bypass none of it."""
    stock, fused = make_blocks()
    for block in (stock, fused):
        change(block)
    assert reason in whole_refusal(fused)
    assert_same(stock, fused, images(), whole=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.block[1][0].register_forward_hook(lambda *_: None), "block.1.0 has forward"),
        (lambda b: b.block[1].__setitem__(2, nn.GELU()), "block.1.2 is a GELU"),
        (
            lambda b: setattr(b.block[2], "scale_activation", nn.Tanh()),
            "scale_activation is a Tanh",
        ),
        (lambda b: setattr(b.block[2].fc1, "stride", (2, 2)), "block.2.fc1 has kernel size"),
        (
            lambda b: b.block[2].avgpool.register_forward_hook(lambda *_: None),
            "avgpool has forward",
        ),
        (lambda b: b.block.append(nn.Identity()), "not a Sequential of 3 or 4 stages"),
        (
            lambda b: b.block[1].__setitem__(1, nn.GroupNorm(4, 2 * C)),
            "block.1.1 is a GroupNorm, not a BatchNorm2d",
        ),
    ],
)
def test_ineligible_after_conversion(change: Callable[[Any], Any], reason: str) -> None:
    """A converted block that became ineligible runs its stock forward, to the bit, and says why."""
    stock, fused = make_blocks()
    for block in (stock, fused):
        change(block)
    for training in (False, True):
        with Calls() as calls:
            ours = run(fused, images(), training)
        assert calls.fused == 0
        for name, tensor in run(stock, images(), training).items():
            assert torch.equal(ours[name], tensor), name
    (entry,) = report(fused)
    assert not entry.taken
    assert reason in entry.reason


@pytest.mark.parametrize(
    ("name", "blocks", "fused_blocks"), [("efficientnet_b0", 16, 0), ("efficientnet_v2_s", 30, 10)]
)
def test_models(name: str, blocks: int, fused_blocks: int) -> None:
    """Whole models: what is taken, the same ``state_dict``, logits and the way back."""
    torch.manual_seed(0)
    model = getattr(tv, name)(num_classes=10).eval()
    calibrate(model, (2, 3, 64, 64))
    model.eval()
    fused = convert(copy.deepcopy(model))
    entries = report(fused)
    assert entries.taken == len(entries) == blocks + fused_blocks + 2, "and stem and head"
    assert fused.state_dict().keys() == model.state_dict().keys()
    copied = pickle.loads(pickle.dumps(fused))
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager = model(x)
        with Calls() as calls:
            ours = copied(x)
        # The stem is a block without expansion.
        expected = (blocks, fused_blocks + 1, 1)
        assert (calls.whole, calls.fused_mbconv, calls.normalised) == expected
        assert_norm_error_rule("logits", ours, eager, exact, FORWARD)
        assert torch.equal(restore(fused)(x), eager)


@pytest.mark.parametrize("variant", [*(f"b{i}" for i in range(8)), "v2_s", "v2_m", "v2_l"])
def test_every_efficientnet_converts(variant: str) -> None:
    """V1 and V2, each block."""
    with torch.device("meta"):
        model = getattr(tv, f"efficientnet_{variant}")()
    entries = report(convert(model))
    assert all("on meta" in e.reason or "not meta" in e.reason for e in entries), str(entries)
    assert all(type(m).__name__.startswith("FusedTorchvision") for m in model.modules()
               if isinstance(m, (MBConv, FusedMBConv)))  # fmt: skip


def make_fused_blocks(
    expand_ratio: float = 4, kernel: int = 3, stride: int = 1, out: int = C, drop: float = 0.0
) -> tuple[FusedMBConv, FusedMBConv]:
    """As ``make_blocks``, of the other kind."""
    torch.manual_seed(0)
    config = FusedMBConvConfig(expand_ratio, kernel, stride, C, out, 1)
    block = FusedMBConv(config, drop, partial(nn.BatchNorm2d, eps=1e-3))
    calibrate(block, (4, C, 8, 8))
    return block, convert(copy.deepcopy(block))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"expand_ratio": 1, "drop": 0.5},
        {"stride": 2, "out": 24},
        {"kernel": 5, "drop": 0.5},
        {"expand_ratio": 1, "stride": 2, "out": 8},
    ],
    ids=str,
)
def test_fused_blocks(settings: dict[str, Any]) -> None:
    """Every setting of a Fused-MBConv, in both modes, with gradients and without."""
    stock, fused = make_fused_blocks(**settings)
    exact = copy.deepcopy(stock).double()
    for training in (False, True):
        eager = run(stock, images(), training)
        with Calls() as calls:
            ours = run(fused, images(), training)
        # Training without expansion is PyTorch's convolution and an op.
        alone = settings.get("expand_ratio") == 1
        expected = (1, 1) if alone and not training else (0, 2) if alone else (2, 0)
        assert (calls.fused_mbconv, calls.normalised) == expected
        assert_exact_enough(ours, eager, run(exact, images().double(), training))
    assert type(restore(fused)) is FusedMBConv


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.block[0].register_forward_hook(lambda *_: None), "block.0 has forward hooks"),
        (lambda b: b.block[0][0].register_forward_hook(lambda *_: None), "block.0.0 has forward"),
        (lambda b: b.block[1][1].register_forward_hook(lambda *_: None), "block.1.1 has forward"),
        (lambda b: b.block[0].__setitem__(2, nn.GELU()), "block.0.2 is a GELU"),
        (lambda b: setattr(b.stochastic_depth, "mode", "batch"), "does not drop whole images"),
        (lambda b: b.block.append(nn.Identity()), "not a Sequential of 1 or 2 stages"),
        (lambda b: setattr(b.block[1][0], "bias", nn.Parameter(torch.ones(C))), "has a bias"),
    ],
)
def test_ineligible_fused_blocks(change: Callable[[Any], Any], reason: str) -> None:
    """A converted block that became ineligible runs its stock forward, to the bit, and says why."""
    stock, fused = make_fused_blocks()
    for block in (stock, fused):
        change(block)
    for training in (False, True):
        with Calls() as calls:
            ours = run(fused, images(), training)
        assert calls.fused_mbconv == 0
        for name, tensor in run(stock, images(), training).items():
            assert torch.equal(ours[name], tensor), name
    (entry,) = report(fused)
    assert not entry.taken
    assert reason in entry.reason
