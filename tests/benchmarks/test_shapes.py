"""The tables of shapes against what the models really call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
)
from torch import nn

from effnet_kernels.bench import shapes

Call = tuple[str, nn.Module, int, Any]


@pytest.fixture(scope="module", params=[*shapes.MODELS, "efficientnetv2_s@384"])
def calls(request: pytest.FixtureRequest) -> tuple[str, list[Call]]:
    """A model as it is asked for, and of each call (name, module, size of the input, the block
    around it).
    """
    found: list[Call] = []
    timms_name, _, size = request.param.partition("@")
    pixels = int(size or shapes.MODELS[timms_name].resolution)
    with torch.device("meta"):
        model = timm.create_model(timms_name)
        block = None
        for name, module in model.named_modules():
            if name.count(".") == 2 and name.startswith("blocks"):
                block = module
            inside = block if name.startswith("blocks") else None

            def hook(
                module: nn.Module, arguments: tuple[torch.Tensor], _: torch.Tensor,
                name: str = name, inside: Any = inside,
            ) -> None:  # fmt: skip
                if arguments[0].ndim == 4:
                    found.append((name, module, arguments[0].shape[2], inside))

            module.register_forward_hook(hook)
        model(torch.empty(1, 3, pixels, pixels))
    return request.param, found


def counted(name: str, seen: Iterator[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Distinct shapes as ``astuple`` has them, in order, with the model and the count."""
    return [(name, *shape, count) for shape, count in Counter(seen).items()]


def tuples(table: list[Any]) -> list[tuple[Any, ...]]:
    return [astuple(shape) for shape in table]


def squeezed(block: Any) -> int:
    assert type(block.se) is SqueezeExcite
    return block.se.conv_reduce.out_channels


