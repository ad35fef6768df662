"""The table of shapes against what the models really call."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from effnet_kernels.bench import shapes


@pytest.mark.parametrize("name", shapes.MODELS)
def test_shapes_are_those_of_the_models(name: str) -> None:
    """Every depthwise convolution of timm's model, in order, as often as it occurs."""
    seen: dict[tuple[int, int, int, int], int] = {}

    def hook(module: nn.Module, arguments: tuple[torch.Tensor], _: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        assert module.padding == (module.kernel_size[0] // 2,) * 2
        size = arguments[0].shape[2]
        key = (module.groups, size, module.kernel_size[0], module.stride[0])
        seen[key] = seen.get(key, 0) + 1

    size = shapes.MODELS[name].resolution
    with torch.device("meta"):
        model = timm.create_model(name)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.register_forward_hook(hook)
        model(torch.empty(1, 3, size, size))
    derived = shapes.depthwise_shapes(name)
    assert [(s.channels, s.size, s.kernel, s.stride) for s in derived] == list(seen)
    assert [s.count for s in derived] == list(seen.values())


def test_b0_has_sixteen() -> None:
    """The sixteen of EfficientNet-B0, twelve of them distinct."""
    derived = shapes.depthwise_shapes("efficientnet_b0")
    assert len(derived) == 12
    assert sum(shape.count for shape in derived) == 16
    assert str(derived[0]) == "32x112x112 k3s1"


def test_unknown_model() -> None:
    """The error lists the models."""
    with pytest.raises(ValueError, match="got 'resnet50', expected one of efficientnet_b0"):
        shapes.depthwise_shapes("resnet50")
