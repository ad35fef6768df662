"""``convert``, ``restore`` and ``report`` on whole models of timm and others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from accuracy import FORWARD, GRADIENT
from fused_calls import Calls
from stock_models import calibrate
from timm.layers import convert_sync_batchnorm
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn

import effnet_kernels
from effnet_kernels import convert, report, restore

MODELS = {
    "efficientnet_b0": (16, 3),
    "efficientnet_b4": (32, 3),
    "mobilenetv2_100": (17, 3),
    "mobilenetv3_large_100": (15, 2),
    "tf_efficientnet_b0": (16, 3),
    "mnasnet_100": (17, 3),
    "tf_efficientnetv2_b0": (21, 3),
}
"""Models, how many blocks of each are one op, and how many stems and heads are taken."""
SHAPE = (4, 3, 64, 64)

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(name: str, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **settings)
    calibrate(model, SHAPE)
    return model


def step(model: nn.Module, images: Tensor, training: bool) -> dict[str, Tensor]:
    """The logits, and the gradients of a loss of them, by name."""
    model.train(training)
    images = images.detach().requires_grad_()
    logits = model(images)
    cotangent = torch.linspace(-1, 1, logits.numel()).to(logits).view_as(logits)
    names = ["images", *(name for name, _ in model.named_parameters())]
    grads = torch.autograd.grad(logits, [images, *model.parameters()], cotangent)
    return {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}


def relative_errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Norm of the error over the norm, of each tensor.

    Some gradients are zero but for rounding (of a bias before a convolution and BN, say): a tensor
    counts as at least a thousandth of the middle one, element by element.
    """
    sizes = {name: tensor.square().mean().sqrt() for name, tensor in exact.items()}
    least = 1e-3 * torch.stack(list(sizes.values())).median()
    return {
        name: (
            (results[name].double() - exact[name]).square().mean().sqrt() / max(size, least)
        ).item()
        for name, size in sizes.items()
    }


def assert_model_error_rule(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], kink: float
) -> None:
    """The error rule for a whole network.

    An error of rounding in one layer is carried through all the others, and which way it goes is
    chance, for eager as for us; so single numbers say little. The rule holds for the logits in norm
    (2x) and for the norm over all gradients, each tensor's weighed equally (3x). A tensor alone may
    have 3x of what eager has on it or, where eager was lucky, of what eager has on the middle one.

    The derivative of ReLU jumps: a value that rounding moves across a kink gives or takes a whole
    term of the gradients, in the one run or the other. ``kink`` is what that may come to; the tests
    of single blocks hold ReLU to the rule.
    """
    mine, theirs = relative_errors(ours, exact), relative_errors(eager, exact)
    logits = mine.pop("logits"), theirs.pop("logits")
    assert logits[0] <= FORWARD * logits[1], logits
    assert norm(mine) <= max(GRADIENT * norm(theirs), kink * len(mine) ** 0.5)
    middle = torch.tensor(list(theirs.values())).median().item()
    worse = {
        name: (error, theirs[name])
        for name, error in mine.items()
        if error > max(GRADIENT * theirs[name], GRADIENT * middle, kink)
    }
    assert not worse, (worse, middle)


def norm(errors: dict[str, float]) -> float:
    return torch.tensor(list(errors.values())).norm().item()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, device: str) -> None:
    """Logits, every gradient and every buffer, in evaluation and training, and the way back."""
    stock = make_model(name).to(device)
    exact = copy.deepcopy(stock).double()
    fused = copy.deepcopy(stock)
    state = fused.state_dict()
    assert convert(fused) is fused
    blocks, others = MODELS[name]
    assert report(fused).taken == len(report(fused)) == blocks + others
    assert_same_state(fused, state)

    # Channels-last for both: PyTorch's own BN sums differently in the other layout.
    torch.manual_seed(1)
    images = torch.randn(SHAPE).to(device, memory_format=torch.channels_last)
    kink = 0.0 if "efficientnet" in name else 0.03
    for training in (False, True):
        results = [
            step(model, images.to(next(model.parameters()).dtype), training)
            for model in (fused, stock, exact)
        ]
        assert_model_error_rule(*results, kink)
        if not training:
            with torch.no_grad(), Calls() as calls:
                results[0] = results[0] | {"logits": fused(images)}
            # One op runs the head's two of the three.
            ends = 2 if others == 3 else others
            ours = calls.whole + calls.fused_mbconv + calls.normalised + calls.pointwise
            assert ours == blocks + ends
            assert_model_error_rule(*results, kink)
    assert_buffers(fused, stock, exact)

    assert restore(fused) is fused
    assert [type(m) for m in fused.modules()] == [type(m) for m in stock.modules()]
    assert_same_state(fused, state)
    assert torch.equal(fused.eval()(images), copy_state(stock, fused).eval()(images))


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """The same keys in the same order over the same memory."""
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())


