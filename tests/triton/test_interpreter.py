"""What only Triton's interpreter can be asked, beside the shared tests in tests/ops."""

from __future__ import annotations

import pytest
import torch
from accuracy import relative_errors
from devices import device_of
from ops import test_pointwise_conv_bn_act as pointwise
from ops.depthwise_cases import Case, make_arguments, run

from effnet_kernels.activations import Activation
from effnet_kernels.triton import batch_norm_act, depthwise_conv_bn_act, pointwise_conv_bn_act


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
    monkeypatch.setattr(depthwise_conv_bn_act, "PACK_FROM", 0)
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


@pytest.mark.parametrize("channels", [16, 72])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_of_many_tiles(batch: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program walks over the tiles of an image, or they are many programs with sums to add."""
    module = pointwise_conv_bn_act
    monkeypatch.setattr(module, "PROGRAMS_PER_MULTIPROCESSOR", 2)
    monkeypatch.setattr(module, "multiprocessors", lambda tensor: 1)
    case = pointwise.Case(
        batch, channels, 24, 23, 20, prologue="silu", gate=True, residual=True, pool=True
    )
    module.pointwise_plan.cache_clear()
    pointwise.check(case, torch.float32, "triton")
    module.pointwise_plan.cache_clear()


@pytest.mark.parametrize("programs", [2, 6, 64])
@pytest.mark.parametrize("frozen", [False, True], ids=["train", "frozen"])
def test_images_of_programs(frozen: bool, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program walks over all images, over two, or over a part of one, in every kernel of BN.

    Vectors are slices of one tensor, of the image's dtype or float32, and gradients are in place.
    """
    module = batch_norm_act
    monkeypatch.setattr(module, "PROGRAMS_PER_MULTIPROCESSOR", programs)
    monkeypatch.setattr(module, "multiprocessors", lambda tensor: 1)
    N, C, H, W, eps, silu = 5, 40, 9, 8, 1e-3, Activation.silu
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device_of("triton"))

    def image() -> torch.Tensor:
        return random(N, C, H, W).contiguous(memory_format=torch.channels_last)

    x, residual, grad = image() + 3.0, image(), image()
    mean, var, weight, bias = random(4 * C + 1)[1:].split(C)
    var.square_().add_(0.5)
    bias = bias.half()
    gate, grad_pooled = random(2, N, C)

    exact_x = x.double().requires_grad_()
    exact_weight, exact_bias = (t.double().requires_grad_() for t in (weight, bias))
    module.pixel_plan.cache_clear()
    exact_mean, exact_var = mean.double(), var.double()
    if not frozen:
        module.channel_statistics_out(x, mean, var)
        exact_var, exact_mean = torch.var_mean(exact_x, (0, 2, 3), correction=0)

    def by_channel(t: torch.Tensor) -> torch.Tensor:
        return t[..., None, None]

    u = (exact_x - by_channel(exact_mean)) / by_channel(exact_var + eps).sqrt()
    u = u * by_channel(exact_weight) + by_channel(exact_bias)
    v = torch.nn.functional.silu(u)
    gated = v * by_channel(gate.double())
    upstream = (gated * grad).sum() + (v.sum((2, 3)) * grad_pooled).sum()
    exact = torch.autograd.grad(upstream, [exact_x, exact_weight, exact_bias], retain_graph=True)
    (du,) = torch.autograd.grad(upstream, u)
    first = du * by_channel(exact_weight / (exact_var + eps).sqrt())

    bn = (mean, var, weight, bias, eps)
    output, gated_again = image(), image()
    pooled, alone, grad_gate = random(3, N, C)
    module.batch_norm_act_out(x, *bn, silu, gate, residual, output, pooled)
    module.batch_norm_act_out(x, *bn, silu, None, None, None, alone)
    grad_gated = grad.clone(memory_format=torch.preserve_format)
    module.batch_norm_act_gate_out(
        grad_gated, x, *bn, silu, gate, grad_gate, gated_again, grad_gated
    )
    grad_weight, grad_bias = random(2 * C + 1)[1:].split(C)
    module.batch_norm_act_sums_out(grad, x, *bn, silu, gate, grad_pooled, grad_weight, grad_bias)
    through = (None, None) if frozen else (grad_weight, grad_bias)
    grad_input = grad.clone(memory_format=torch.preserve_format)
    module.batch_norm_act_backward_out(
        grad_input, x, *bn, silu, gate, grad_pooled, *through, False, grad_input
    )
    linear = first.float().contiguous(memory_format=torch.channels_last)
    module.batch_norm_act_backward_out(
        linear, x, *bn, Activation.identity, None, None, *through, True, linear
    )
    module.pixel_plan.cache_clear()
    for name, result, expected in (
        ("mean", mean, exact_mean),
        ("var", var, exact_var),
        ("output", output, gated + residual),
        ("pooled", pooled, v.sum((2, 3))),
        ("pooled alone", alone, v.sum((2, 3))),
        ("grad_gate", grad_gate, (v * grad).sum((2, 3))),
        ("gated", gated_again, gated),
        ("grad_gated", grad_gated, grad * by_channel(gate.double())),
        ("grad_input", grad_input, exact[0]),
        ("grad_input, linear", linear, exact[0]),
        ("grad_weight", grad_weight, exact[1]),
        ("grad_bias", grad_bias, exact[2]),
    ):
        largest, _ = relative_errors(result, expected.detach())
        assert largest <= 16 * torch.finfo(torch.float32).eps, name


def test_statistics_about_a_far_center() -> None:
    """The first tile of a program may be of quite other values than the rest."""
    x = torch.randn(1, 16, 64, 64, generator=torch.Generator().manual_seed(0)) + 1000.0
    x[:, :, 0] = 0.0
    x = x.to(device_of("triton")).contiguous(memory_format=torch.channels_last)
    mean, var = x.new_empty(2, 16)
    batch_norm_act.channel_statistics_out(x, mean, var)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    for result, exact in ((mean, exact_mean), (var, exact_var)):
        largest, _ = relative_errors(result, exact)
        assert largest <= 4 * torch.finfo(torch.float32).eps
