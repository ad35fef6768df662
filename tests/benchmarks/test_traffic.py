"""The traffic model against counts made by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from effnet_kernels.bench import fused_mbconv, shapes, traffic


class Block(nn.Module):
    """An MBConv: 2 channels of 4x4 expanded to 6, stride 2, SE through 1 channel, back to 2."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.reduce, self.widen = nn.Conv2d(6, 1, 1), nn.Conv2d(1, 6, 1)
        self.project, self.bn3 = nn.Conv2d(6, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.expand(x)))
        x = self.act(self.bn2(self.depthwise(x)))
        gate = self.widen(self.act(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.bn3(self.project(x * gate))


class FusedBlock(nn.Module):
    """A Fused-MBConv with a residual: 2 channels of 4x4 expanded to 6, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(2, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.project, self.bn2 = nn.Conv2d(6, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.project(self.act(self.bn1(self.expand(x))))) + x


class Residual(nn.Module):
    """A shortcut around a convolution and its BN, on 2 channels of 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + x


def count(model: nn.Module, size: int = 4, channels: int = 2) -> dict[str, traffic.Traffic]:
    image = torch.empty(1, channels, size, size, device="meta")
    recording = traffic.record(model.to("meta"), image)
    return {level.level: level for level in traffic.count(recording)}


def test_hand_count() -> None:
    """Every level of a tiny MBConv, in bytes of float32."""
    x, e, d, p = 2 * 16 * 4, 6 * 16 * 4, 6 * 4 * 4, 2 * 4 * 4
    pooled, squeezed = 6 * 4, 4
    levels = count(Block())
    gate_fused = (pooled + squeezed) + (squeezed + pooled)
    gate_eager = gate_fused + 2 * squeezed + 2 * pooled
    scale = d + pooled + d
    assert levels["eager"].bytes == (
        (x + e) + 2 * e + 2 * e
        + (e + d) + 2 * d + 2 * d
        + (d + pooled) + gate_eager + scale
        + (d + p) + 2 * p
    )  # fmt: skip
    assert levels["conv_fused"].bytes == (
        (x + e) + (e + d) + (d + pooled) + gate_fused + scale + (d + p)
    )
    assert levels["depthwise"].bytes == (
        (x + e) + (e + d + pooled) + gate_eager + scale + (d + p) + 2 * p
    )
    assert levels["mbconv"].bytes == (x + d + pooled) + gate_fused + (d + pooled + p)
    for level in levels.values():
        assert level.flops == 2 * (16 * 2 * 6 + 4 * 6 * 9 + 6 + 6 + 4 * 6 * 2)
    weights = 4 * (12 + 54 + (6 + 1) + (6 + 6) + 12)
    norms = 4 * 4 * (6 + 6 + 2)
    assert levels["eager"].weight_bytes == weights + norms


def test_fused_mbconv() -> None:
    """Every level of a tiny Fused-MBConv; the shortcut is the input, so one read of it is free."""
    x = y = 2 * 16 * 4
    e = 6 * 16 * 4
    levels = count(FusedBlock())
    assert levels["eager"].bytes == (x + e) + 4 * e + (e + y) + 2 * y + 3 * y
    assert levels["conv_fused"].bytes == (x + e) + (e + x + y)
    assert levels["depthwise"].bytes == levels["eager"].bytes
    assert levels["mbconv"].bytes == x + y
    for level in levels.values():
        assert level.flops == 2 * 16 * (2 * 6 * 9 + 6 * 2)


def test_residual() -> None:
    """A fused convolution reads the shortcut and writes the sum."""
    x = 2 * 16 * 4
    levels = count(Residual())
    assert levels["eager"].bytes == 2 * x + 2 * x + 3 * x
    assert levels["conv_fused"].bytes == 2 * x  # the shortcut is the convolution's own input


def test_least_time() -> None:
    """Each kernel takes the longer of its bytes and its arithmetic."""
    eager = count(Residual())["eager"]
    total = eager.bytes + eager.weight_bytes
    assert eager.seconds(1.0, 1e30) == pytest.approx(total)
    assert eager.seconds(1e30, 1.0) == pytest.approx(eager.flops)
    convolution = eager.kernels[0]
    both = eager.seconds(1.0, 1.0)
    assert both == pytest.approx(
        max(convolution.bytes + convolution.weight_bytes, convolution.flops)
        + sum(k.bytes + k.weight_bytes for k in eager.kernels[1:])
    )


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_efficientnet_b0(name: str) -> None:
    """The figures that the design rests on, for one 224x224 image in bfloat16.

    Padding as TensorFlow does it costs eager passes of its own, and a fused engine nothing.
    """
    with torch.device("meta"):
        model = timm.create_model(name).to(torch.bfloat16)
        recording = traffic.record(model, torch.empty(1, 3, 224, 224, dtype=torch.bfloat16))
    megabytes = {level.level: round(level.bytes / 1e6, 1) for level in traffic.count(recording)}
    assert megabytes["eager"] == (94.1 if name == "efficientnet_b0" else 103.2)
    assert megabytes["conv_fused"] == 41.6
    assert megabytes["mbconv"] == 14.0


def test_fused_mbconv_keeps_the_expanded_tensor_on_chip() -> None:
    """EfficientNetV2's early stages: expand and project are one kernel."""
    with torch.device("meta"):
        model = timm.create_model("efficientnetv2_s")
        recording = traffic.record(model, torch.empty(1, 3, 64, 64))
    kernels = list(traffic.count(recording))[-1].kernels
    assert sum(kernel.ops.count("convolution") == 2 for kernel in kernels) == 8 + 30


def test_fused_mbconv_suite() -> None:
    """The suite counts a block as the model's traffic does, but that it reads a shortcut again."""
    with torch.device("meta"):
        model = timm.create_model("efficientnetv2_s").to(torch.bfloat16)
        image = torch.empty(4, 3, 384, 384, dtype=torch.bfloat16)
        recording = traffic.record(model, image)
    blocks = list(traffic.count(recording))[-1].kernels[1:11]  # after the stem
    found = shapes.fused_mbconv_shapes("efficientnetv2_s@384")
    problems = [
        fused_mbconv.Problem(shape, 4, torch.bfloat16, "inference")
        for shape in found
        for _ in range(shape.count)
    ]
    assert [block.flops for block in blocks] == [problem.flops for problem in problems]
    assert [block.bytes for block in blocks] == [
        problem.bytes - problem.shape.residual * problem.image_bytes(problem.input)
        for problem in problems
    ]


def test_real_tensors_are_refused() -> None:
    """The model would run for real."""
    with pytest.raises(ValueError, match="expected meta"):
        traffic.record(Residual(), torch.empty(1, 2, 4, 4, device="meta"))
