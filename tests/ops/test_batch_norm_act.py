"""BN + activation + residual on every kernel backend that can run here, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import FORWARD, GRADIENT, assert_error_rule
from devices import device_of, interpreted, skip_in_interpreter
from torch import Tensor

from effnet_kernels import backends, use_backend
from effnet_kernels.activations import EAGER, Activation
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


def assert_close_to(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor], case: str
) -> None:
    """The error rule for each of ``ours``, by name."""
    for name, result in ours.items():
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], result.dtype, factor
        )


def check(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Results at most 2x, gradients at most 3x eager's own error from float64."""
    tensors = make_tensors(case, dtype, device_of(backend))
    ours, eager = run(case, tensors, backend), run(case, tensors, "eager")
    exact = run(case, tensors, "eager", double=True)
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, result in ours.items():
        assert result.dtype == eager[name].dtype, name
    assert_close_to(ours, eager, exact, str(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, kernel_backend: str) -> None:
    """Forward and backward keep the error rule."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    check(case, dtype, kernel_backend)


@dataclass(frozen=True)
class FunctionCase:
    """One call of each function of csrc/ops.cpp that the ops here are composed of."""

    batch: int
    channels: int
    height: int
    width: int
    activation: str = "silu"
    batch_stats: bool = True
    gate: bool = False
    residual: bool = False
    pool: bool = False
    affine: bool = True

    def __str__(self) -> str:
        words = [f"{self.batch}x{self.channels}x{self.height}x{self.width}", self.activation]
        words += [w for w in ("batch_stats", "gate", "residual", "pool") if getattr(self, w)]
        words += [] if self.affine else ["plain"]
        return "-".join(words)


FUNCTION_CASES = [
    FunctionCase(2, 32, 9, 7, gate=True, residual=True, pool=True),
    FunctionCase(3, 24, 7, 7, "identity", residual=True),
    FunctionCase(2, 13, 5, 9, "hardswish", batch_stats=False, gate=True, pool=True),
    FunctionCase(5, 8, 1, 1, "relu6", pool=True, affine=False),
]


def make_function_tensors(
    case: FunctionCase, dtype: torch.dtype, device: str
) -> dict[str, Tensor | None]:
    """The tensors that the functions read, by name."""
    generator = torch.Generator().manual_seed(0)
    n, c = case.batch, case.channels

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def image() -> Tensor:
        x = random(n, c, case.height, case.width).to(dtype).to(device)
        return x.contiguous(memory_format=torch.channels_last)

    def values(*shape: int) -> Tensor:
        return random(*shape).float().to(device)

    return {
        "input": image() + 1.0,
        "mean": values(c),
        "var": values(c).abs() + 0.5,
        "bn_weight": values(c).abs() + 0.5 if case.affine else None,
        "bn_bias": values(c) if case.affine else None,
        "gate": values(n, c) if case.gate else None,
        "residual": image() if case.residual else None,
        "grad_output": image(),
        "grad_pooled": values(n, c) if case.pool else None,
    }


def call_functions(
    case: FunctionCase, tensors: dict[str, Tensor | None], backend: str
) -> dict[str, Tensor]:
    """What the functions write, by name, into tensors that were NaN before or are read, too."""
    t, code = tensors, Activation[case.activation]
    image, grad_output, gate = t["input"], t["grad_output"], t["gate"]

    def function(name: str, *arguments: Any) -> None:
        backends.kernel(backend, f"{name}_out")(*arguments)

    def unknown(like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)

    mean, var = unknown(t["mean"]), unknown(t["var"])
    function("channel_statistics", image, mean, var)
    results = {"mean": mean, "var": var}
    if not case.batch_stats:
        mean, var = t["mean"], t["var"]
    bn = (mean, var, t["bn_weight"], t["bn_bias"], 1e-3)

    output, pooled = unknown(image), unknown(mean.new_empty(case.batch, case.channels))
    function(
        "batch_norm_act", image, *bn, code, gate, t["residual"], output,
        pooled if case.pool else None,
    )  # fmt: skip
    results["output"] = output
    if case.pool:
        alone = unknown(pooled)
        function("batch_norm_act", image, *bn, code, gate, None, None, alone)
        results |= {"pooled": pooled, "pooled (alone)": alone}

    grad_weight, grad_bias = unknown(mean), unknown(mean)
    common = (grad_output, image, *bn, code, gate, t["grad_pooled"])
    function("batch_norm_act_sums", *common, grad_weight, grad_bias)
    results |= {"grad bn_weight": grad_weight, "grad bn_bias": grad_bias}
    statistics = (grad_weight, grad_bias) if case.batch_stats else (None, None)
    grad_input = unknown(image)
    function("batch_norm_act_backward", *common, *statistics, False, grad_input)
    # What the activation would do to it is done already; in place.
    linear = grad_output.clone()
    function(
        "batch_norm_act_backward", linear, image, *bn, code, None, None, *statistics, True, linear
    )
    results |= {"grad input": grad_input, "grad input (linear)": linear}

    if gate is not None:
        gated, grad_gate, grad_gated = unknown(image), unknown(gate), grad_output.clone()
        function(
            "batch_norm_act_gate", grad_gated, image, *bn, code, gate, grad_gate, gated, grad_gated
        )
        results |= {"grad gate": grad_gate, "gated": gated, "grad gated": grad_gated}
    return results


def function_reference(
    case: FunctionCase, tensors: dict[str, Tensor | None], ours: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The same in PyTorch's own ops. The linear gradient takes the sums as they are in ``ours``."""
    t = dict(tensors)
    dtype = t["input"].dtype

    def by_channel(x: Tensor) -> Tensor:
        return x.to(dtype)[..., None, None]

    for name, value in (("bn_weight", 1.0), ("bn_bias", 0.0)):
        if t[name] is None:
            t[name] = torch.full_like(t["mean"], value)
    leaves = {
        name: t[name].detach().clone().requires_grad_()
        for name in ("input", "bn_weight", "bn_bias", "gate")
        if t[name] is not None
    }
    image, weight, bias, gate = (
        leaves.get(name) for name in ("input", "bn_weight", "bn_bias", "gate")
    )
    with torch.no_grad():
        accumulated = image.to(t["mean"].dtype)
        var, mean = torch.var_mean(accumulated, (0, 2, 3), correction=0)
    results = {"mean": mean, "var": var}
    if not case.batch_stats:
        mean, var = t["mean"], t["var"]
    given = (None, None) if case.batch_stats else (mean, var)
    y = F.batch_norm(image, *given, weight, bias, case.batch_stats, 0.0, 1e-3)
    v = EAGER[Activation[case.activation]](y)
    gated = v if gate is None else v * by_channel(gate)
    outputs, upstream = [gated], [t["grad_output"]]
    if case.pool:
        pooled = v.sum((2, 3))
        outputs.append(pooled)
        upstream.append(t["grad_pooled"].to(dtype))
        results |= {"pooled": pooled, "pooled (alone)": pooled}
    results["output"] = gated if t["residual"] is None else gated + t["residual"]
    grads = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    results |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    linear = t["grad_output"]
    if case.batch_stats:
        invstd = (var + 1e-3).rsqrt()
        xhat = (t["input"] - by_channel(mean)) * by_channel(invstd)
        through = by_channel(ours["grad bn_bias"]) + xhat * by_channel(ours["grad bn_weight"])
        elements = image.numel() // case.channels
        linear = linear - by_channel(weight.detach() * invstd) * through / elements
    results["grad input (linear)"] = linear
    if gate is not None:
        results |= {"gated": gated, "grad gated": t["grad_output"] * by_channel(gate)}
    return results


def check_functions(case: FunctionCase, dtype: torch.dtype, backend: str) -> None:
    """Results at most 2x, gradients at most 3x eager's own error from float64."""
    tensors = make_function_tensors(case, dtype, device_of(backend))
    ours = call_functions(case, tensors, backend)
    eager = function_reference(case, tensors, ours)
    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    exact = function_reference(case, double, ours)
    assert ours.keys() == exact.keys()
    assert_close_to(ours, eager, exact, str(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FUNCTION_CASES, ids=str)
def test_functions(case: FunctionCase, dtype: torch.dtype, kernel_backend: str) -> None:
    """Each function by itself keeps the error rule, and works in place where it may."""
    if dtype != torch.float32 and interpreted(kernel_backend):
        pytest.skip("the interpreter is slow; the tests of the op have the other dtypes")
    check_functions(case, dtype, kernel_backend)


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


@pytest.mark.parametrize("activation", ["hardswish", "hardsigmoid"])
def test_sixth_has_no_bias(activation: str, kernel_backend: str) -> None:
    """Rounding goes both ways: by a rounded 1/6 all results were off by 3e-8 to one side."""
    if interpreted(kernel_backend):
        pytest.skip("Triton's interpreter rounds twice in a fused multiply-add")
    channels, device = 64, device_of(kernel_backend)
    x = torch.randn(8, channels, 32, 32, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    zero, one = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    with use_backend(kernel_backend):
        ours = batch_norm_act(x, zero, one, eps=0.0, activation=activation).output.double()
        limit = torch.full_like(x, float("inf"))
        limits = batch_norm_act(limit, zero, one, eps=0.0, activation=activation).output
    # PyTorch's own on a GPU takes a float32's 1/6 in float64, too.
    exact = getattr(F, activation)(x.double().cpu()).to(device)
    inside = (exact != 0) & (exact != 1)
    assert (ours[inside] / exact[inside] - 1).mean().abs() < 3e-9
    assert torch.equal(limits, getattr(F, activation)(limit))


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
