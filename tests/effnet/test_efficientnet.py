"""The network: its table, its parameters, and timm's weights in it."""

from __future__ import annotations

import copy

import effnet
import pytest
import timm
import torch
from effnet.efficientnet import drop_path, scale_channels
from stock_models import calibrate

from effnet_kernels import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


def test_parameters_of_b0() -> None:
    """The count everyone quotes, and timm's names map onto ours one to one."""
    model = effnet.efficientnet_b0()
    assert sum(p.numel() for p in model.parameters()) == 5_288_548
    renamed = effnet.from_timm_state_dict(timm.create_model("efficientnet_b0").state_dict())
    ours = model.state_dict()
    assert renamed.keys() == ours.keys()
    assert all(renamed[name].shape == tensor.shape for name, tensor in ours.items())


@pytest.mark.parametrize("variant", [("efficientnet_b0", 1.0, 1.0), ("efficientnet_b1", 1.0, 1.1)])
def test_same_outputs_as_timm(variant: tuple[str, float, float]) -> None:
    """timm's weights give timm's outputs, in evaluation and training."""
    name, width, depth = variant
    torch.manual_seed(0)
    stock = timm.create_model(name, num_classes=10)
    calibrate(stock, (4, 3, 64, 64))
    model = effnet.EfficientNet(10, width=width, depth=depth, dropout=0.0, drop_path=0.0)
    model.load_state_dict(effnet.from_timm_state_dict(copy.deepcopy(stock.state_dict())))
    images = torch.randn(4, 3, 64, 64)
    for training in (False, True):
        expected, output = stock.train(training)(images), model.train(training)(images)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    statistics = effnet.from_timm_state_dict(stock.state_dict())
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, statistics[key], rtol=1e-3, atol=1e-3)


def test_unknown_weights_are_an_error() -> None:
    """A key of another model is named."""
    with pytest.raises(ValueError, match=r"'blocks\.0\.0\.conv_exp\.weight'"):
        effnet.from_timm_state_dict({"blocks.0.0.conv_exp.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.0, 32), (16, 1.1, 16), (1280, 1.4, 1792), (24, 1.6, 40), (32, 0.25, 8), (16, 0.1, 8),
     (112, 1.8, 200)],
)  # fmt: skip
def test_width(channels: int, width: float, expected: int) -> None:
    """Multiples of 8, never more than a tenth below."""
    assert scale_channels(channels, width) == expected


def test_small_variant() -> None:
    """Any multiplier, image size and channel count; logits of the eager backend's."""
    torch.manual_seed(0)
    model = effnet.EfficientNet(7, 1, width=0.25, depth=0.3, stem_stride=1).eval()
    assert sum(p.numel() for p in model.parameters()) < 300_000
    images = torch.randn(2, 1, 17, 20)
    logits = model(images)
    assert logits.shape == (2, 7)
    with use_backend("eager"):
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)


def test_drop_path() -> None:
    """Whole samples go, the others grow, the mean stays; nothing happens in evaluation."""
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 1, 1)
    y = drop_path(x, 0.25, True)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert torch.equal(y[:, 0], y[:, 1])
    assert abs(y.mean().item() - 1) < 0.05
    assert drop_path(x, 0.25, False) is x
    rates = [block.drop_path for block in effnet.efficientnet_b0().blocks]
    assert rates[0] == 0
    assert rates == sorted(rates)
