"""Squeeze-and-excitation on every kernel backend that can run here, against float64 and eager."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from devices import device_of, skip_in_interpreter
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import squeeze_excite, squeeze_excite_gate
from effnet_kernels.ops.squeeze_excite import reference


@dataclass(frozen=True)
class Case:
    """One call; S squeezed channels."""

    batch: int
    channels: int
    squeezed: int
    height: int
    width: int
    activation: str = "silu"
    gate: str = "sigmoid"
    pooled: bool = False
    biases: bool = True
    layout: str = "channels_last"
    weight_dtype: torch.dtype | None = None
    """None for the input's."""

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            f"s{self.squeezed}",
            self.activation,
            self.gate,
        ]
        words += ["pooled"] if self.pooled else []
        words += [] if self.biases else ["no-biases"]
        words += [] if self.layout == "channels_last" else [self.layout]
        words += [f"{self.weight_dtype}"] if self.weight_dtype else []
        return "-".join(words).replace("torch.", "")


CASES = [
    Case(2, 32, 8, 28, 28),
    Case(3, 96, 4, 7, 7, pooled=True),
    Case(1, 1152, 48, 7, 7, pooled=True),
    Case(5, 13, 1, 9, 5, "relu", "hardsigmoid"),
    Case(2, 24, 6, 1, 1, "hardswish", "hardsigmoid", pooled=True, biases=False),
    Case(9, 8, 3, 33, 17, "relu", biases=False),
    Case(2, 72, 24, 6, 11, "hardswish", "hardsigmoid", layout="contiguous"),
    Case(4, 40, 10, 14, 14, weight_dtype=torch.float32),
    Case(1, 1, 1, 3, 2),
]


def make_tensors(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor | None]:
    """The arguments by name, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, c, s = case.batch, case.channels, case.squeezed
    image = random(n, c, case.height, case.width).to(dtype).to(device)
    if case.layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last)
    weight_dtype = case.weight_dtype or dtype
    tensors: dict[str, Tensor | None] = {
        "input": image,
        "reduce_weight": (random(s, c) * 2 / c**0.5).to(weight_dtype).to(device),
        "reduce_bias": random(s).to(weight_dtype).to(device) if case.biases else None,
        "expand_weight": (random(c, s) / s**0.5).to(weight_dtype).to(device),
        "expand_bias": random(c).to(weight_dtype).to(device) if case.biases else None,
        "pooled": None,
        "grad_output": random(n, c, case.height, case.width).to(dtype).to(device),
    }
    if case.pooled:
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        tensors["pooled"] = image.to(torch.float64).sum((2, 3)).to(accumulate)
    return tensors


def run(
    case: Case, tensors: dict[str, Tensor | None], backend: str, *, double: bool = False
) -> dict[str, Tensor]:
    """The output and every gradient, by name; ``double``: in float64."""
    leaves = {
        name: None if t is None else (t.double() if double else t).detach().clone().requires_grad_()
        for name, t in tensors.items()
        if name != "grad_output"
    }
    arguments = {**leaves, "activation": case.activation, "gate": case.gate}
    with use_backend(backend):
        output = squeeze_excite(**arguments)
        wanted = {name: t for name, t in leaves.items() if t is not None}
        grads = torch.autograd.grad(
            output, list(wanted.values()), tensors["grad_output"].to(output.dtype)
        )
        with torch.no_grad():
            inference = squeeze_excite(**arguments)
    results = {"output": output, "output (no grad)": inference}
    results.update({f"grad {name}": g for name, g in zip(wanted, grads, strict=True)})
    return results


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Results at most 2x, gradients at most 3x eager's own error from float64."""
    tensors = make_tensors(case, dtype, device_of(backend))
    ours, eager = run(case, tensors, backend), run(case, tensors, "eager")
    exact = run(case, tensors, "eager", double=True)
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, result in ours.items():
        assert result.dtype == eager[name].dtype, name
        assert_error_rule(
            f"{name} of {case}",
            result,
            eager[name],
            exact[name],
            result.dtype,
            GRADIENT if name.startswith("grad") else FORWARD,
            # A few values, each a sum of terms that cancel: what eager's error is there is chance.
            16 if name.startswith("grad") and result.numel() < 16 else None,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, kernel_backend: str) -> None:
    """Forward and backward keep the error rule."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    check(case, dtype, kernel_backend)


@pytest.mark.parametrize("pooled", [False, True])
def test_gradcheck(pooled: bool) -> None:
    """The derivative is the function's, in float64."""
    case = Case(2, 5, 3, 2, 3, pooled=pooled)
    tensors = make_tensors(case, torch.float64, "cpu")
    names = [n for n, t in tensors.items() if t is not None and n != "grad_output"]

    def function(*values: Tensor) -> Tensor:
        return squeeze_excite(**dict(zip(names, values, strict=True)))

    values = [tensors[name].requires_grad_() for name in names]
    with use_backend("cpu"):
        assert torch.autograd.gradcheck(function, values)


