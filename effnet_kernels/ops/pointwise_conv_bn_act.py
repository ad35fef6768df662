r"""Pointwise (1x1) convolution + BatchNorm + activation + residual: a matrix product whose prologue
and epilogue take the passes over memory that surround it.

    z = prologue(input) * gate                    gate: (N, C), of squeeze-and-excitation
    output = activation(batch_norm(z @ weight.T)) + residual

Memory traffic in inference, in activation tensors read + written (x: the input, y: the output's
size)

=====================  ===================  ====================  =============
step                   eager                conv fused with BN,   this op
                                            the rest separate
=====================  ===================  ====================  =============
gate                   2x                   2x                    \
conv                   x + y                x + y                 x + y
BN                     2y                   -                     -
activation             2y                   2y                    -
residual               3y                   3y                    y
pool (of the head)     y                    y                     -
**project of MBConv**  **3x + 6y**          **3x + 4y**           **x + 2y**
**head**               **x + 6y**           **x + 4y**            **x + y**
=====================  ===================  ====================  =============

(A project convolution has a gate, no activation and a residual; the head has an activation and is
pooled.) 16-bit products are of the operands as they are stored, accumulated in float32; float32
products are exact to float32 unless PyTorch's own switch for its convolutions allows TF32.

Source: MBConv of "EfficientNet: Rethinking Model Scaling for CNNs" (arXiv:1905.11946) after
"MobileNetV2" (arXiv:1801.04381).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.activations import activation_code
from effnet_kernels.ops import checks, library
from effnet_kernels.ops.batch_norm_act import reference as batch_norm_reference
from effnet_kernels.ops.prologue import (
    Prologue,
    check_prologue,
    kernel_prologue,
    reference_prologue,
)

OP = "pointwise_conv_bn_act"


class PointwiseConvBnActOutput(NamedTuple):
    """Results of ``pointwise_conv_bn_act``.

    Attributes:
        output: (N, K, H, W), channels-last, the input's dtype.
        pooled: (N, K) float32 sums of the output over height and width (before it is rounded to
            its dtype), or None unless ``pool``.
    """

    output: Tensor
    pooled: Tensor | None


def pointwise_conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    prologue: Prologue | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    pool: bool = False,
) -> PointwiseConvBnActOutput:
    """``activation(batch_norm(conv2d(prologue(input) * gate, weight))) + residual``, one kernel.

    In inference only: a gradient through it is an error. Under autocast, ``input``, ``weight`` and
    ``residual`` are cast as ``conv2d`` casts its arguments.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64; channels-last is taken as it is,
            other layouts are converted once.
        weight: (K, C) or (K, C, 1, 1), the input's dtype.
        running_mean: (K,), the mean to normalise by.
        running_var: (K,), the biased variance to normalise by.
        bn_weight: (K,) or None for ones.
        bn_bias: (K,) or None for zeros.
        eps: added to the variance.
        activation: identity, relu, relu6, silu, hardswish, sigmoid or hardsigmoid.
        prologue: an affine map and activation applied to ``input`` first.
        gate: (N, C), floating point, multiplied into each image after the prologue.
        residual: (N, K, H, W), the input's dtype, added last.
        pool: also return the sums over height and width.

    Returns:
        The output, and the sums if ``pool``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's rank, shape, device or value is wrong. Both name the argument, and
            come before any kernel runs.
        RuntimeError: the backend that ``use_backend`` demands cannot take the call; or, in
            backward, a gradient was asked for.
    """
    checks.check_image("input", input)
    device = input.device
    low = checks.autocast_dtype(input)
    if low is not None:
        input = input.to(low)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            weight = weight.to(low)
        if isinstance(residual, Tensor) and residual.is_floating_point():
            residual = residual.to(low)
    n, channels, height, width = input.shape
    weight = checks.check_pointwise_weight("weight", weight, input, channels)
    features = weight.shape[0]
    vectors: tuple[tuple[str, Tensor | None], ...] = (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
    )
    for argument, vector in vectors:
        if vector is None and argument.startswith("running"):
            raise TypeError(f"{argument}: got None, expected a Tensor")
        checks.check_channel_vector(argument, vector, features, device, "the rows of weight")
    checks.check_eps("eps", eps)
    code = int(activation_code("activation", activation))
    prologue_code = check_prologue(prologue, channels, device)
    if gate is not None:
        checks.check_shape("gate", gate, (n, channels), device)
    checks.check_residual(residual, (n, features, height, width), input)

    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, weight, running_mean, running_var, bn_weight, bn_bias, eps, activation,
            prologue=prologue, gate=gate, residual=residual, pool=pool,
        )  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    scale, shift = kernel_prologue(prologue, input)
    output, pooled = _INFERENCE[backend](
        input,
        weight.contiguous(),
        checks.kernel_vector(running_mean, input),
        checks.kernel_vector(running_var, input),
        checks.kernel_vector(bn_weight, input),
        checks.kernel_vector(bn_bias, input),
        eps,
        code,
        scale,
        shift,
        prologue_code,
        None if gate is None else gate.to(checks.accumulator(input)).contiguous(),
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        pool,
        allows_tf32(input),
    )
    return PointwiseConvBnActOutput(output, pooled if pool else None)


def allows_tf32(input: Tensor) -> bool:
    """Whether PyTorch's own convolution would round ``input`` to TF32."""
    return input.is_cuda and input.dtype == torch.float32 and torch.backends.cudnn.allow_tf32


