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
from torchvision.models.efficientnet import MBConv, MBConvConfig

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
    ("name", "taken", "blocks"), [("efficientnet_b0", 16, 16), ("efficientnet_v2_s", 30, 40)]
)
def test_models(name: str, taken: int, blocks: int) -> None:
    """Whole models: what is taken, the same ``state_dict``, logits and the way back."""
    torch.manual_seed(0)
    model = getattr(tv, name)(num_classes=10).eval()
    calibrate(model, (2, 3, 64, 64))
    model.eval()
    fused = convert(copy.deepcopy(model))
    entries = report(fused)
    assert (entries.taken, len(entries)) == (taken + 2, blocks + 2), "and stem and head"
    assert fused.state_dict().keys() == model.state_dict().keys()
    copied = pickle.loads(pickle.dumps(fused))
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager = model(x)
        with Calls() as calls:
            ours = copied(x)
        assert (calls.whole, calls.normalised) == (taken, 2)
        assert_norm_error_rule("logits", ours, eager, exact, FORWARD)
        assert torch.equal(restore(fused)(x), eager)


@pytest.mark.parametrize("number", range(8))
def test_every_efficientnet_converts(number: int) -> None:
    """B0 to B7, each block."""
    with torch.device("meta"):
        model = getattr(tv, f"efficientnet_b{number}")()
    entries = report(convert(model))
    assert all("on meta" in e.reason or "not meta" in e.reason for e in entries), str(entries)
    assert all(type(m).__name__ == "FusedTorchvisionMBConv" for m in model.modules()
               if isinstance(m, MBConv))  # fmt: skip
