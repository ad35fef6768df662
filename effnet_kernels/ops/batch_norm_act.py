r"""BatchNorm + activation + residual, after any convolution: one pass where eager takes three.

    v = activation(batch_norm(input))
    output = v * sample_scale + residual              sample_scale: (N,), of drop path

Memory traffic, in activation tensors read + written (y: all of one size)

====================  ===========  ================
step                  eager        this op
====================  ===========  ================
training: statistics  y            y
          normalise   2y           \
          activation  2y           \
          drop path   2y           \
          residual    3y           3y
          **all**     **10y**      **4y**
backward: sums        2y           2y
          the rest    3y + 3y +2y  3y
          **all**     **10y**      **5y**
saved                 2y           y
====================  ===========  ================

The activation is recomputed in backward, so that only the convolution's output is kept. This module
also has what other ops do alike.

Source: "Batch Normalization" (arXiv:1502.03167); drop path is "Deep Networks with Stochastic Depth"
(arXiv:1603.09382).
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.activations import EAGER, Activation, activation_code
from effnet_kernels.ops import checks, library

OP = "batch_norm_act"


class BatchNormActOutput(NamedTuple):
    """Results of ``batch_norm_act``.

    Attributes:
        output: (N, C, H, W), channels-last, the input's dtype.
        batch_mean: (C,) float32 mean of the input over N, H, W, or None unless ``training``. Not
            differentiable.
        batch_var: (C,) float32 biased variance, likewise.
    """

    output: Tensor
    batch_mean: Tensor | None
    batch_var: Tensor | None


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    training: bool = False,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
) -> BatchNormActOutput:
    """``activation(batch_norm(input)) * sample_scale + residual``, fused, differentiable.

    Functional: in training the batch statistics are returned, and updating the running ones is the
    caller's. Gradients reach ``input``, ``bn_weight``, ``bn_bias`` and ``residual``. A second
    derivative is an error.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64; channels-last is taken as it is,
            other layouts are converted once.
        running_mean: (C,), the mean to normalise by; unused (may be None) in training.
        running_var: (C,), the biased variance to normalise by; likewise.
        bn_weight: (C,) or None for ones.
        bn_bias: (C,) or None for zeros.
        training: normalise by the statistics of this batch instead of the running ones.
        eps: added to the variance.
        activation: identity, relu, relu6, silu, hardswish, sigmoid or hardsigmoid.
        residual: (N, C, H, W), the input's dtype.
        sample_scale: (N,), floating point, one factor an image.

    Returns:
        The output, and the batch statistics in training.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's rank, shape, device or value is wrong. Both name the argument, and
            come before any kernel runs.
        RuntimeError: the backend that ``use_backend`` demands cannot take the call.
    """
    checks.check_image("input", input)
    n, channels, height, width = input.shape
    device = input.device
    checks.check_batch_norm(
        running_mean, running_var, bn_weight, bn_bias, channels, device, training=training
    )
    checks.check_eps("eps", eps)
    code = int(activation_code("activation", activation))
    checks.check_residual(residual, (n, channels, height, width), input)
    if sample_scale is not None:
        checks.check_shape("sample_scale", sample_scale, (n,), device)
    if training and n * height * width == 1:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, one value a channel; training needs more"
        )

    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, running_mean, running_var, bn_weight, bn_bias, training, eps, activation,
            residual=residual, sample_scale=sample_scale,
        )  # fmt: skip
    output, batch_mean, batch_var = _FORWARD[backend](
        input.contiguous(memory_format=torch.channels_last),
        None if training else checks.kernel_vector(running_mean, input),
        None if training else checks.kernel_vector(running_var, input),
        checks.kernel_vector(bn_weight, input),
        checks.kernel_vector(bn_bias, input),
        eps,
        code,
        None if residual is None else residual.contiguous(memory_format=torch.channels_last),
        None if sample_scale is None else sample_scale.to(checks.accumulator(input)),
    )
    if not training:
        return BatchNormActOutput(output, None, None)
    return BatchNormActOutput(output, batch_mean, batch_var)


def reference(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    training: bool,
    eps: float,
    activation: str,
    *,
    residual: Tensor | None,
    sample_scale: Tensor | None,
) -> BatchNormActOutput:
    """``batch_norm_act`` in PyTorch's own ops: the eager backend, and the tests' yardstick."""
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device)  # the meta device, for one, has none
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        mean, var, weight, bias = (
            # batch_norm takes no mixture with float64
            t.double() if t is not None and input.dtype == torch.float64 else t
            for t in (running_mean, running_var, bn_weight, bn_bias)
        )
        if training:
            y = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
        else:
            y = F.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
        y = EAGER[Activation[activation]](y)
        if sample_scale is not None:
            y = y * sample_scale.to(y.dtype)[:, None, None, None]
        if residual is not None:
            y = y + residual
    y = y.contiguous(memory_format=torch.channels_last)
    if not training:
        return BatchNormActOutput(y, None, None)
    with torch.no_grad():
        if input.numel() == 0:
            zeros = input.new_zeros(input.shape[1], dtype=checks.accumulator(input))
            return BatchNormActOutput(y, zeros, zeros.clone())
        var, mean = torch.var_mean(input.to(checks.accumulator(input)), (0, 2, 3), correction=0)
    return BatchNormActOutput(y, mean, var)


def per_sample(sample_scale: Tensor | None, channels: int) -> Tensor | None:
    """One factor an image as the kernels read it: (N, C)."""
    if sample_scale is None:
        return None
    return sample_scale[:, None].expand(-1, channels).contiguous()


# --------------------------------------------------------------------------------------------------
# The registered functional ops (see depthwise_conv_bn_act.py).
# --------------------------------------------------------------------------------------------------


def _allocate(input: Tensor, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = 0 if frozen else input.shape[1]
    dtype = checks.accumulator(input)
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        input.new_empty(size, dtype=dtype),
        input.new_empty(size, dtype=dtype),
    )


def _forward(
    backend: str, input: Tensor, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    residual: Tensor | None, sample_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    output, batch_mean, batch_var = _allocate(input, mean is not None)
    if output.numel() == 0:
        return output, batch_mean.zero_(), batch_var.zero_()
    if mean is None or var is None:
        backends.kernel(backend, "channel_statistics_out")(input, batch_mean, batch_var)
        mean, var = batch_mean, batch_var
    backends.kernel(backend, "batch_norm_act_out")(
        input, mean, var, bn_weight, bn_bias, eps, activation,
        per_sample(sample_scale, input.shape[1]), residual, output, None,
    )  # fmt: skip
    return output, batch_mean, batch_var


def _forward_fake(
    input: Tensor, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    residual: Tensor | None, sample_scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate(input, mean is not None)


def _allocate_backward(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = checks.accumulator(input)
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        input.new_empty(input.shape[1], dtype=dtype),
        input.new_empty(input.shape[1], dtype=dtype),
    )


def _backward(
    backend: str, grad_output: Tensor, input: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    sample_scale: Tensor | None, batch_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    if input.numel() == 0:
        grads = _allocate_backward(input)
        for grad in grads:
            grad.zero_()
        return grads
    grads = _allocate_backward(input)
    backward_out(
        backend, grad_output, input, (mean, var, bn_weight, bn_bias, eps), activation,
        per_sample(sample_scale, input.shape[1]), batch_stats, *grads,
    )  # fmt: skip
    return grads


BatchNorm = tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]
"""Mean, variance, weight, bias and eps, as the kernels take them."""


def backward_out(
    backend: str, grad_output: Tensor, input: Tensor, bn: BatchNorm, activation: int,
    gate: Tensor | None, batch_stats: bool, grad_input: Tensor, grad_bn_weight: Tensor,
    grad_bn_bias: Tensor, grad_pooled: Tensor | None = None,
) -> None:  # fmt: skip
    """The gradients of ``input`` and of BN's weight and bias, where there are elements.

    Args:
        backend: a kernel backend's name.
        grad_output: (N, C, H, W), channels-last.
        input: what BN was applied to, likewise.
        bn: how.
        activation: the code of the activation after it.
        gate: (N, C) factors after that, or None.
        batch_stats: ``bn`` is by the statistics of ``input`` itself.
        grad_input: written, like the two that follow.
        grad_bn_weight: (C,).
        grad_bn_bias: (C,).
        grad_pooled: (N, C), the gradient of the sums of the activation's results, or None.
    """
    common = (grad_output, input, *bn, activation, gate, grad_pooled)
    backends.kernel(backend, "batch_norm_act_sums_out")(*common, grad_bn_weight, grad_bn_bias)
    statistics = (grad_bn_weight, grad_bn_bias) if batch_stats else (None, None)
    backends.kernel(backend, "batch_norm_act_backward_out")(*common, *statistics, False, grad_input)


def affine_out(backend: str, bn: BatchNorm, scale: Tensor, shift: Tensor) -> None:
    """``bn`` as a prologue has it, ``x * scale + shift``, in two launches.

    Args:
        backend: a kernel backend's name.
        bn: of C channels.
        scale: (C,), float32 or float64; written, like the one that follows.
        shift: (C,).
    """
    *vectors, eps = bn
    mean, var, weight, bias = (_of_dtype(t, scale.dtype) for t in vectors)
    assert mean is not None and var is not None
    standardise_out(backend, torch.ones_like(scale) if weight is None else weight, var, eps, scale)
    if bias is None:
        torch.mul(mean, scale, out=shift).neg_()
    else:
        torch.addcmul(bias, mean, scale, value=-1, out=shift)


def _of_dtype(vector: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``vector.to(dtype)``, which takes longer where there is nothing to do."""
    return vector if vector is None or vector.dtype == dtype else vector.to(dtype)