def reference(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    activation: str,
    *,
    prologue: Prologue | None,
    gate: Tensor | None,
    residual: Tensor | None,
    pool: bool,
) -> PointwiseConvBnActOutput:
    """``pointwise_conv_bn_act`` in PyTorch's own ops: the eager backend, and the tests' yardstick.

    Arguments as there, checked.
    """
    x = reference_prologue(input, prologue)
    if gate is not None:
        x = x * gate.to(x.dtype)[:, :, None, None]
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device)  # the meta device, for one, has none
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        y = F.conv2d(x, weight.flatten(1)[:, :, None, None])
    y = batch_norm_reference(
        y, running_mean, running_var, bn_weight, bn_bias, False, eps, activation,
        residual=residual, sample_scale=None,
    ).output  # fmt: skip
    return PointwiseConvBnActOutput(y, y.sum((2, 3), dtype=checks.accumulator(y)) if pool else None)


# --------------------------------------------------------------------------------------------------
# The registered functional op (see depthwise_conv_bn_act.py).
# --------------------------------------------------------------------------------------------------


def allocate(input: Tensor, weight: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
    """The output and its sums (no elements unless ``pool``)."""
    n, _, height, width = input.shape
    features = weight.shape[0]
    output = library.empty_image(input, features, height, width)
    pooled = torch.empty(
        (n, features) if pool else (0,), dtype=checks.accumulator(input), device=input.device
    )
    return output, pooled


def _inference(
    backend: str, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    gate: Tensor | None, residual: Tensor | None, pool: bool, allow_tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    output, pooled = allocate(input, weight, pool)
    if output.numel() == 0:
        return output, pooled.zero_()
    larger = max(input, output, key=Tensor.numel)
    backends.fastest_kernel(backend, f"{OP}_out", larger)(
        input, weight, mean, var, bn_weight, bn_bias, eps, activation,
        prologue_scale, prologue_shift, prologue_activation, gate, residual, allow_tf32,
        output, pooled if pool else None,
    )  # fmt: skip
    return output, pooled


def _inference_fake(
    input: Tensor, weight: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    gate: Tensor | None, residual: Tensor | None, pool: bool, allow_tf32: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return allocate(input, weight, pool)


_INFERENCE: dict[str, Any] = library.register(
    OP,
    "(Tensor input, Tensor weight, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
    "float eps, int activation, Tensor? prologue_scale, Tensor? prologue_shift, "
    "int prologue_activation, Tensor? gate, Tensor? residual, bool pool, bool allow_tf32) "
    "-> (Tensor output, Tensor pooled)",
    implementation=_inference,
    fake=_inference_fake,
)
library.not_differentiable(OP, f"{OP} has no derivative: it is for inference")
