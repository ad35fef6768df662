"""Pointwise convolution on every kernel backend that can run here, against float64 and eager."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accuracy import FORWARD, assert_error_rule
from devices import device_of, skip_in_interpreter
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import Prologue, pointwise_conv_bn_act


@dataclass(frozen=True)
class Case:
    """One call: ``channels`` to ``features``."""

    batch: int
    channels: int
    features: int
    height: int
    width: int
    activation: str = "silu"
    prologue: str | None = None
    gate: bool = False
    residual: bool = False
    pool: bool = False
    affine: bool = True
    layout: str = "channels_last"

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            f"k{self.features}",
            self.activation,
        ]
        words += [f"after-{self.prologue}"] if self.prologue else []
        words += ["gate"] if self.gate else []
        words += ["residual"] if self.residual else []
        words += ["pool"] if self.pool else []
        words += [] if self.affine else ["plain"]
        words += [] if self.layout == "channels_last" else [self.layout]
        return "-".join(words)


CASES = [
    Case(2, 16, 96, 14, 14),
    Case(2, 96, 24, 14, 14, "identity", gate=True, residual=True),
    Case(3, 240, 40, 7, 7, "identity", prologue="silu", gate=True),
    Case(1, 320, 1280, 7, 7, pool=True),
    Case(2, 24, 144, 9, 5, "relu", affine=False),
    Case(3, 13, 7, 5, 3, "hardswish", prologue="hardswish", gate=True, residual=True, pool=True),
    Case(4, 8, 1, 1, 1, "sigmoid", prologue="identity", pool=True),
    Case(1, 1, 5, 3, 2, "relu6", residual=True),
    Case(2, 72, 40, 6, 11, "hardsigmoid", gate=True, layout="contiguous"),
    Case(5, 1152, 192, 3, 3, "identity", gate=True, residual=True, pool=True),
    Case(1, 33, 130, 17, 19, prologue="relu6"),
]
# From few channels to many, with pixels enough for a GPU: CUDA has a kernel of its own for that.
WIDE_CASES = [
    Case(3, 16, 96, 107, 107),
    Case(3, 24, 144, 107, 107, "relu6"),
    Case(13, 40, 240, 53, 51, "hardswish", affine=False),
    Case(3, 96, 136, 113, 107),
    Case(13, 72, 80, 53, 51, "identity"),
]


def make_arguments(case: Case, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The call's arguments by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, c, k = case.batch, case.channels, case.features

    def image(channels: int) -> Tensor:
        x = random(n, channels, case.height, case.width).to(dtype).to(device)
        if case.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    def vector(size: int, *, positive: bool = False) -> Tensor:
        x = random(size)
        return (x.abs() + 0.5 if positive else x).float().to(device)

    return {
        "input": image(c),
        "weight": (random(k, c, 1, 1) / c**0.5).to(dtype).to(device),
        "running_mean": vector(k) * 0.1,
        "running_var": vector(k, positive=True),
        "bn_weight": vector(k, positive=True) if case.affine else None,
        "bn_bias": vector(k) if case.affine else None,
        "eps": 1e-3,
        "activation": case.activation,
        "prologue": Prologue(vector(c, positive=True), vector(c), case.prologue)
        if case.prologue
        else None,
        "gate": random(n, c).sigmoid().float().to(device) if case.gate else None,
        "residual": image(k) if case.residual else None,
        "pool": case.pool,
    }


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64."""
    double = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    prologue = double["prologue"]
    if prologue is not None:
        double["prologue"] = Prologue(
            prologue.scale.double(), prologue.shift.double(), prologue.activation
        )
    return double


