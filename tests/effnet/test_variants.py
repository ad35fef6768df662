"""Every member of the family: its size, its weights under other libraries' names, its outputs."""

from __future__ import annotations

import copy
from typing import Any

import effnet
import pytest
import timm
import torch
import torchvision
from stock_models import calibrate
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

# Millions of parameters and billions of multiply-adds: arXiv:1905.11946, table 2 and (B8, L2)
# arXiv:1911.09665 and 1911.04252; arXiv:2104.00298, tables 7 and 9.
PUBLISHED = {
    "efficientnet_b0": (5.3, 0.39), "efficientnet_b1": (7.8, 0.70), "efficientnet_b2": (9.2, 1.0),
    "efficientnet_b3": (12, 1.8), "efficientnet_b4": (19, 4.2), "efficientnet_b5": (30, 9.9),
    "efficientnet_b6": (43, 19), "efficientnet_b7": (66, 37), "efficientnet_b8": (87, 63),
    "efficientnet_l2": (480, 476),
    "efficientnetv2_b0": (7.1, 0.72), "efficientnetv2_b1": (8.1, 1.2),
    "efficientnetv2_b2": (10.1, 1.7), "efficientnetv2_b3": (14.4, 3.0),
    "efficientnetv2_s": (22, 8.8), "efficientnetv2_m": (54, 24), "efficientnetv2_l": (120, 53),
    "efficientnetv2_xl": (208, 94),
}  # fmt: skip
# timm's V2-B are TensorFlow's alone.
TIMM = {name: name if "v2_b" not in name else f"tf_{name}" for name in effnet.VARIANTS}
TORCHVISION = {
    **{f"efficientnet_b{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"efficientnetv2_{size}": f"efficientnet_v2_{size}" for size in "sml"},
}
SMALL = ("efficientnet_b0", "efficientnet_b2", "efficientnetv2_b0", "efficientnetv2_b2")


def on_meta(create: Any, *arguments: Any, **settings: Any) -> Any:
    """A model without memory."""
    with torch.device("meta"):
        return create(*arguments, **settings)


def shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def test_all_are_published() -> None:
    """No variant without its numbers."""
    assert PUBLISHED.keys() == effnet.VARIANTS.keys()


@pytest.mark.parametrize("name", effnet.VARIANTS)
def test_complexity(name: str) -> None:
    """The papers' numbers within their rounding, and a few per cent where they counted otherwise
    than the networks that they released compute.
    """
    model = on_meta(effnet.create_model, name)
    parameters, multiply_adds = effnet.complexity(model, effnet.VARIANTS[name].resolution)
    millions, billions = PUBLISHED[name]
    assert parameters / 1e6 == pytest.approx(millions, rel=0.03)
    assert multiply_adds / 1e9 == pytest.approx(billions, rel=0.07)


@pytest.mark.parametrize("name", effnet.VARIANTS)
def test_timm_weights(name: str) -> None:
    """Every weight of timm's has a place, and the way back."""
    model, stock = on_meta(effnet.create_model, name), on_meta(timm.create_model, TIMM[name])
    renamed = effnet.from_timm(model, stock.state_dict())
    assert shapes(renamed) == shapes(model.state_dict())
    assert shapes(effnet.to_timm(model)) == shapes(stock.state_dict())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_weights(name: str) -> None:
    """Likewise torchvision's."""
    create = getattr(torchvision.models, TORCHVISION[name])
    model, stock = on_meta(effnet.create_model, name), on_meta(create)
    renamed = effnet.from_torchvision(model, stock.state_dict())
    assert shapes(renamed) == shapes(model.state_dict())
    assert shapes(effnet.to_torchvision(model)) == shapes(stock.state_dict())


def check_outputs(model: nn.Module, stock: nn.Module) -> None:
    """The same logits in evaluation and with batch statistics."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for training in (False, True):
        with torch.no_grad():
            expected, output = stock.train(training)(images), model.train(training)(images)
        # Of a logit that is small beside the others, most digits are cancelled.
        largest = expected.abs().max().item()
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3 * max(1, largest / 10))


@pytest.mark.parametrize("name", [*SMALL, "efficientnetv2_s"])
@pytest.mark.parametrize("tensorflow", [False, True], ids=["symmetric", "same"])
def test_outputs_are_timms(name: str, tensorflow: bool) -> None:
    """With timm's weights, in either way to pad."""
    stock_name = TIMM[name] if "v2_b" in name or not tensorflow else f"tf_{name}"
    tensorflow = stock_name.startswith("tf_")
    torch.manual_seed(0)
    stock = timm.create_model(stock_name, num_classes=10, drop_path_rate=0.0, drop_rate=0.0)
    calibrate(stock, (4, 3, 64, 64))
    settings: dict[str, Any] = {"padding": "same", "eps": 1e-3} if tensorflow else {}
    model = effnet.create_model(name, 10, drop_rate=0.0, drop_path_rate=0.0, **settings)
    model.load_state_dict(effnet.from_timm(model, copy.deepcopy(stock.state_dict())))
    check_outputs(model, stock)


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnetv2_s"])
def test_outputs_are_torchvisions(name: str) -> None:
    """With torchvision's weights."""
    torch.manual_seed(0)
    create = getattr(torchvision.models, TORCHVISION[name])
    stock = create(num_classes=10, dropout=0.0, stochastic_depth_prob=0.0)
    calibrate(stock, (4, 3, 64, 64))
    eps = 1e-3 if "v2" in name else 1e-5
    model = effnet.create_model(name, 10, drop_rate=0.0, drop_path_rate=0.0, eps=eps)
    model.load_state_dict(effnet.from_torchvision(model, copy.deepcopy(stock.state_dict())))
    check_outputs(model, stock)


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnetv2_s"])
def test_features_are_timms(name: str) -> None:
    """The maps of each resolution, with their channels and reductions."""
    torch.manual_seed(0)
    stock = timm.create_model(name)
    calibrate(stock, (4, 3, 64, 64))
    model = effnet.create_model(name)
    model.load_state_dict(effnet.from_timm(model, stock.state_dict()))
    features = effnet.Features(model).eval()
    expected = timm.create_model(name, features_only=True).eval()
    expected.load_state_dict(stock.state_dict(), strict=False)
    images = torch.randn(2, 3, 65, 64)
    with torch.no_grad():
        ours, theirs = features(images), expected(images)
    assert features.channels == expected.feature_info.channels()
    assert features.reductions == expected.feature_info.reduction()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-3)


