"""Prepared stages and networks by themselves: against the ops they stand in for, and misuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effnet_kernels import extension
from effnet_kernels.ops import ConvBn, SqueezeExcite, fused_mbconv, mbconv, pointwise_conv_bn_act
from effnet_kernels.ops.prepared import (
    PreparedNetwork,
    PreparedStage,
    prepare_average_pool,
    prepare_fused_mbconv,
    prepare_linear,
    prepare_mbconv,
    prepare_pointwise_conv_bn_act,
)

pytestmark = pytest.mark.skipif(
    extension.CPU_MISSING is not None, reason=str(extension.CPU_MISSING)
)


def conv_bn(*shape: int, activation: str = "silu") -> ConvBn:
    """A convolution of this weight's shape; a plain BN, which float32 and float16 take alike."""
    channels = shape[0]
    fan_in = torch.Size(shape[1:]).numel()
    return ConvBn(
        torch.randn(shape) / fan_in**0.5,
        torch.randn(channels) / 4,
        torch.rand(channels) + 0.5,
        torch.rand(channels) + 0.5,
        torch.randn(channels) / 4,
        1e-3,
        activation,
    )


def squeeze_excite(channels: int, squeezed: int) -> SqueezeExcite:
    return SqueezeExcite(
        torch.randn(squeezed, channels) / channels**0.5,
        torch.randn(squeezed),
        torch.randn(channels, squeezed) / squeezed**0.5,
        torch.randn(channels),
        "silu",
        "sigmoid",
    )