def run(arguments: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Output and sums by name."""
    with use_backend(backend), torch.no_grad():
        output, pooled = pointwise_conv_bn_act(**arguments)
    return {"output": output} if pooled is None else {"output": output, "pooled": pooled}


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Results are at most 2x eager's own error from float64."""
    arguments = make_arguments(case, dtype, device_of(backend))
    ours, eager = run(arguments, backend), run(arguments, "eager")
    exact = run(in_double(arguments), "eager")
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    assert set(ours) == set(exact)
    for name, result in ours.items():
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], result.dtype, FORWARD
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, kernel_backend: str) -> None:
    """Every prologue and epilogue, alone and together, ragged extents too."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    check(case, dtype, kernel_backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_error_rule_of_wide_cases(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Large enough for the kernels and tiles of large tensors."""
    check(case, dtype, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tf32_where_it_is_allowed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 operands are rounded to TF32's 11 bits by PyTorch's own switch alone."""
    arguments = make_arguments(CASES[3], torch.float32, "cuda")
    exact = run(in_double(arguments), "eager")["output"]
    errors = []
    for allowed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        difference = run(arguments, backend)["output"].double() - exact
        errors.append((difference.norm() / exact.norm()).item())
    assert 5e-5 < errors[0] < 1e-3, errors
    assert errors[1] < 1e-6, errors


def test_float64() -> None:
    """float64 tensors are computed in float64."""
    arguments = in_double(make_arguments(CASES[5], torch.float32, "cpu"))
    ours, exact = run(arguments, "cpu"), run(arguments, "eager")
    for name, result in ours.items():
        assert torch.allclose(result, exact[name], rtol=1e-12, atol=1e-12), name


def test_weight_may_be_a_matrix(kernel_backend: str) -> None:
    """(K, C) and (K, C, 1, 1) are the same weight."""
    arguments = make_arguments(CASES[0], torch.float32, device_of(kernel_backend))
    matrix = {**arguments, "weight": arguments["weight"].flatten(1)}
    a, b = (run(x, kernel_backend)["output"] for x in (arguments, matrix))
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)], ids=str)
def test_empty(shape: tuple[int, ...], kernel_backend: str) -> None:
    """An empty image gives an empty image, and sums of nothing."""
    case = Case(shape[0], shape[1], 4, shape[2], shape[3], pool=True)
    arguments = make_arguments(case, torch.float32, device_of(kernel_backend))
    results = run(arguments, kernel_backend)
    assert results["output"].shape == (shape[0], 4, *shape[2:])
    assert results["pooled"].shape == (shape[0], 4) and not results["pooled"].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 13, 5)}, ValueError, "input: got 3 dimensions"),
        ({"weight": torch.zeros(7, 12, 1, 1)}, ValueError, "weight: got shape"),
        ({"weight": torch.zeros(7, 13, 3, 3)}, ValueError, "weight: got shape"),
        ({"weight": torch.zeros(7, 13).double()}, TypeError, "weight: got dtype"),
        ({"running_mean": torch.zeros(13)}, ValueError, "running_mean: got shape"),
        ({"running_var": None}, TypeError, "running_var: got None"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu'"),
        ({"gate": torch.zeros(3, 7)}, ValueError, "gate: got shape"),
        ({"residual": torch.zeros(3, 13, 5, 3)}, ValueError, "residual: got shape"),
        ({"residual": torch.zeros(3, 7, 5, 3).double()}, TypeError, "residual: got dtype"),
        ({"prologue": (1, 2)}, TypeError, "prologue: got tuple"),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Bad arguments are named before anything runs."""
    arguments = {**make_arguments(CASES[5], torch.float32, "cpu"), **change}
    with pytest.raises(error, match=message):
        pointwise_conv_bn_act(**arguments)


def test_gradient_is_an_error(kernel_backend: str) -> None:
    """The op is for inference, and says so."""
    arguments = make_arguments(CASES[0], torch.float32, device_of(kernel_backend))
    arguments["input"].requires_grad_()
    with use_backend(kernel_backend):
        output, _ = pointwise_conv_bn_act(**arguments)
    with pytest.raises(RuntimeError, match="no derivative"):
        output.sum().backward()


def test_autocast() -> None:
    """Under autocast the op computes in the lower precision, as conv2d does."""
    arguments = make_arguments(CASES[1], torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = pointwise_conv_bn_act(**arguments)
    assert output.dtype == torch.bfloat16


def test_opcheck(kernel_backend: str) -> None:
    """Schema and fake agree with what runs."""
    case = CASES[5]
    arguments = make_arguments(case, torch.float32, device_of(kernel_backend))
    namespace = (
        torch.ops.effnet_kernels_triton if kernel_backend == "triton" else torch.ops.effnet_kernels
    )
    prologue = arguments["prologue"]
    torch.library.opcheck(
        namespace.pointwise_conv_bn_act.default,
        (
            arguments["input"], arguments["weight"].flatten(1), arguments["running_mean"],
            arguments["running_var"], arguments["bn_weight"], arguments["bn_bias"], 1e-3, 3,
            prologue.scale, prologue.shift, 4, arguments["gate"], arguments["residual"], True,
            False,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