def standardise_out(backend: str, values: Tensor, var: Tensor, eps: float, out: Tensor) -> None:
    """``out = values / sqrt(var + eps)``, (C,) each, in one launch: that of BN's derivative at a
    single pixel. All are of one dtype, float32 or float64; ``out`` may be ``values``.
    """
    result = out.view(1, -1, 1, 1)
    image = result if values is out else values.view(1, -1, 1, 1)
    backends.kernel(backend, "batch_norm_act_backward_out")(
        image, image, var, var, None, None, eps, int(Activation.identity), None, None, None, None,
        False, result,
    )  # fmt: skip


def _backward_fake(
    grad_output: Tensor, input: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, activation: int,
    sample_scale: Tensor | None, batch_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_backward(input)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, mean, var, bn_weight, bn_bias, eps, activation, _, sample_scale = inputs
    _, batch_mean, batch_var = output
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.set_materialize_grads(False)
    ctx.batch_stats = mean is None
    ctx.save_for_backward(
        input, batch_mean if mean is None else mean, batch_var if var is None else var,
        bn_weight, bn_bias, sample_scale,
    )  # fmt: skip
    ctx.eps, ctx.activation = eps, activation


def _autograd_backward(
    backend: str, ctx: Any, grad_output: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * len(needs)
    input, mean, var, bn_weight, bn_bias, sample_scale = ctx.saved_tensors
    grad_input = grad_weight = grad_bias = None
    if needs[0] or needs[3] or needs[4]:
        grad_input, grad_weight, grad_bias = _BACKWARD[backend](
            grad_output, input, mean, var, bn_weight, bn_bias, ctx.eps, ctx.activation,
            sample_scale, ctx.batch_stats,
        )  # fmt: skip
    return (
        grad_input if needs[0] else None,
        None,
        None,
        grad_weight.to(bn_weight.dtype) if needs[3] and grad_weight is not None else None,
        grad_bias.to(bn_bias.dtype) if needs[4] and grad_bias is not None else None,
        None,
        None,
        grad_output if needs[7] else None,
        None,
    )


_FORWARD = library.register(
    OP,
    "(Tensor input, Tensor? mean, Tensor? var, Tensor? bn_weight, Tensor? bn_bias, float eps, "
    "int activation, Tensor? residual, Tensor? sample_scale) "
    "-> (Tensor output, Tensor batch_mean, Tensor batch_var)",
    implementation=_forward,
    fake=_forward_fake,
    on_cpu=True,
)
library.differentiable(OP, backward=_autograd_backward, setup_context=_setup_context)
_BACKWARD = library.register(
    f"{OP}_backward",
    "(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor? bn_weight, "
    "Tensor? bn_bias, float eps, int activation, Tensor? sample_scale, bool batch_stats) "
    "-> (Tensor grad_input, Tensor grad_bn_weight, Tensor grad_bn_bias)",
    implementation=_backward,
    fake=_backward_fake,
    on_cpu=True,
)
library.not_differentiable(f"{OP}_backward", f"{OP} has no second derivative (double backward)")
