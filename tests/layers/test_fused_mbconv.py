"""Fused-MBConv as a module, and timm's ``EdgeResidual`` and ``ConvBnAct`` on the op."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from fused_calls import Calls
from layers.block_runs import assert_exact_enough, run
from stock_models import calibrate
from timm.layers import GroupNormAct
from timm.models._efficientnet_blocks import ConvBnAct, EdgeResidual, SqueezeExcite
from torch import nn

from effnet_kernels import convert, report, restore
from effnet_kernels.layers import FusedMBConv

pytestmark = pytest.mark.usefixtures("one_thread")

C = 16


def make_blocks(cls: type = EdgeResidual, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """A stock block with statistics and affine maps of some kind, and a converted copy of it."""
    torch.manual_seed(0)
    if cls is EdgeResidual:
        settings = {"exp_ratio": 3.0, **settings}
    else:
        settings = {"kernel_size": 3, "skip": True, **settings}
    block = cls(C, settings.pop("out_chs", C), **{"act_layer": nn.SiLU, **settings})
    calibrate(block, (4, C, 8, 8))
    return block, convert(copy.deepcopy(block))


def images(*, batch: int = 4, size: tuple[int, int] = (9, 12)) -> torch.Tensor:
    x = torch.randn(batch, C, *size, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def assert_same(stock: nn.Module, fused: nn.Module) -> None:
    """The error rule for everything ``run`` gives, in both modes, and the op is what ran."""
    exact = copy.deepcopy(stock).double()
    for training in (False, True):
        eager = run(stock, images(), training)
        with Calls() as calls:
            ours = run(fused, images(), training)
        # Training without expansion is PyTorch's convolution and an op.
        alone = isinstance(stock, ConvBnAct)
        expected = (1, 1) if alone and not training else (0, 2) if alone else (2, 0)
        assert (calls.fused_mbconv, calls.normalised) == expected
        assert_exact_enough(ours, eager, run(exact, images().double(), training))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "exp_kernel_size": 5, "se_layer": SqueezeExcite},
        {"stride": 2, "pad_type": "same", "out_chs": 24},
        {"pad_type": "same", "exp_kernel_size": 5},
        {"pad_type": "valid", "out_chs": 8},
        {"noskip": True, "act_layer": nn.ReLU6},
        {"act_layer": nn.ReLU, "se_layer": SqueezeExcite},
        {"act_layer": nn.Hardswish, "drop_path_rate": 0.5},
        {"drop_path_rate": 0.5, "se_layer": SqueezeExcite},
        {"force_in_chs": 24},
    ],
    ids=str,
)
def test_edge_residual(settings: dict[str, Any]) -> None:
    """Every setting a block can have, with gradients and without."""
    stock, fused = make_blocks(**settings)
    assert_same(stock, fused)
    assert type(restore(fused)) is EdgeResidual


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "pad_type": "same"},
        {"kernel_size": 5, "act_layer": nn.ReLU, "drop_path_rate": 0.5},
        {"skip": False, "out_chs": 24, "act_layer": nn.Hardswish},
    ],
    ids=str,
)
def test_conv_bn_act(settings: dict[str, Any]) -> None:
    """A block without expansion, likewise."""
    stock, fused = make_blocks(ConvBnAct, **settings)
    assert_same(stock, fused)
    assert type(restore(fused)) is ConvBnAct


def test_hook_on_a_convolution() -> None:
    """It runs: what follows the convolution is the op then."""
    seen = []
    _, fused = make_blocks(ConvBnAct)
    fused.conv.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad(), Calls() as calls:
        fused.eval()(images())
    assert seen and (calls.fused_mbconv, calls.normalised) == (0, 1)


def _set(path: str, **attributes: Any) -> Callable[[nn.Module], None]:
    def change(block: nn.Module) -> None:
        for name, value in attributes.items():
            setattr(block.get_submodule(path), name, value)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b.conv_exp.register_forward_hook(lambda *_: None), "conv_exp has forward hooks"),
        (lambda b: b.bn2.register_forward_pre_hook(lambda *_: None), "bn2 has forward hooks"),
        (lambda b: b.se.register_forward_hook(lambda *_: None), "se has forward hooks"),
        (lambda b: b.conv_pwl.register_full_backward_hook(lambda *_: None), "has backward hooks"),
        (_set("conv_exp", bias=nn.Parameter(torch.ones(3 * C))), "conv_exp has a bias"),
        (_set("conv_exp", dilation=(2, 2), padding=(2, 2)), "has dilation"),
        (_set("conv_exp", padding_mode="reflect"), "pads with 'reflect'"),
        (_set("conv_pwl", bias=nn.Parameter(torch.ones(C))), "conv_pwl has a bias"),
        (_set("bn1", act=nn.GELU()), "bn1.act is a GELU"),
        (_set("", bn1=GroupNormAct(3 * C, 4)), "bn1 is a GroupNormAct"),
        (_set("", se=timm.layers.EcaModule(3 * C)), "se is a EcaModule"),
        (_set("", aa=nn.AvgPool2d(3, 1, 1)), "aa is a AvgPool2d"),
        (_set("bn2", training=False), "some of its BNs normalise by the batch"),
    ],
)
def test_ineligible(change: Callable[[nn.Module], Any], reason: str) -> None:
    """A converted block that became ineligible runs its stock forward, to the bit, and says why."""
    stock, fused = make_blocks()
    for block in (stock.train(), fused.train()):
        change(block)
    (entry,) = report(fused)
    assert not entry.taken
    assert reason in entry.reason
    with Calls() as calls:
        ours = fused(images())
    assert calls.fused_mbconv == 0
    assert torch.equal(ours, stock(images()))


def test_groups_stay_stock() -> None:
    """A grouped convolution is no dense one."""
    block = EdgeResidual(C, C, exp_ratio=2.0, group_size=8)
    assert report(block)[0].reason == "conv_exp has 4 groups, not 1"


@pytest.mark.parametrize(
    ("settings", "module"),
    [
        ({"exp_ratio": 4.0}, {"expand_ratio": 4}),
        ({"exp_ratio": 3.0, "stride": 2, "pad_type": "same", "out_chs": 24, "exp_kernel_size": 5},
         {"expand_ratio": 3, "stride": 2, "padding": "same", "out_channels": 24, "kernel_size": 5}),
        ({"exp_ratio": 2.0, "se_layer": lambda *a, **k: SqueezeExcite(*a, rd_channels=4, **k)},
         {"expand_ratio": 2, "squeezed": 4}),
    ],
)  # fmt: skip
def test_module(settings: dict[str, Any], module: dict[str, Any]) -> None:
    """The module is timm's block: the same numbers from the same parameters, in their order."""
    stock, _ = make_blocks(**settings)
    block = FusedMBConv(C, module.pop("out_channels", C), **module)
    names = [name for name in stock.state_dict() if not name.endswith("num_batches_tracked")]
    own = [name for name in block.state_dict() if not name.endswith("num_batches_tracked")]
    with torch.no_grad():
        for name, other in zip(own, names, strict=True):
            block.state_dict()[name].copy_(stock.state_dict()[other])
    for training in (False, True):
        ours, theirs = (m.train(training)(images()) for m in (block, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.expand_bn.running_var, stock.bn1.running_var)
    assert block.expand_bn.num_batches_tracked == 1


def test_module_without_expansion() -> None:
    """One convolution, its BN and activation, drop path and the input."""
    block = FusedMBConv(C, C, expand_ratio=1, drop_path=0.5).train()
    assert block.project_conv is None
    x = images(batch=64)
    kept = (block(x) - x).flatten(1).abs().sum(1) > 0
    assert 0 < kept.sum() < 64
    assert "drop_path=0.5" in repr(block)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu"}, "activation: got 'gelu'"),
        ({"gate": "softmax"}, "gate: got 'softmax'"),
        ({"drop_path": 1.0}, r"drop_path: got 1\.0"),
        ({"expand_ratio": 1, "squeezed": 4}, "squeezed: got 4"),
    ],
)
def test_module_errors(settings: dict[str, Any], message: str) -> None:
    """Bad settings are named when the module is made."""
    with pytest.raises(ValueError, match=message):
        FusedMBConv(C, C, **settings)
