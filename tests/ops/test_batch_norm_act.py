"""BN + activation + residual on every kernel backend that can run here, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from devices import device_of, skip_in_interpreter
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import batch_norm_act


@dataclass(frozen=True)
class Case:
    """One call."""

    batch: int
    channels: int
    height: int
    width: int
    activation: str = "silu"
    training: bool = True
    residual: bool = False
    sample_scale: bool = False
    affine: bool = True
    layout: str = "channels_last"
    mean: float = 0.0

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            self.activation,
            "train" if self.training else "frozen",
        ]
        words += ["residual"] if self.residual else []
        words += ["scaled"] if self.sample_scale else []
        words += [] if self.affine else ["plain"]
        words += [] if self.layout == "channels_last" else [self.layout]
        words += [f"mean{self.mean:g}"] if self.mean else []
        return "-".join(words)


CASES = [
    Case(2, 32, 14, 13),
    Case(3, 24, 7, 7, "identity", residual=True, sample_scale=True),
    Case(2, 40, 9, 5, "hardswish", training=False, residual=True),
    Case(5, 13, 3, 2, "relu6", residual=True, affine=False),
    Case(4, 7, 1, 1, "sigmoid", sample_scale=True),
    Case(1, 200, 33, 17, "silu", training=False, sample_scale=True),
    Case(2, 48, 6, 11, "relu", layout="contiguous"),
    Case(3, 16, 12, 9, "identity", mean=300.0),
    Case(2, 5, 40, 41, "hardsigmoid", training=False, affine=False),
]


def make_tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """The tensor arguments by name, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def image(offset: float = 0.0) -> Tensor:
        x = (random(case.batch, case.channels, case.height, case.width) + offset).to(dtype)
        x = x.to(device)
        if case.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        return x

    c = case.channels
    return {
        "input": image(case.mean),
        "running_mean": random(c).float().to(device),
        "running_var": (random(c).abs() + 0.5).float().to(device),
        "bn_weight": (random(c).abs() + 0.5).float().to(device) if case.affine else None,
        "bn_bias": random(c).float().to(device) if case.affine else None,
        "residual": image() if case.residual else None,
        "sample_scale": torch.tensor([0.0, 1.25] * case.batch)[: case.batch].to(device)
        if case.sample_scale
        else None,
        "grad_output": image(),
    }


def run(
    case: Case, tensors: dict[str, Tensor | None], backend: str, *, double: bool = False
) -> dict[str, Tensor]:
    """The output, the statistics and every gradient, by name; ``double``: in float64."""
    arguments = {
        name: None if t is None else (t.double() if double else t).detach().clone()
        for name, t in tensors.items()
        if name != "grad_output"
    }
    wanted = {
        name: t.requires_grad_()
        for name, t in arguments.items()
        if t is not None and name in ("input", "bn_weight", "bn_bias", "residual")
    }
    settings: dict[str, Any] = {
        "training": case.training, "eps": 1e-3, "activation": case.activation,
    }  # fmt: skip
    with use_backend(backend):
        output, mean, var = batch_norm_act(**arguments, **settings)
        grads = torch.autograd.grad(
            output, list(wanted.values()), tensors["grad_output"].to(output.dtype)
        )
        with torch.no_grad():
            again = batch_norm_act(**arguments, **settings).output
    results = {"output": output, "output (no grad)": again}
    if case.training:
        results |= {"mean": mean, "var": var}
    return results | {f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Results at most 2x, gradients at most 3x eager's own error from float64."""
    tensors = make_tensors(case, dtype, device_of(backend))
    ours, eager = run(case, tensors, backend), run(case, tensors, "eager")
    exact = run(case, tensors, "eager", double=True)
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, result in ours.items():
        assert result.dtype == eager[name].dtype, name
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], result.dtype, factor
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, kernel_backend: str) -> None:
    """Forward and backward keep the error rule."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    check(case, dtype, kernel_backend)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool) -> None:
    """The derivative is the function's, in float64."""
    case = Case(3, 4, 2, 3, training=training, residual=True, sample_scale=True)
    tensors = make_tensors(case, torch.float64, "cpu")
    names = ["input", "bn_weight", "bn_bias", "residual"]
    fixed = {
        name: None if t is None else t.double()
        for name, t in tensors.items()
        if name not in (*names, "grad_output")
    }

    def function(*values: Tensor) -> Tensor:
        return batch_norm_act(
            **dict(zip(names, values, strict=True)), **fixed, training=training
        ).output

    values = [tensors[name].double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, values)


def test_deterministic(kernel_backend: str) -> None:
    """The same bits again."""
    tensors = make_tensors(CASES[0], torch.float32, device_of(kernel_backend))
    first, second = (run(CASES[0], tensors, kernel_backend) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_empty(kernel_backend: str) -> None:
    """An empty batch gives an empty batch and gradients of zero."""
    case = Case(0, 8, 3, 3)
    results = run(
        case, make_tensors(case, torch.float32, device_of(kernel_backend)), kernel_backend
    )
    assert results["output"].shape == (0, 8, 3, 3)
    assert not results["grad bn_weight"].any()


def test_double_backward_is_an_error(kernel_backend: str) -> None:
    """A second derivative is refused in words."""
    tensors = make_tensors(CASES[0], torch.float32, device_of(kernel_backend))
    x = tensors["input"].requires_grad_()
    with use_backend(kernel_backend):
        output = batch_norm_act(x, None, None, training=True).output
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 16, 5)}, ValueError, "input: got 3 dimensions"),
        ({"running_mean": None, "training": False}, ValueError, "running_mean: got None"),
        ({"bn_weight": torch.zeros(3)}, ValueError, "bn_weight: got shape"),
        ({"eps": "small"}, TypeError, "eps: got str"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu'"),
        ({"residual": torch.zeros(2, 32, 14, 12)}, ValueError, "residual: got shape"),
        ({"residual": torch.zeros(2, 32, 14, 13).half()}, TypeError, "residual: got dtype"),
        ({"sample_scale": torch.zeros(3)}, ValueError, "sample_scale: got shape"),
        ({"input": torch.zeros(1, 32, 1, 1)}, ValueError, "one value a channel"),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Bad arguments are named before anything runs."""
    tensors = make_tensors(CASES[0], torch.float32, "cpu")
    del tensors["grad_output"]
    with pytest.raises(error, match=message):
        batch_norm_act(**{**tensors, "training": True, **change})
