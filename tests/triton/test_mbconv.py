"""The first half of MBConv in Triton, against float64 and eager."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from accuracy import FORWARD, assert_error_rule
from devices import device_of
from torch import Tensor

from effnet_kernels.activations import EAGER, Activation
from effnet_kernels.triton import depthwise_conv_bn_act, mbconv


@dataclass(frozen=True)
class Case:
    """One call: ``inputs`` channels expand to ``channels``."""

    batch: int
    inputs: int
    channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    """left, right, top, bottom, as ``F.pad`` takes them."""
    activations: tuple[Activation, Activation] = (Activation.silu, Activation.silu)
    affine: bool = True
    pool: bool = True

    def __str__(self) -> str:
        return (
            f"{self.batch}x{self.inputs}x{self.height}x{self.width}-c{self.channels}"
            f"-k{self.kernel}s{self.stride}-pad{''.join(map(str, self.pads))}"
            f"-{'-'.join(a.name for a in self.activations)}"
            + "-pool" * self.pool
            + "-plain" * (not self.affine)
        )


CASES = [
    Case(2, 8, 24, 7, 7),
    Case(2, 16, 40, 10, 9, stride=2, pads=(0, 1, 0, 1)),
    Case(1, 24, 32, 8, 13, kernel=5, pads=(2, 2, 2, 2), pool=False),
    Case(2, 5, 13, 9, 6, kernel=5, stride=2, pads=(1, 2, 2, 1), affine=False),
    Case(3, 3, 7, 3, 2, activations=(Activation.relu6, Activation.hardswish)),
    Case(1, 4, 8, 1, 1, activations=(Activation.sigmoid, Activation.identity)),
    Case(1, 136, 24, 6, 5, kernel=5, pads=(2, 2, 2, 2)),
]


def vectors(case: Case, generator: torch.Generator) -> list[Tensor | None]:
    """Mean, variance, weight and bias of a BatchNorm of the expanded channels."""
    mean, weight, bias = (torch.randn(case.channels, generator=generator) for _ in range(3))
    var = torch.rand(case.channels, generator=generator) + 0.5
    return [mean * 0.1, var, weight, bias] if case.affine else [mean * 0.1, var, None, None]


def make_arguments(
    case: Case, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor | None], Tensor, list[Tensor | None]]:
    """Input, expand weight and BatchNorm, depthwise weight and BatchNorm."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(case.batch, case.inputs, case.height, case.width)
    expand = random(case.channels, case.inputs) / case.inputs**0.5
    weight = random(case.channels, 1, case.kernel, case.kernel) / case.kernel
    device = device_of("triton")
    bns = [
        [None if v is None else v.to(device) for v in vectors(case, generator)] for _ in range(2)
    ]
    return (
        x.to(device, dtype, memory_format=torch.channels_last),
        expand.to(device, dtype), bns[0], weight.to(device, dtype), bns[1],
    )  # fmt: skip


def reference(case: Case, dtype: torch.dtype, compute: torch.dtype) -> dict[str, Tensor]:
    """PyTorch's own ops in ``compute``, on arguments of ``dtype``."""
    x, expand, expand_bn, weight, bn = make_arguments(case, dtype)

    def batch_norm(x: Tensor, bn: list[Tensor | None]) -> Tensor:
        if compute == torch.float64:
            bn = [None if v is None else v.double() for v in bn]
        return F.batch_norm(x, *bn, False, 0.0, 1e-3)  # type: ignore[arg-type]

    y = F.conv2d(x.to(compute), expand.to(compute)[:, :, None, None])
    y = EAGER[case.activations[0]](batch_norm(y, expand_bn))
    y = F.pad(y, case.pads)
    y = F.conv2d(y, weight.to(compute), stride=case.stride, groups=case.channels)
    y = EAGER[case.activations[1]](batch_norm(y, bn))
    results = {"output": y}
    if case.pool:
        results["pooled"] = y.sum((2, 3), dtype=torch.promote_types(compute, torch.float32))
    return results


def run(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The launcher's results, in tensors that were filled with NaN."""
    x, expand, expand_bn, weight, bn = make_arguments(case, dtype)
    left, right, top, bottom = case.pads
    size = [
        (extent + pad - case.kernel) // case.stride + 1
        for extent, pad in ((case.height, top + bottom), (case.width, left + right))
    ]
    output = torch.empty(
        (case.batch, case.channels, *size), dtype=dtype, device=x.device,
        memory_format=torch.channels_last,
    ).fill_(torch.nan)  # fmt: skip
    pooled = torch.full((case.batch, case.channels), torch.nan, device=x.device)
    mbconv.expand_depthwise_out(
        x, expand, *expand_bn, 1e-3, case.activations[0], weight, *bn, 1e-3,
        case.stride, top, left, case.activations[1], False, output, pooled if case.pool else None,
    )  # fmt: skip
    return {"output": output, "pooled": pooled} if case.pool else {"output": output}


def check(case: Case, dtype: torch.dtype) -> None:
    """Results are at most 2x eager's own error from float64."""
    ours, eager, exact = (
        run(case, dtype), reference(case, dtype, dtype), reference(case, dtype, torch.float64)
    )  # fmt: skip
    assert ours.keys() == exact.keys()
    for name, result in ours.items():
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], result.dtype, FORWARD
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    """Kernels, strides, pads, ragged extents and channels, one slice of the input and several."""
    check(case, dtype)


@pytest.mark.parametrize("stride", [1, 2])
def test_units_within_images(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of several units, programs of several units, in a scratch that is used again."""
    monkeypatch.setattr(mbconv, "SCRATCH_BYTES", 16 * 1024)
    monkeypatch.setattr(mbconv, "multiprocessors", lambda tensor: 1)
    monkeypatch.setattr(depthwise_conv_bn_act, "PACK_FROM", 0)
    mbconv.expand_plan.cache_clear()
    case = Case(2, 8, 24, 15, 21, kernel=5, stride=stride, pads=(2, 2, 1, 2))
    try:
        check(case, torch.float32)
        plan = mbconv.expand_plan(
            2, 8, 24, 15, 21, *((14, 21) if stride == 1 else (7, 11)), 5, stride, 4, 1
        )
        assert plan.image_units > 1 and plan.program_units > 1
    finally:
        mbconv.expand_plan.cache_clear()
