"""The network of any table."""

from __future__ import annotations

import effnet
import pytest
import torch

from effnet_kernels import use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(32, 1.0, 32), (16, 1.1, 16), (1280, 1.4, 1792), (24, 1.6, 40), (32, 0.25, 8), (16, 0.1, 8),
     (112, 1.8, 200)],
)  # fmt: skip
def test_width(channels: int, width: float, expected: int) -> None:
    """Multiples of 8, never more than a tenth below."""
    assert effnet.scale_channels(channels, width) == expected


def test_small_variant() -> None:
    """Any multiplier, image size and channel count; logits of the eager backend's."""
    torch.manual_seed(0)
    stages = effnet.scale_stages(effnet.VARIANTS["efficientnet_b0"].stages, 0.25, 0.3)
    model = effnet.EfficientNet(
        stages, 7, 1, stem_channels=8, head_channels=320, stem_stride=1
    ).eval()
    assert sum(p.numel() for p in model.parameters()) < 300_000
    images = torch.randn(2, 1, 17, 20)
    logits = model(images)
    assert logits.shape == (2, 7)
    with use_backend("eager"):
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