def test_gate_is_the_gate(kernel_backend: str) -> None:
    """The gate alone times the input is the whole op."""
    tensors = make_tensors(
        Case(3, 24, 6, 5, 4, pooled=True), torch.float32, device_of(kernel_backend)
    )
    grad = tensors.pop("grad_output")
    assert grad is not None
    with use_backend(kernel_backend), torch.no_grad():
        whole = squeeze_excite(**tensors)
        image, pooled = tensors.pop("input"), tensors.pop("pooled")
        gate = squeeze_excite_gate(pooled, 20, **tensors)
        torch.testing.assert_close(image * gate[:, :, None, None], whole)
    weight = tensors["reduce_weight"].clone().requires_grad_()
    with use_backend(kernel_backend), pytest.raises(RuntimeError, match="no derivative"):
        squeeze_excite_gate(pooled, 20, **{**tensors, "reduce_weight": weight}).sum().backward()


def test_empty_batch_and_kernels_of_1x1() -> None:
    """No images give none and gradients of zero; 1x1 kernels are the matrices they hold."""
    tensors = make_tensors(Case(2, 8, 2, 3, 3), torch.float32, "cpu")
    del tensors["grad_output"]
    kernels = {**tensors, **{n: tensors[n][:, :, None, None] for n in tensors if "_weight" in n}}
    torch.testing.assert_close(squeeze_excite(**kernels), squeeze_excite(**tensors))
    weight = tensors["reduce_weight"].clone().requires_grad_()
    empty = {**tensors, "input": torch.empty(0, 8, 3, 3), "reduce_weight": weight}
    output = squeeze_excite(**empty)
    assert output.shape == (0, 8, 3, 3)
    output.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("pooled", [False, True])
def test_opcheck(pooled: bool, kernel_backend: str) -> None:
    """Schemas, fakes (with strides) and autograd registration hold for the registered ops."""
    tensors = make_tensors(
        Case(2, 8, 3, 5, 4, pooled=True), torch.float32, device_of(kernel_backend)
    )
    grad = tensors.pop("grad_output")
    names = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    weights = [tensors[name] for name in names]
    ops = (
        torch.ops.effnet_kernels_triton if kernel_backend == "triton" else torch.ops.effnet_kernels
    )
    sums = tensors["pooled"] if pooled else None
    leaves = [t.clone().requires_grad_() for t in (tensors["input"], *weights)]
    torch.library.opcheck(ops.squeeze_excite.default, (leaves[0], sums, *leaves[1:], 3, 5))
    torch.library.opcheck(ops.squeeze_excite_gate.default, (tensors["pooled"], 20, *weights, 3, 5))
    gate, hidden = ops.squeeze_excite_gate(tensors["pooled"], 20, *weights, 3, 5)
    torch.library.opcheck(
        ops.squeeze_excite_backward.default,
        (
            grad.contiguous(memory_format=torch.channels_last), tensors["input"],
            tensors["pooled"], pooled, hidden, gate, weights[0], weights[2], 3, 5,
        ),
    )  # fmt: skip


def test_compile_fullgraph() -> None:
    """One graph, the same numbers forward and backward."""
    tensors = make_tensors(Case(2, 8, 3, 5, 4), torch.float32, "cpu")
    del tensors["grad_output"]
    image = tensors.pop("input")

    def function(x: Tensor) -> Tensor:
        return squeeze_excite(x, **tensors) * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    results = []
    for f in (function, compiled):
        x = image.clone(memory_format=torch.preserve_format).requires_grad_()
        y = f(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.ones(2, 8, 3)}, ValueError, "input: got 3 dimensions"),
        ({"input": torch.ones(2, 8, 3, 3, dtype=torch.int32)}, TypeError, "input: got dtype"),
        ({"input": torch.ones(2, 8, 0, 3)}, ValueError, "input: got shape .* expected pixels"),
        ({"reduce_weight": torch.ones(2, 7)}, ValueError, "reduce_weight: got shape"),
        ({"reduce_weight": torch.ones(2, 8, 3, 3)}, ValueError, "reduce_weight: .* 1x1 kernel"),
        ({"reduce_weight": None}, TypeError, "reduce_weight: got NoneType"),
        ({"reduce_bias": torch.ones(3)}, ValueError, "reduce_bias: got shape"),
        ({"expand_weight": torch.ones(8, 3)}, ValueError, "expand_weight: got shape"),
        ({"expand_bias": torch.ones(8, dtype=torch.int64)}, TypeError, "expand_bias: got dtype"),
        ({"pooled": torch.ones(2, 7)}, ValueError, "pooled: got shape"),
        ({"pooled": torch.ones(2, 8).half()}, TypeError, "pooled: got dtype"),
        ({"activation": "gelu"}, ValueError, "activation: got 'gelu'"),
        ({"activation": "sigmoid"}, ValueError, "activation: got 'sigmoid'"),
        ({"gate": "silu"}, ValueError, "gate: got 'silu'"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    """An error names the argument, what it got and what it needs."""
    tensors = make_tensors(Case(2, 8, 2, 3, 3), torch.float32, "cpu")
    del tensors["grad_output"]
    with pytest.raises(error, match=message):
        squeeze_excite(**{**tensors, **change})


def test_the_reference_is_a_composition() -> None:
    """The yardstick is what timm's module computes."""
    timm_layers = pytest.importorskip("timm.layers")
    module = timm_layers.SqueezeExcite(16, rd_channels=4)
    image = torch.randn(2, 16, 5, 5)
    ours = reference(
        image, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias,
        "relu", "sigmoid", pooled=None,
    )  # fmt: skip
    torch.testing.assert_close(ours, module(image))