def copy_state(model: nn.Module, source: nn.Module) -> nn.Module:
    model.load_state_dict(source.state_dict())
    return model


def assert_buffers(ours: nn.Module, eager: nn.Module, exact: nn.Module) -> None:
    """Running statistics by the error rule over all of them, counts exactly."""
    mine, theirs, truth = (dict(model.named_buffers()) for model in (ours, eager, exact))
    for name in list(truth):
        if not truth[name].is_floating_point():
            assert torch.equal(mine[name], truth.pop(name)), name
    assert norm(relative_errors(mine, truth)) <= FORWARD * norm(relative_errors(theirs, truth))


def test_training_steps() -> None:
    """Three steps of SGD: parameters, running statistics and counts move as the stock model's."""
    stock = make_model("efficientnet_b0", drop_path_rate=0.2, drop_rate=0.2)
    models = [convert(copy.deepcopy(stock)), stock, copy.deepcopy(stock).double()]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        dtype = next(model.parameters()).dtype
        for index in range(3):
            torch.manual_seed(index)  # the same samples dropped
            images = torch.randn(SHAPE).contiguous(memory_format=torch.channels_last)
            loss = model.train()(images.to(dtype)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_buffers(*models)
    mine, theirs, truth = (dict(model.named_parameters()) for model in models)
    assert norm(relative_errors(mine, truth)) <= GRADIENT * norm(relative_errors(theirs, truth))


def test_disable_is_bit_identical(monkeypatch: pytest.MonkeyPatch) -> None:
    """``EFFNET_KERNELS_DISABLE=1`` turns a converted model back into the stock one, to the bit."""
    stock = make_model("efficientnet_b0")
    fused = convert(copy.deepcopy(stock))
    monkeypatch.setattr(effnet_kernels.backends, "_disabled", True)
    images = torch.randn(SHAPE)
    for training in (False, True):
        with Calls() as calls:
            ours = step(fused, images, training)
        assert calls.fused == 0
        for name, tensor in step(stock, images, training).items():
            assert torch.equal(ours[name], tensor), name
    assert {entry.reason for entry in report(fused)} == {"EFFNET_KERNELS_DISABLE is set"}


def test_features_only() -> None:
    """timm's feature extractors work, those by hooks on the expansion too.

    In float64: element by element, float32's rounding in the last stages is above any tolerance
    that would tell a wrong feature from a right one.
    """
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for settings in ({}, {"feature_location": "expansion"}):
        torch.manual_seed(0)
        stock = timm.create_model("efficientnet_b0", features_only=True, **settings)
        calibrate(stock, (2, 3, 64, 64))
        fused = convert(copy.deepcopy(stock.double()))
        with torch.no_grad(), Calls() as calls:
            ours, expected = fused.eval()(images), stock.eval()(images)
        assert calls.fused > 10
        assert len(ours) == len(expected) == 5
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_synchronised_bn_goes_stock() -> None:
    """After timm's SyncBN conversion every block runs its stock forward."""
    stock = make_model("efficientnet_b0")
    fused = convert_sync_batchnorm(convert(copy.deepcopy(stock)))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), Calls() as calls:
        output = fused.eval()(images)
    assert calls.fused == calls.normalised == 0
    assert report(fused).taken == 0
    torch.testing.assert_close(output, convert_sync_batchnorm(stock).eval()(images))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout: torch.memory_format) -> None:
    """NCHW and channels-last models both."""
    stock = make_model("mobilenetv3_large_100").to(memory_format=layout).eval()
    fused = convert(copy.deepcopy(stock))
    images = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    with torch.no_grad():
        torch.testing.assert_close(fused(images), stock(images), rtol=1e-3, atol=1e-3)


def test_convert_again_and_restore_again() -> None:
    """Converting or restoring twice changes nothing."""
    model = timm.create_model("mobilenetv2_100")
    stock = [type(m) for m in model.modules()]
    convert(model)
    once = [type(m) for m in model.modules()]
    convert(model, strict=True)
    assert [type(m) for m in model.modules()] == once != stock
    restore(restore(model))
    assert [type(m) for m in model.modules()] == stock
    assert {entry.reason for entry in report(model)} == {"not converted"}


