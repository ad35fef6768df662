"""MBConv with gradients on every kernel backend that can run here, against float64 and eager."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from devices import device_of, interpreted, skip_in_interpreter
from ops.block_cases import Case, in_double
from ops.test_mbconv import CASES as INFERENCE_CASES
from ops.test_mbconv import make_arguments
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import ConvBn, SqueezeExcite, mbconv_train

CASES = [dataclasses.replace(c, batch=max(c.batch, 2)) for c in INFERENCE_CASES]


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What gradients are wanted of, by name."""
    found = {"input": arguments["input"]}
    for stage, value in arguments.items():
        if isinstance(value, (ConvBn, SqueezeExcite)):
            for name, tensor in value._asdict().items():
                if isinstance(tensor, Tensor) and not name.startswith("running"):
                    found[f"{stage}.{name}"] = tensor
    return found


def run(
    arguments: dict[str, Any], backend: str, *, training: bool, sample_scale: Tensor | None = None
) -> dict[str, Tensor]:
    """The output, the statistics and every gradient, by name."""
    wanted = {name: t.requires_grad_() for name, t in leaves(arguments).items()}
    with use_backend(backend):
        result = mbconv_train(**arguments, training=training, sample_scale=sample_scale)
        output = result.output
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(output.shape, generator=generator).to(output.dtype).to(output.device)
        grads = torch.autograd.grad(output, list(wanted.values()), grad)
    results = {"output": output}
    for stage in ("expand", "depthwise", "project"):
        statistics = getattr(result, stage)
        if statistics is not None:
            results |= {f"{stage} mean": statistics.mean, f"{stage} var": statistics.var}
            results[f"{stage} elements"] = torch.tensor(float(statistics.elements))
    return results | {f"grad {name}": g for name, g in zip(wanted, grads, strict=True)}


def check(
    case: Case, dtype: torch.dtype, backend: str, *, training: bool = True, scaled: bool = False
) -> None:
    """Results at most 2x, gradients at most 3x eager's own error from float64.

    A block is a dozen operations deep and the results are few: where eager happens to be exact, a
    dozen roundings of float32 are allowed, or two of 16 bits. Four times as many where batch
    statistics are those of two values: the gradient through them is the small difference of two.
    """
    if dtype != torch.float32 and case.project_activation == "relu6":
        # One result on the other side of a kink, by a rounding, changes a sum of few gradients.
        case = dataclasses.replace(case, project_activation="silu")
    arguments = make_arguments(case, dtype, device_of(backend))
    scale = None
    if scaled:
        scale = torch.tensor([1.25, 0.0] * case.batch)[: case.batch].to(device_of(backend))
    ours = run(arguments, backend, training=training, sample_scale=scale)
    eager = run(arguments, "eager", training=training, sample_scale=scale)
    exact = run(in_double(arguments), "eager", training=training, sample_scale=scale)
    roundings = 16 if dtype == torch.float32 else 2
    if training and arguments["input"][:, 0].numel() == 2:
        roundings *= 4
    assert ours.keys() == exact.keys()
    assert ours["output"].dtype == dtype
    assert ours["output"].is_contiguous(memory_format=torch.channels_last)
    for name, result in ours.items():
        assert result.dtype == eager[name].dtype, name
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_error_rule(
            f"{name} of {case}",
            result,
            eager[name],
            exact[name],
            dtype,
            factor,
            roundings=roundings,
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype, training: bool, kernel_backend: str) -> None:
    """Every kind of block, with batch statistics and running ones."""
    skip_in_interpreter(kernel_backend, dtype, CASES.index(case))
    usual = dtype == torch.float32 and training
    if interpreted(kernel_backend) and case not in CASES[:2] and not usual:
        pytest.skip("the interpreter is slow; the tests of the kernels have the rest")
    check(case, dtype, kernel_backend, training=training)


@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_drop_path(case: Case, kernel_backend: str) -> None:
    """Images that drop path leaves out, and that it makes up for."""
    check(case, torch.float32, kernel_backend, scaled=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("expanded", [4, 0])
def test_gradcheck(expanded: int, training: bool) -> None:
    """The derivative is the function's, in float64."""
    case = Case(2, 3, expanded, 3, 3, 4, squeezed=2, residual=True)
    arguments = in_double(make_arguments(case, torch.float64, "cpu"))
    names = list(leaves(arguments))

    def function(*values: Tensor) -> Tensor:
        call = dict(arguments)
        for name, value in zip(names, values, strict=True):
            stage, _, field = name.partition(".")
            call[stage] = call[stage]._replace(**{field: value}) if field else value
        return mbconv_train(**call, training=training).output

    values = [t.requires_grad_() for t in leaves(arguments).values()]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_only_convolutions_are_saved() -> None:
    """The input and what the three convolutions computed, and little else."""
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
        mbconv_train(**arguments)
    n, pixels = case.batch, case.height * case.width
    convolutions = n * pixels * (2 * case.channels + 2 * case.expanded)
    assert convolutions <= sum(saved.values()) <= convolutions + 20 * n * case.expanded


def test_double_backward_is_an_error(kernel_backend: str) -> None:
    """A second derivative is refused in words."""
    arguments = make_arguments(CASES[0], torch.float32, device_of(kernel_backend))
    x = arguments["input"].requires_grad_()
    with use_backend(kernel_backend):
        output = mbconv_train(**arguments).output
        (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            grad.sum().backward()


def test_errors() -> None:
    """Bad arguments are named before anything runs."""
    arguments = make_arguments(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match="sample_scale: got shape"):
        mbconv_train(**arguments, sample_scale=torch.ones(3))
    with pytest.raises(ValueError, match="one value a channel"):
        mbconv_train(**{**arguments, "input": torch.zeros(1, 16, 1, 1)})
    with pytest.raises(TypeError, match=r"depthwise\.running_mean: got None"):
        mbconv_train(
            **{**arguments, "depthwise": arguments["depthwise"]._replace(running_mean=None)},
            training=False,
        )
