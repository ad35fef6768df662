"""What only Triton's interpreter can be asked, beside the shared tests in tests/ops."""

from __future__ import annotations

import pytest
import torch
from accuracy import relative_errors
from devices import device_of
from ops.depthwise_cases import Case, make_arguments, run

from effnet_kernels.triton import batch_norm_act, depthwise_conv_bn_act


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16(training: bool) -> None:
    """Loads and stores of bfloat16 are right, to what the interpreter's casts allow.

    Triton's interpreter cuts float32 off to bfloat16 toward zero, where a GPU rounds to nearest, so
    the error rule of the shared tests cannot hold in it: errors are twice as large and all of one
    sign, and add up in sums over pixels. A wrong offset or mask is far above these bounds.
    """
    case = Case(2, 24, 9, 10, kernel=5, stride=2, training=training, pool=True, prologue="silu")
    arguments = make_arguments(case, torch.bfloat16, device_of("triton"))
    exact = run(case, arguments, "eager", double=True)
    for name, result in run(case, arguments, "triton").items():
        largest, _ = relative_errors(result, exact[name])
        assert largest <= (16 if name.startswith("grad") else 2) * 2**-7, name


@pytest.mark.parametrize("stride", [1, 2])
def test_programs_of_many_tiles(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with few multiprocessors a program takes many tiles, and merges their statistics."""
    for module in (batch_norm_act, depthwise_conv_bn_act):
        monkeypatch.setattr(module, "PROGRAMS_PER_MULTIPROCESSOR", 2)
        monkeypatch.setattr(module, "multiprocessors", lambda tensor: 1)
    monkeypatch.setattr(depthwise_conv_bn_act, "GRAD_WEIGHT_PROGRAMS", 2)
    plans = [
        depthwise_conv_bn_act.conv_plan,
        depthwise_conv_bn_act.grad_input_plan,
        depthwise_conv_bn_act.grad_weight_plan,
        batch_norm_act.pixel_plan,
    ]
    case = Case(3, 40, 23, 20, stride=stride, training=True, pool=True, prologue="silu", mean=3.0)
    arguments = make_arguments(case, torch.float32, device_of("triton"))
    for plan in plans:
        plan.cache_clear()
    ours = run(case, arguments, "triton")
    for plan in plans:
        plan.cache_clear()
    eager = run(case, arguments, "eager")
    exact = run(case, arguments, "eager", double=True)
    for name, result in ours.items():
        for error, eagers in zip(
            relative_errors(result, exact[name]), relative_errors(eager[name], exact[name]),
            strict=True,
        ):  # fmt: skip
            assert error <= max(3 * eagers, 4 * torch.finfo(torch.float32).eps), name
