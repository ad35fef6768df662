"""The layer against ``nn.Conv2d``, ``nn.BatchNorm2d`` and an activation in a row."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from accuracy import FORWARD, GRADIENT
from stock_models import assert_norm_error_rule
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from effnet_kernels.layers import DepthwiseConvBnAct

pytestmark = pytest.mark.usefixtures("one_thread")

C, K = 8, 3


class Stock(nn.Module):
    """The same parameters, run by PyTorch's modules."""

    def __init__(self, layer: DepthwiseConvBnAct) -> None:
        super().__init__()
        self.conv, self.bn = copy.deepcopy(layer.conv), copy.deepcopy(layer.bn)
        self.conv.padding = (K // 2, K // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.bn(self.conv(x)))


def make_layer(**bn: object) -> DepthwiseConvBnAct:
    torch.manual_seed(0)
    layer = DepthwiseConvBnAct(C, K, stride=2)
    settings = {"eps": 1e-3, "momentum": 0.1, **bn}
    layer.bn = nn.BatchNorm2d(C, **settings)
    with torch.no_grad():
        for tensor in (layer.bn.weight, layer.bn.bias, layer.bn.running_mean, layer.bn.running_var):
            if tensor is not None:
                tensor.add_(torch.rand_like(tensor))
    return layer


def images(batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, C, 7, 9, generator=generator) * 2 + 1).to(dtype)


def assert_buffers_close(ours: nn.Module, stock: nn.Module, **tolerance: float) -> None:
    expected = dict(stock.named_buffers())
    actual = dict(ours.named_buffers())
    assert actual.keys() == expected.keys()
    for name, buffer in actual.items():
        assert buffer.dtype == expected[name].dtype
        torch.testing.assert_close(
            buffer, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize(
    ("momentum", "affine", "track"),
    list(itertools.product([0.1, None, 0.0, 1.0], [True, False], [True, False])),
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batch_norm_semantics(
    momentum: float | None, affine: bool, track: bool, device: str
) -> None:
    """Outputs, gradients and every buffer, step by step, in training, evaluation and back."""
    layer = make_layer(momentum=momentum, affine=affine, track_running_stats=track).to(device)
    stock, exact = Stock(layer), Stock(layer).double()
    for step, training in enumerate((True, True, False, True)):
        results = []
        for model in (layer, stock, exact):
            model.train(training)
            dtype = torch.float64 if model is exact else torch.float32
            x = images(step + 1, dtype).to(device).requires_grad_()
            y = model(x)
            grads = torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y).cumsum(-1))
            if not training:
                with torch.no_grad():
                    torch.testing.assert_close(model(x), y)
            results.append((y, *grads))
        for index, (ours, eager, truth) in enumerate(zip(*results, strict=True)):
            factor = GRADIENT if index else FORWARD
            assert_norm_error_rule(f"{step}.{index}", ours, eager, truth, factor)
        assert_buffers_close(layer, stock)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_buffers(dtype: torch.dtype) -> None:
    """A model wholly in 16 bits: its buffers are too, and move as the stock ones do."""
    layer = make_layer().to(dtype)
    stock = Stock(layer)
    for step in range(3):
        x = images(step + 2, dtype)
        torch.testing.assert_close(layer(x), stock(x), rtol=0.02, atol=0.01)
        assert_buffers_close(layer, stock, rtol=0.02, atol=0.01)
    assert layer.bn.running_mean.dtype == dtype


def test_running_statistics_removed_by_hand() -> None:
    """Buffers set to None: batch statistics, in evaluation too, and nothing to update."""
    layer = make_layer()
    layer.bn.running_mean = layer.bn.running_var = None
    stock = Stock(layer)
    for training in (True, False):
        torch.testing.assert_close(layer.train(training)(images()), stock.train(training)(images()))
        assert_buffers_close(layer, stock)


def test_empty_batch_leaves_the_statistics() -> None:
    """An empty batch counts as a batch and moves nothing, as in ``nn.BatchNorm2d``."""
    layer = make_layer()
    stock = Stock(layer)
    assert layer(images(0)).shape == stock(images(0)).shape
    assert_buffers_close(layer, stock)
    assert layer.bn.num_batches_tracked == 1


def test_one_value_a_channel_is_an_error() -> None:
    """As in ``nn.BatchNorm2d``, with the statistics as they were."""
    layer = make_layer()
    before = layer.bn.running_var.clone()
    with pytest.raises(ValueError, match="one value a channel"):
        layer(images(1)[:, :, :2, :2])
    torch.testing.assert_close(layer.bn.running_var, before)
    layer.eval()(images(1)[:, :, :2, :2])


@pytest.mark.parametrize("training", [True, False])
def test_pool(training: bool) -> None:
    """``pool`` adds the float32 sums over height and width, and gradients reach through them."""
    layer = make_layer().train(training)
    y, pooled = layer(images(), pool=True)
    assert pooled.shape == (3, C)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, y.sum((2, 3)))
    pooled.square().sum().backward()
    assert layer.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts(layout: torch.memory_format) -> None:
    """Either layout in, channels-last out, the same numbers."""
    layer = make_layer()
    stock = Stock(layer)
    y = layer(images().contiguous(memory_format=layout))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, stock(images()))


@pytest.mark.parametrize("padding", [0, 1, "same", (1, 0), (0, 1, 1, 0)])
def test_padding(padding: object) -> None:
    """Every form of padding that the op takes."""
    layer = DepthwiseConvBnAct(C, K, 2, padding).eval()
    left, right, top, bottom = {
        0: (0, 0, 0, 0), 1: (1, 1, 1, 1), "same": (1, 1, 1, 1), (1, 0): (0, 0, 1, 1),
        (0, 1, 1, 0): (0, 1, 1, 0),
    }[padding]  # fmt: skip
    x = nn.functional.pad(images(), (left, right, top, bottom))
    expected = nn.functional.silu(layer.bn(layer.conv(x)))
    torch.testing.assert_close(layer(images()), expected)


def test_module_surface() -> None:
    """Names in the state dict, the repr, the activations, and an unknown one."""
    layer = DepthwiseConvBnAct(C, 5, activation="hardswish")
    assert list(layer.state_dict()) == [
        "conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
        "bn.num_batches_tracked",
    ]  # fmt: skip
    assert layer.conv.weight.shape == (C, 1, 5, 5)
    assert "padding=2, activation='hardswish'" in repr(layer)
    expected = nn.functional.hardswish(layer.bn(layer.conv(nn.functional.pad(images(), (2,) * 4))))
    torch.testing.assert_close(layer(images()), expected)
    with pytest.raises(ValueError, match="activation: got 'gelu'"):
        DepthwiseConvBnAct(C, 5, activation="gelu")


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_does_not_recompile(momentum: float | None) -> None:
    """One graph for every training step: the count of batches stays a tensor."""
    layer = make_layer(momentum=momentum)
    stock = Stock(layer)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(4):
        x, twin = images().add(step).requires_grad_(), images().add(step).requires_grad_()
        y, expected = compiled(x), stock(twin)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
        assert_buffers_close(layer, stock)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compile_with_inductor() -> None:
    """Through code generation, forward and backward, training and evaluation."""
    layer = make_layer()
    stock = Stock(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for training in (True, False):
        layer.train(training)
        x, twin = images().requires_grad_(), images().requires_grad_()
        y, expected = compiled(x), stock.train(training)(twin)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
        assert_buffers_close(layer, stock)
    torch._dynamo.reset()