def test_block_alone() -> None:
    """The model may be a block itself."""
    block = convert(InvertedResidual(16, 16), strict=True)
    assert isinstance(block, InvertedResidual)
    assert report(block).taken == 1
    assert type(restore(block)) is InvertedResidual


def test_filter() -> None:
    """``filter_fn`` sees names and modules, and what it refuses stays stock."""
    seen = {}

    def last_stages(name: str, module: nn.Module) -> bool:
        seen[name] = type(module)
        return name.startswith("blocks.6")

    model = convert(timm.create_model("efficientnet_b0"), filter_fn=last_stages, strict=True)
    assert [entry.name for entry in report(model) if entry.taken] == ["blocks.6.0"]
    assert seen["blocks.0.0"] is DepthwiseSeparableConv
    assert len(seen) == 19
    with pytest.warns(UserWarning, match="no block .* filter_fn admits"):
        convert(model, filter_fn=lambda name, module: False)


def test_strict_names_what_is_left() -> None:
    """``strict`` raises with each block and reason, and converts nothing then."""
    model = timm.create_model("mobilenetv4_conv_small")
    with pytest.raises(ValueError, match=r"timm's UniversalInvertedResidual is not supported") as e:
        convert(model, strict=True)
    assert "blocks.0.0" not in str(e.value)
    assert report(model).taken == 0
    convert(model)
    table = report(model)
    assert 0 < table.taken < len(table)


def test_nothing_to_convert() -> None:
    """A model without any such block: a warning, an error if ``strict``."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.warns(UserWarning, match="nothing in this Sequential can be converted"):
        assert convert(model) is model
    with pytest.raises(ValueError, match="nothing in this Sequential can be converted"):
        convert(model, strict=True)
    assert report(model) == []
    assert str(report(model)).endswith("0 of 0 fused")


@pytest.mark.parametrize("function", [convert, restore, report])
def test_no_module(function) -> None:
    """A non-module is named."""
    with pytest.raises(TypeError, match="model: got str"):
        function("efficientnet_b0")
    with pytest.raises(TypeError, match="filter_fn: got str"):
        convert(nn.Identity(), filter_fn="blocks")


class Overridden(InvertedResidual):
    """Someone's block with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@pytest.mark.parametrize("strange", ["subclass", "patched"])
def test_other_forwards_stay(strange: str) -> None:
    """A subclass, or a block whose forward was replaced, keeps its forward."""
    model = timm.create_model("efficientnet_b0")
    block = model.blocks[2][1]
    if strange == "subclass":
        block.__class__ = Overridden
        reason = "Overridden is a subclass of InvertedResidual"
    else:
        block.forward = InvertedResidual.forward.__get__(block)
        reason = "it has a forward of its own"
    before = type(block)
    with pytest.raises(ValueError, match=rf"1 of 19 blocks: blocks\.2\.1: {reason}"):
        convert(model, strict=True)
    assert type(convert(model).blocks[2][1]) is before
    assert report(model).taken == 18


def test_report_covers_every_family() -> None:
    """What is not supported is listed and said to be so; the report prints as a table."""
    expected = {
        "cs3darknet_s": set(),
        "efficientnet_cc_b0_4e": {"CondConvResidual"},
        "mobilenetv4_conv_small": {"UniversalInvertedResidual"},
        "efficientnet_es": set(),
    }
    for name, classes in expected.items():
        refused = {
            e.class_name: e.reason
            for e in report(timm.create_model(name))
            if e.reason != "not converted"
        }
        assert refused.keys() == classes
        for class_name, reason in refused.items():
            assert reason == f"timm's {class_name} is not supported"
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.mobilenet_v3_small()
    lines = str(report(model)).splitlines()
    assert any("torchvision's InvertedResidual is not supported" in line for line in lines)
    assert lines[-1].startswith("0 of ")
    assert all(e.reason == "not converted" for e in report(torchvision.models.efficientnet_v2_s()))
    with pytest.warns(UserWarning, match="nothing in this MobileNetV3 can be converted"):
        convert(model)


def test_exported_names() -> None:
    """The three are the package's own, without timm."""
    for name in ("convert", "restore", "report"):
        assert name in effnet_kernels.__all__
