"""Fused-MBConv with gradients on every kernel backend that can run here, against float64 and
eager.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from devices import device_of, interpreted, skip_in_interpreter
from ops.block_cases import Case, in_double
from ops.test_fused_mbconv import CASES as INFERENCE_CASES
from ops.test_fused_mbconv import make_arguments
from ops.test_mbconv_train import leaves
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import fused_mbconv_train

CASES = [dataclasses.replace(c, batch=max(c.batch, 2)) for c in INFERENCE_CASES]


def run(
    arguments: dict[str, Any], backend: str, *, training: bool, sample_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """The output, the statistics and every gradient, by name."""
    wanted = {name: t.requires_grad_() for name, t in leaves(arguments).items()}
    with use_backend(backend):
        result = fused_mbconv_train(**arguments, training=training, sample_scale=sample_scale)
        output = result.output
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=generator).to(output.dtype).to(output.device)
        grads = torch.autograd.grad(output, list(wanted.values()), grad)
    results = {"output": output}
    for stage in ("expand", "project"):
        statistics = getattr(result, stage)
        if statistics is not None:
            results |= {f"{stage} mean": statistics.mean, f"{stage} var": statistics.var}
            results[f"{stage} elements"] = torch.tensor(float(statistics.elements))
    return results | {f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}


def check(
    case: Case, dtype: torch.dtype, backend: str, *, training: bool = True, scaled: bool = False
) -> None:
    """Results at most 2x, gradients at most 3x eager's own error from float64; as in
    ``test_mbconv_train``, a few roundings are always allowed.
    """
    if dtype != torch.float32:
        # One result on the other side of a kink, by a rounding, changes a sum of few gradients.
        smooth = {"relu6": "silu", "relu": "silu"}
        case = dataclasses.replace(
            case,
            activation=smooth.get(case.activation, case.activation),
            project_activation=smooth.get(case.project_activation, case.project_activation),
        )
    arguments = make_arguments(case, dtype, device_of(backend))
    scale = None
    if scaled:
        scale = torch.tensor([1.25, 0.0] * case.batch)[: case.batch].to(device_of(backend))
    ours = run(arguments, backend, training=training, sample_scale=scale)
    eager = run(arguments, "eager", training=training, sample_scale=scale)
    exact = run(in_double(arguments), "eager", training=training, sample_scale=scale)
    roundings = 16 if dtype == torch.float32 else 2
    if training and ours["output"][:, 0].numel() == 2:
        roundings *= 4
    assert ours.keys() == exact.keys()
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, result in ours.items():
        assert result.dtype == eager[name].dtype, name
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], dtype, factor,
            roundings=roundings,
        )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, training: bool, kernel_backend: str) -> None:
    """Every kind of block, with batch statistics and running ones."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    usual = dtype == torch.float32 and training
    if interpreted(kernel_backend) and not (usual and CASES.index(case) in (2, 7)):
        pytest.skip("the interpreter is slow; the tests of the kernels have the rest")
    check(case, dtype, kernel_backend, training=training)


@pytest.mark.parametrize("case", [CASES[7], CASES[1], CASES[5]], ids=str)
def test_drop_path(case: Case, kernel_backend: str) -> None:
    """Images that drop path leaves out, and that it makes up for."""
    check(case, torch.float32, kernel_backend, scaled=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", [
    Case(2, 3, 4, 3, 3, 4, squeezed=2, residual=True),
    Case(2, 3, 5, 4, 4, 5, stride=2),
    Case(2, 3, 3, 0, 4, 3, residual=True),
], ids=str)  # fmt: skip
def test_gradcheck(case: Case, training: bool) -> None:
    """The derivative is the function's, in float64."""
    arguments = in_double(make_arguments(case, torch.float64, "cpu"))
    names = list(leaves(arguments))

    def function(*values: Tensor) -> Tensor:
        call = dict(arguments)
        for name, value in zip(names, values, strict=True):
            stage, _, field = name.partition(".")
            call[stage] = call[stage]._replace(**{field: value}) if field else value
        return fused_mbconv_train(**call, training=training).output

    values = [t.requires_grad_() for t in leaves(arguments).values()]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_only_convolutions_are_saved() -> None:
    """The input and what the two convolutions computed, and little else."""
    case = Case(4, 16, 96, 16, 16, 16, squeezed=4, residual=True)
    arguments = make_arguments(case, torch.float32, "cpu")
    for tensor in leaves(arguments).values():
        tensor.requires_grad_()
    parameters = {t.data_ptr() for t in leaves(arguments).values()} - {
        arguments["input"].data_ptr()
    }
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_mbconv_train(**arguments)
    n, pixels = case.batch, case.height * case.width
    convolutions = n * pixels * (2 * case.channels + case.expanded)
    assert convolutions <= sum(saved.values()) <= convolutions + 20 * n * case.expanded


def test_double_backward_is_an_error(kernel_backend: str) -> None:
    """A second derivative is refused in words."""
    arguments = make_arguments(CASES[7], torch.float32, device_of(kernel_backend))
    x = arguments["input"].requires_grad_()
    with use_backend(kernel_backend):
        output = fused_mbconv_train(**arguments).output
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_autocast(kernel_backend: str) -> None:
    """Weights keep their dtype, and so do their gradients."""
    if interpreted(kernel_backend):
        pytest.skip("the interpreter truncates to bfloat16")
    device = device_of(kernel_backend)
    arguments = make_arguments(CASES[0], torch.float32, device)
    wanted = {name: t.requires_grad_() for name, t in leaves(arguments).items()}
    with torch.autocast(device, torch.bfloat16), use_backend(kernel_backend):
        output = fused_mbconv_train(**arguments).output
    assert output.dtype == torch.float32, "the residual's"
    grads = torch.autograd.grad(output.sum(), list(wanted.values()))
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_errors() -> None:
    """Bad arguments are named before anything runs."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="sample_scale: got shape"):
        fused_mbconv_train(**arguments, sample_scale=torch.ones(3))
    with pytest.raises(ValueError, match="one result a channel"):
        fused_mbconv_train(**{**arguments, "input": torch.zeros(1, 16, 1, 1)})
    with pytest.raises(TypeError, match=r"expand\.running_mean: got None"):
        fused_mbconv_train(
            **{**arguments, "expand": arguments["expand"]._replace(running_mean=None)},
            training=False,
        )