BLOCKS = {
    "expanded": (conv_bn(44, 11, 1, 1), 44, 5, 1, "same", True),
    "not expanded": (None, 11, 3, 2, 1, False),
    "asymmetric": (conv_bn(66, 11), 66, 3, 2, (0, 1, 0, 1), False),
}
"""Expansion, its width, kernel size, stride, padding and residual."""


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("gated", [False, True])
def test_mbconv(block: str, gated: bool) -> None:
    """The op's bits, at any extent, from one packing."""
    expand, width, kernel, stride, padding, residual = BLOCKS[block]
    torch.manual_seed(0)
    arguments = (
        expand,
        conv_bn(width, 1, kernel, kernel),
        squeeze_excite(width, 5) if gated else None,
        conv_bn(11, width, 1, 1, activation="identity"),
        stride,
        padding,
    )
    network = PreparedNetwork([prepare_mbconv(*arguments, residual=residual)])
    for shape in ((2, 11, 19, 23), (1, 11, 7, 6), (3, 11, 40, 31)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(network(x), mbconv(x, *arguments, residual=residual))


@pytest.mark.parametrize("projects", [False, True])
def test_fused_mbconv(projects: bool) -> None:
    """The op's bits, likewise."""
    torch.manual_seed(0)
    expand = conv_bn(29, 11, 3, 3)
    project = conv_bn(11, 29, 1, 1, activation="identity") if projects else None
    for stride in (1, 2):
        residual = projects and stride == 1
        stage = prepare_fused_mbconv(expand, project, stride, "same", residual=residual)
        for shape in ((2, 11, 19, 23), (1, 11, 7, 6), (3, 11, 40, 31)):
            x = torch.randn(shape)
            with torch.no_grad():
                expected = fused_mbconv(x, expand, None, project, stride, "same", residual=residual)
                assert torch.equal(PreparedNetwork([stage])(x), expected)


def test_pointwise_pool_linear() -> None:
    """A head: the 1x1 convolution, the mean of pixels, two layers of vectors."""
    torch.manual_seed(0)
    head = conv_bn(50, 11, 1, 1)
    first, second = (torch.randn(37, 50), torch.randn(37)), (torch.randn(9, 37), None)
    network = PreparedNetwork(
        [
            prepare_pointwise_conv_bn_act(head),
            prepare_average_pool(50, torch.float32),
            prepare_linear(*first, "hardswish"),
            prepare_linear(*second),
        ]
    )
    x = torch.randn(5, 11, 7, 9)
    with torch.no_grad():
        y = pointwise_conv_bn_act(x, *head).output
        assert torch.equal(network.features(x), y)
        z = torch.nn.functional.hardswish(torch.nn.functional.linear(y.mean((2, 3)), *first))
        expected = torch.nn.functional.linear(z, second[0])
        torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
    assert network.pools
    assert not network.features.pools


def some_network() -> PreparedNetwork:
    torch.manual_seed(0)
    return PreparedNetwork([prepare_pointwise_conv_bn_act(conv_bn(8, 6, 1, 1))])


@pytest.mark.parametrize(
    ("input", "error", "message"),
    [
        ("x", TypeError, "input: got str, expected a Tensor"),
        (torch.zeros(1, 6, 4), ValueError, "input: got 3 dimensions"),
        (torch.zeros(1, 5, 4, 4), ValueError, "input: got 5 channels, expected 6"),
        (torch.zeros(1, 6, 4, 4).double(), TypeError, "input: got torch.float64, expected torch"),
        (torch.zeros(1, 6, 4, 4, device="meta"), ValueError, "on meta, expected one on the CPU"),
    ],
    ids=["type", "rank", "channels", "dtype", "device"],
)
def test_wrong_inputs(input: Tensor, error: type[Exception], message: str) -> None:
    """Named before anything runs."""
    with pytest.raises(error, match=message):
        some_network()(input)


def test_gradients_are_an_error() -> None:
    """There is no derivative, and no silence about it."""
    with pytest.raises(RuntimeError, match="has no derivative"):
        some_network()(torch.zeros(1, 6, 4, 4, requires_grad=True))


def test_too_small_an_image() -> None:
    """An image without a window at some stage."""
    torch.manual_seed(0)
    network = PreparedNetwork([prepare_fused_mbconv(conv_bn(8, 6, 3, 3), None, 1, 0)])
    with pytest.raises(ValueError, match="input: got 2 x 5 pixels, expected at least 3 x 3"):
        network(torch.zeros(1, 6, 2, 5))


def test_stages_that_do_not_fit() -> None:
    """Stages of other channels, and bytes that no prepare op made."""
    torch.manual_seed(0)
    stages = [prepare_pointwise_conv_bn_act(conv_bn(8, 6, 1, 1)) for _ in range(2)]
    with pytest.raises(RuntimeError, match="stage 1 takes 6 channels, not 8"):
        PreparedNetwork(stages)(torch.zeros(1, 6, 4, 4))
    for packed in (stages[0].packed[:-1], torch.zeros(4096, dtype=torch.uint8)):
        stage = PreparedStage(packed, torch.float32, 6)
        with pytest.raises(RuntimeError, match="must be what a prepare op made"):
            PreparedNetwork([stage])(torch.zeros(1, 6, 4, 4))
    with pytest.raises(ValueError, match="stages: got none"):
        PreparedNetwork([])


def test_residual_of_another_shape() -> None:
    """A padding that makes an output of the input's shape at one extent, and not at another."""
    torch.manual_seed(0)
    arguments = (None, conv_bn(6, 1, 3, 3), None, conv_bn(6, 6, 1, 1), 2, 2)
    network = PreparedNetwork([prepare_mbconv(*arguments, residual=True)])
    assert network(torch.zeros(1, 6, 3, 3)).shape == (1, 6, 3, 3)
    with pytest.raises(RuntimeError, match="stage 0 adds its input, whose shape"):
        network(torch.zeros(1, 6, 1, 1))


def test_images_after_a_pool() -> None:
    """What follows a pool takes vectors."""
    torch.manual_seed(0)
    stages = [
        prepare_average_pool(6, torch.float32),
        prepare_fused_mbconv(conv_bn(8, 6, 3, 3), None),
    ]
    with pytest.raises(RuntimeError, match="stage 1 takes images, not the vectors"):
        PreparedNetwork([stages[0], stages[1]._replace(padding=1)])(torch.zeros(3, 6, 4, 4))


def test_wrong_weights() -> None:
    """The ops' own checks."""
    torch.manual_seed(0)
    depthwise, project = conv_bn(6, 1, 3, 3), conv_bn(8, 7, 1, 1)
    with pytest.raises(ValueError, match="project"):
        prepare_mbconv(None, depthwise, None, project)
    with pytest.raises(ValueError, match="residual: got True"):
        prepare_mbconv(None, depthwise, None, conv_bn(8, 6, 1, 1), residual=True)
    with pytest.raises(ValueError, match="activation"):
        prepare_linear(torch.zeros(2, 3), None, "gelu")
    with pytest.raises(ValueError, match=r"weight: got shape \(3,\), expected \(K, C\)"):
        prepare_linear(torch.zeros(3), None)
    with pytest.raises(ValueError, match=r"expand\.weight: got 2 dimensions"):
        prepare_fused_mbconv(conv_bn(8, 6), None)
    on_meta = project._replace(weight=project.weight.to("meta"))
    with pytest.raises(ValueError, match="weight: got a tensor on meta, expected cpu"):
        prepare_pointwise_conv_bn_act(on_meta)