def test_depthwise(calls: tuple[str, list[Call]]) -> None:
    """Every depthwise convolution of timm's model, in order, as often as it occurs."""
    name, found = calls

    def seen() -> Iterator[tuple[Any, ...]]:
        for _, module, size, _ in found:
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                assert module.padding == (module.kernel_size[0] // 2,) * 2
                yield module.groups, size, module.kernel_size[0], module.stride[0]

    assert tuples(shapes.depthwise_shapes(name)) == counted(name, seen())


def test_mbconv(calls: tuple[str, list[Call]]) -> None:
    """Every block with a depthwise convolution."""
    name, found = calls

    def seen() -> Iterator[tuple[Any, ...]]:
        for _, block, size, _ in found:
            if type(block) in (DepthwiseSeparableConv, InvertedResidual):
                first = block.conv_dw if type(block) is DepthwiseSeparableConv else block.conv_pw
                last = block.conv_pw if type(block) is DepthwiseSeparableConv else block.conv_pwl
                yield (
                    first.in_channels, block.conv_dw.out_channels, last.out_channels,
                    squeezed(block), size, block.conv_dw.kernel_size[0], block.conv_dw.stride[0],
                    block.has_skip,
                )  # fmt: skip

    assert tuples(shapes.mbconv_shapes(name)) == counted(name, seen())


def test_fused_mbconv(calls: tuple[str, list[Call]]) -> None:
    """Every block without one, those that are a single convolution too."""
    name, found = calls

    def seen() -> Iterator[tuple[Any, ...]]:
        for _, block, size, _ in found:
            if type(block) in (ConvBnAct, EdgeResidual):
                first = block.conv if type(block) is ConvBnAct else block.conv_exp
                last = block.conv if type(block) is ConvBnAct else block.conv_pwl
                assert first.padding == (first.kernel_size[0] // 2,) * 2
                assert type(block) is ConvBnAct or type(block.se) is nn.Identity
                assert last is first or last.kernel_size == (1, 1)
                yield (
                    first.in_channels, first.out_channels, last.out_channels, size,
                    first.kernel_size[0], first.stride[0], block.has_skip,
                )  # fmt: skip

    assert tuples(shapes.fused_mbconv_shapes(name)) == counted(name, seen())


def test_pointwise(calls: tuple[str, list[Call]]) -> None:
    """Every 1x1 convolution but those of squeeze-and-excitation, and what is around it."""
    name, found = calls

    def seen() -> Iterator[tuple[Any, ...]]:
        for path, module, size, block in found:
            if not isinstance(module, nn.Conv2d) or module.kernel_size != (1, 1) or ".se." in path:
                continue
            assert (module.stride, module.bias) == ((1, 1), None)
            role = "head"
            if block is not None:
                first = path.endswith("conv_pw") and type(block) is InvertedResidual
                role = "expand" if first else "project"
            gate = role == "project" and type(block.se) is SqueezeExcite
            residual = role == "project" and block.has_skip
            yield role, module.in_channels, module.out_channels, size, gate, residual

    assert tuples(shapes.pointwise_shapes(name)) == counted(name, seen())


def test_squeeze_excite(calls: tuple[str, list[Call]]) -> None:
    """Every squeeze-and-excitation."""
    name, found = calls

    def seen() -> Iterator[tuple[Any, ...]]:
        for _, module, size, block in found:
            if type(module) is SqueezeExcite:
                yield module.conv_expand.out_channels, squeezed(block), size

    assert tuples(shapes.squeeze_excite_shapes(name)) == counted(name, seen())


def test_norms(calls: tuple[str, list[Call]]) -> None:
    """Every BN, with its activation and whether it is a block's last before a residual."""
    name, found = calls

    def seen() -> Iterator[tuple[Any, ...]]:
        for _, module, size, block in found:
            if type(module) is BatchNormAct2d:
                last = block is not None and module is norms_of(block)[-1]
                activation = "silu" if type(module.act) is nn.SiLU else "identity"
                assert type(module.act) in (nn.SiLU, nn.Identity)
                yield module.num_features, size, activation, last and block.has_skip

    def norms_of(block: nn.Module) -> list[nn.Module]:
        return [m for m in block.modules() if type(m) is BatchNormAct2d]

    assert tuples(shapes.norm_shapes(name)) == counted(name, seen())


def test_b0_has_sixteen() -> None:
    """The sixteen of EfficientNet-B0, twelve of them distinct."""
    derived = shapes.depthwise_shapes("efficientnet_b0")
    assert len(derived) == 12
    assert sum(shape.count for shape in derived) == 16
    assert str(derived[0]) == "32x112x112 k3s1"
    blocks = shapes.mbconv_shapes("efficientnet_b0")
    assert sum(block.count for block in blocks) == 16
    assert str(blocks[1]) == "16-96-24 112x112 k3s2"


def test_v2_s_has_ten() -> None:
    """The Fused-MBConv blocks of EfficientNetV2-S by hand: 2, 4 and 4, five of them distinct."""
    blocks = shapes.fused_mbconv_shapes("efficientnetv2_s")
    assert [(str(block), block.residual, block.count) for block in blocks] == [
        ("24-24 150x150 k3s1", True, 2),
        ("24-96-48 150x150 k3s2", False, 1),
        ("48-192-48 75x75 k3s1", True, 3),
        ("48-192-64 75x75 k3s2", False, 1),
        ("64-256-64 38x38 k3s1", True, 3),
    ]
    assert [block.expands for block in blocks] == [False, True, True, True, True]
    larger = shapes.fused_mbconv_shapes("efficientnetv2_s@384")
    assert [block.size for block in larger] == [192, 192, 96, 96, 48]
    assert {block.model for block in larger} == {"efficientnetv2_s@384"}
    assert not shapes.fused_mbconv_shapes("efficientnet_b0")


@pytest.mark.parametrize("name", shapes.MODELS)
def test_cases_are_distinct(name: str) -> None:
    """The words for a shape, and what the mode says of it, name no other of the model."""
    for table in (
        shapes.fused_mbconv_shapes(name),
        shapes.mbconv_shapes(name),
        shapes.depthwise_shapes(name),
        shapes.squeeze_excite_shapes(name),
        [(s.role, s) for s in shapes.pointwise_shapes(name)],
        [(s.residual, s) for s in shapes.norm_shapes(name)],
    ):
        words = [" ".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in table]
        assert len(set(words)) == len(words)


def test_unknown_model() -> None:
    """The error lists the models."""
    with pytest.raises(ValueError, match="got 'resnet50', expected one of efficientnet_b0"):
        shapes.depthwise_shapes("resnet50")
    with pytest.raises(ValueError, match="got size 'big' of efficientnet_b0"):
        shapes.depthwise_shapes("efficientnet_b0@big")
