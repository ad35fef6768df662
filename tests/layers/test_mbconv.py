"""MBConv and the head as modules, beside the same block of PyTorch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels.layers import MBConv, PointwiseConvBnAct

pytestmark = pytest.mark.usefixtures("one_thread")


def norm(x: Tensor, bn: nn.BatchNorm2d) -> Tensor:
    """BN as its module would."""
    return F.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps
    )


def block_of_stock_ops(block: MBConv, x: Tensor) -> Tensor:
    """The block of x, padded symmetrically, without drop path."""
    y = x
    if block.expand_conv is not None:
        y = F.silu(norm(block.expand_conv(y), block.expand_bn))
    conv = block.depthwise_conv
    y = F.conv2d(y, conv.weight, None, conv.stride, block.padding, 1, conv.groups)
    y = F.silu(norm(y, block.depthwise_bn))
    if block.reduce is not None:
        gate = block.excite(F.silu(block.reduce(y.mean((2, 3), keepdim=True))))
        y = y * gate.sigmoid()
    y = norm(block.project_conv(y), block.project_bn)
    return x + y if block.residual else y


SETTINGS = [
    {"in_channels": 16, "out_channels": 16, "squeezed": 4},
    {"in_channels": 16, "out_channels": 24, "stride": 2, "kernel_size": 5},
    {"in_channels": 8, "out_channels": 8, "expand_ratio": 1, "squeezed": 2, "eps": 1e-3},
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_same_as_stock_ops(settings: dict[str, int], training: bool) -> None:
    """Outputs, running statistics and gradients."""
    torch.manual_seed(0)
    block = MBConv(**settings)
    for bn in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias)
        bn.running_var.uniform_(0.5, 1.5)
    stock = MBConv(**settings)
    stock.load_state_dict(block.state_dict())
    block.train(training)
    stock.train(training)
    x = torch.randn(3, settings["in_channels"], 9, 10).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training):
        ours, theirs = block(x), block_of_stock_ops(stock, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    if not training:
        return
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    for (name, mine), other in zip(block.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-3, msg=name)
    for (name, mine), other in zip(block.named_buffers(), stock.buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


def test_drop_path() -> None:
    """Whole images skip the block in training, at the rate that was asked for."""
    torch.manual_seed(0)
    block = MBConv(8, 8, drop_path=0.25).train()
    x = torch.randn(400, 8, 3, 3)
    with torch.no_grad():
        skipped = (block(x) == x).flatten(1).all(1)
    assert 0.15 < skipped.float().mean().item() < 0.35
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_path": 1.0}, "drop_path: got 1.0"),
        ({"activation": "gelu"}, "activation: got 'gelu'"),
        ({"gate": "tanh"}, "gate: got 'tanh'"),
    ],
)
def test_wrong_settings(settings: dict[str, object], message: str) -> None:
    """Are named before anything runs."""
    with pytest.raises(ValueError, match=message):
        MBConv(8, 8, **settings)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pointwise(training: bool) -> None:
    """The head: one op in inference, PyTorch's product and one op in training."""
    torch.manual_seed(0)
    head = PointwiseConvBnAct(24, 40).train(training)
    head.bn.running_var.uniform_(0.5, 1.5)
    stock = PointwiseConvBnAct(24, 40).train(training)
    stock.load_state_dict(head.state_dict())
    x = torch.randn(2, 24, 5, 6)
    with torch.set_grad_enabled(training):
        theirs = F.silu(norm(stock.conv(x), stock.bn))
        torch.testing.assert_close(head(x), theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bn.running_mean, stock.bn.running_mean)