def test_settings() -> None:
    """What create_model passes on."""
    model = effnet.create_model(
        "efficientnet_b0", 0, 1, drop_rate=0.5, drop_path_rate=0.1, stem_stride=1
    )
    assert model.drop_rate == 0.5
    rates = [block.drop_path for stage in model.stages for block in stage]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1 * 15 / 16)
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 1, 17, 20)).shape == (2, 1280)
    features = effnet.create_model("efficientnet_b0", features_only=True)
    assert features.reductions == [2, 4, 8, 16, 32]
    assert effnet.create_model("efficientnet_b3").drop_rate == 0.3


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, r"there is no 'blocks\.0\.0\.bn2\.weight'.*another variant's"),
        ("classifier.weight", r"'classifier\.weight' is \(10, 1280\), expected \(1000, 1280\)"),
        ("more", "got 'more', which timm's model of this variant does not have"),
    ],
)
def test_other_weights_are_an_error(key: str | None, message: str) -> None:
    """One line that names a key."""
    model = on_meta(effnet.create_model, "efficientnet_b0")
    weights = effnet.to_timm(model)
    if key is None:
        del weights["blocks.0.0.bn2.weight"]
    else:
        weights[key] = torch.empty(10, 1280, device="meta")
    with pytest.raises(ValueError, match=message) as error:
        effnet.from_timm(model, weights)
    assert "\n" not in str(error.value)


def test_unknown_model_is_an_error() -> None:
    """One line with the nearest names."""
    with pytest.raises(ValueError, match=r"there is no model 'efficientnet_b9'.*efficientnet_b8"):
        effnet.create_model("efficientnet_b9")
