"""Compound scaling: B0's to B1 to B7, the paper's other networks, and what FLOPs do."""

from __future__ import annotations

import effnet
import pytest
import torch
from effnet.baselines import BASELINES
from effnet.scaling import CompoundScaling, Scale, search_coefficients, single_axis

pytestmark = pytest.mark.usefixtures("one_thread")


def cost(name: str, scale: Scale) -> tuple[float, float]:
    """Millions of parameters and billions of multiply-adds."""
    baseline = scale.apply(BASELINES[name])
    with torch.device("meta"):
        model = baseline.build()
    parameters, multiply_adds = effnet.complexity(model, baseline.resolution)
    return parameters / 1e6, multiply_adds / 1e9


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("efficientnet_b0", 5.3, 0.39), ("mobilenet_v1", 4.2, 0.57), ("mobilenet_v2", 3.5, 0.3),
        ("resnet50", 25.6, 4.1),
    ],
)  # fmt: skip
def test_baselines(name: str, parameters: float, multiply_adds: float) -> None:
    """The papers' numbers."""
    assert cost(name, Scale()) == pytest.approx((parameters, multiply_adds), rel=0.03)


@pytest.mark.parametrize("number", range(1, 8))
def test_family_comes_out_of_b0(number: int) -> None:
    """B1 to B7 are B0 under the published multipliers, which compound scaling is near."""
    variant = effnet.VARIANTS[f"efficientnet_b{number}"]
    scale = Scale(variant.depth, variant.width, variant.resolution / 224)
    scaled = scale.apply(BASELINES["efficientnet_b0"])
    assert scaled.resolution == variant.resolution
    with torch.device("meta"):
        model, expected = scaled.build(), effnet.create_model(f"efficientnet_b{number}")
    ours = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in expected.state_dict().items()}
    # The authors rounded, and stepped phi by a half at first.
    phi = {1: 0.5, 2: 1, 3: 2, 4: 3.5, 5: 5, 6: 6, 7: 7}[number]
    assert CompoundScaling().at(phi) == pytest.approx(scale, rel=0.17)


# Billions of multiply-adds of arXiv:1905.11946, table 3.
TABLE_3 = [
    ("mobilenet_v1", Scale(width=2), 2.2), ("mobilenet_v1", Scale(resolution=2), 2.2),
    ("mobilenet_v1", Scale(1.4, 1.2, 1.3), 2.3),
    ("mobilenet_v2", Scale(depth=4), 1.2), ("mobilenet_v2", Scale(width=2), 1.1),
    ("mobilenet_v2", Scale(resolution=2), 1.2),
    ("resnet50", Scale(depth=4), 16.2), ("resnet50", Scale(width=2), 14.7),
    ("resnet50", Scale(resolution=2), 16.4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "scale", "billions"), TABLE_3)
def test_other_networks(name: str, scale: Scale, billions: float) -> None:
    """The same scaler on the paper's other networks."""
    assert cost(name, scale)[1] == pytest.approx(billions, rel=0.11)


@pytest.mark.parametrize("name", BASELINES)
def test_flops_double(name: str) -> None:
    """2 ** phi, but for the rounding of channels and layers; so does a single axis."""
    base = cost(name, Scale())[1]
    for phi in (2, 4):
        grown = cost(name, CompoundScaling().at(phi))[1] / base
        # Layers are rounded up, which is much where a stage has one or two.
        assert 0.95 <= grown / CompoundScaling().at(phi).flops <= 1.4
        assert grown == pytest.approx(2**phi, rel=0.35)
    for axis in ("depth", "width", "resolution"):
        scale = single_axis(axis, 4.0)
        assert scale.flops == pytest.approx(4.0)
        assert cost(name, scale)[1] / base == pytest.approx(4.0, rel=0.2)


@pytest.mark.parametrize("name", BASELINES)
def test_scaled_networks_run(name: str) -> None:
    """Forward and backward at a small resolution."""
    model = Scale(1.2, 0.25, 1.0).apply(BASELINES[name]).build(5)
    logits = model(torch.randn(2, 3, 33, 32))
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_search() -> None:
    """All points that double the FLOPs are scored; with the paper's taste its coefficients win."""
    seen = []

    def score(scale: Scale) -> float:
        seen.append(scale)
        target = CompoundScaling()
        return -sum(abs(a - b) for a, b in zip(scale, target, strict=True))

    candidates = search_coefficients(score)
    assert len(candidates) == len(seen) > 20
    assert all(1.8 <= scale.flops <= 2.2 for scale in seen)
    assert candidates[0].coefficients == pytest.approx(CompoundScaling())
    scores = [candidate.score for candidate in candidates]
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match=r"flops: got 100"):
        search_coefficients(score, flops=100)


def test_unknown_axis() -> None:
    """Is named."""
    with pytest.raises(ValueError, match=r"axis: got 'height', expected one of depth, width"):
        single_axis("height", 2)
