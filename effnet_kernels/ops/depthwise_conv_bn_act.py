r"""Depthwise convolution + BatchNorm + activation, one pass where one will do.

The depthwise stage is where EfficientNet's time goes without its arithmetic: a k x k depthwise
convolution does k*k multiply-adds for each element it writes, far below what any processor needs to
be busy, and BN and Swish then read and write the same tensor again. What counts is how often the
activations cross the memory bus.

Memory traffic, in activation tensors read + written (x: the input, y: whatever has the output's
size)

===========================  ==================  ===================  ====================
step                         eager               conv fused with BN,  this op
                                                 activation separate
===========================  ==================  ===================  ====================
inference: conv              x + y               x + y                x + y
           BN                2y                  -                    -
           activation        2y                  2y                   -
           pool (for SE)     y                   y                    -
           **all**           **x + 6y**          **x + 4y**           **x + y**
training:  conv              x + y               x + y                x + y, with statistics
           BN                3y                  3y                   \
           activation        2y                  2y                   2y, BN + act + pool
           **all**           **x + 6y**          **x + 6y**           **x + 3y**
backward:  activation        3y                  3y                   \
           BN                5y                  5y                   2y, both sums
           conv, d input     y + x               y + x                \
           conv, d weight    y + x               y + x                2y + 2x, one pass
           **all**           **10y + 2x**        **10y + 2x**         **4y + 2x**
saved for backward           x, conv, BN         x, conv, BN          x, conv
===========================  ==================  ===================  ====================

The last column is what ``csrc/`` does; the Triton kernels write d conv once (6y + 2x backward),
since Triton has no shared memory tile to recompute it in. A prologue removes the 4x that the BN and
the activation of the preceding expand convolution cost in eager.

Source: MBConv of "EfficientNet: Rethinking Model Scaling for CNNs" (arXiv:1905.11946) after
"MobileNetV2" (arXiv:1801.04381); Swish/SiLU after "Searching for Activation Functions"
(arXiv:1710.05941).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.activations import EAGER, Activation, activation_code
from effnet_kernels.ops import checks, library
from effnet_kernels.ops.prologue import (
    Prologue,
    check_prologue,
    kernel_prologue,
    reference_prologue,
)

OP = "depthwise_conv_bn_act"
# Plain ints: the dispatcher takes several microseconds to see that an enum's member is one.
_CODES = {activation.name: int(activation) for activation in Activation}


class DepthwiseConvBnActOutput(NamedTuple):
    """Results of ``depthwise_conv_bn_act``.

    Attributes:
        output: (N, C, OH, OW), channels-last, the input's dtype.
        pooled: (N, C) float32 sums of the output over height and width (before it is rounded to
            its dtype), or None unless ``pool``. Divide by OH * OW for the mean that SE wants.
        batch_mean: (C,) float32 mean of the convolution over N, OH, OW, or None unless
            ``training``. Not differentiable.
        batch_var: (C,) float32 biased variance, likewise.
    """

    output: Tensor
    pooled: Tensor | None
    batch_mean: Tensor | None
    batch_var: Tensor | None


def depthwise_conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    training: bool = False,
    eps: float = 1e-5,
    activation: str = "silu",
    *,
    pool: bool = False,
    prologue: Prologue | None = None,
) -> DepthwiseConvBnActOutput:
    """``activation(batch_norm(conv2d(input, weight, groups=C)))``, fused, differentiable.

    Functional: in training the batch statistics are returned, and updating the running ones is the
    caller's (``effnet_kernels.layers`` does it). Gradients reach ``input``, ``weight``,
    ``bn_weight``, ``bn_bias`` and the prologue's ``scale`` and ``shift``, in training and with
    frozen statistics (``training=False``) alike. A second derivative is an error. Under autocast,
    ``input`` and ``weight`` are cast as ``conv2d`` casts them.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64; channels-last is taken as it is,
            other layouts are converted once.
        weight: (C, 1, k, k), k in {3, 5, 7}, the input's dtype.
        running_mean: (C,), the mean to normalise by; unused (may be None) in training.
        running_var: (C,), the biased variance to normalise by; likewise.
        bn_weight: (C,) or None for ones.
        bn_bias: (C,) or None for zeros.
        stride: 1 or 2, the same for height and width.
        padding: an int, (height, width), (left, right, top, bottom) as in
            ``torch.nn.functional.pad``, or ``"same"``: TensorFlow's rule, with the odd zero at the
            bottom and right. Every side is less than k.
        dilation: 1.
        training: normalise by the statistics of this batch instead of the running ones.
        eps: added to the variance.
        activation: identity, relu, relu6, silu, hardswish, sigmoid or hardsigmoid.
        pool: also return the sums over height and width.
        prologue: an affine map and activation applied to ``input`` first, without a pass of its
            own. Padding is zeros after the prologue, as if a tensor had been written in between.

    Returns:
        The output, and what ``pool`` and ``training`` add.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's rank, shape, device or value is wrong. Both name the argument, and
            come before any kernel runs.
        RuntimeError: the backend that ``use_backend`` demands cannot take the call.
    """
    if not training and backends.takes_as_given(input):
        result = _inference_as_given(
            input, weight, running_mean, running_var, bn_weight, bn_bias,
            stride, padding, dilation, eps, activation, pool, prologue,
        )  # fmt: skip
        if result is not None:
            return result

    checks.check_image("input", input)
    device = input.device
    low = checks.autocast_dtype(input)
    if low is not None:
        input = input.to(low)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            weight = weight.to(low)
    channels = input.shape[1]
    check_weight("weight", weight, input, channels)
    checks.check_batch_norm(
        running_mean, running_var, bn_weight, bn_bias, channels, device, training=training
    )
    stride = check_stride(stride)
    dilation = checks.one_or_pair("dilation", dilation)
    if dilation != 1:
        raise ValueError(f"dilation: got {dilation}, expected 1")
    pads = check_padding(padding, input, weight.shape[2], stride)
    checks.check_eps("eps", eps)
    code = int(activation_code("activation", activation))
    prologue_code = check_prologue(prologue, channels, device)
    if training and input.shape[0] * _output_size(input, weight, stride, pads) == 1:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, one value a channel after the convolution; "
            "training needs more than one"
        )

    needs_grad = torch.is_grad_enabled() and checks.requires_grad(
        input, weight, bn_weight, bn_bias, *(prologue[:2] if prologue is not None else ())
    )
    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, weight, running_mean, running_var, bn_weight, bn_bias,
            stride, pads, training, eps, activation, pool=pool, prologue=prologue,
        )  # fmt: skip

    input = input.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    mean = None if training else checks.kernel_vector(running_mean, input)
    var = None if training else checks.kernel_vector(running_var, input)
    bn_weight = checks.kernel_vector(bn_weight, input)
    bn_bias = checks.kernel_vector(bn_bias, input)
    scale, shift = kernel_prologue(prologue, input)

    arguments = (
        input, weight, mean, var, bn_weight, bn_bias, eps, stride, pads, code,
        scale, shift, prologue_code, pool,
    )  # fmt: skip
    if not training and not needs_grad:
        output, pooled = _INFERENCE[backend](*arguments)
        return DepthwiseConvBnActOutput(output, pooled if pool else None, None, None)
    output, pooled, batch_mean, batch_var, _ = _TRAIN[backend](*arguments)
    return DepthwiseConvBnActOutput(
        output,
        pooled if pool else None,
        batch_mean if training else None,
        batch_var if training else None,
    )


def _inference_as_given(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    eps: float,
    activation: str,
    pool: bool,
    prologue: Prologue | None,
) -> DepthwiseConvBnActOutput | None:
    """A call in inference on CPU tensors that needs no conversion, or None where it needs one.

    The compiled op checks its arguments before it runs. That is enough for a call that is right;
    for any other the checks in Python find the words. They take longer than the op's own, above all
    in a model, where the layers between two calls have emptied the processor's caches.
    """
    if stride.__class__ is not int:
        stride = checks.one_or_pair("stride", stride)
    if padding.__class__ is int:
        pads = (padding,) * 4
    elif input.ndim == 4 and isinstance(weight, Tensor) and weight.ndim == 4 and stride in (1, 2):
        pads = check_padding(padding, input, weight.shape[2], stride)
    else:
        return None
    if dilation != 1 and checks.one_or_pair("dilation", dilation) != 1:
        return None
    code = _CODES.get(activation)
    scale = shift = None
    prologue_code: int | None = 0
    if prologue is not None:
        if prologue.__class__ is not Prologue:
            return None
        scale, shift, prologue_code = (
            prologue.scale,
            prologue.shift,
            _CODES.get(prologue.activation),
        )
    try:
        output, pooled = _INFERENCE[backends.CPU.name](
            input, weight, running_mean, running_var, bn_weight, bn_bias, eps, stride, pads, code,
            scale, shift, prologue_code, pool,
        )  # fmt: skip
    except (RuntimeError, TypeError, ValueError):
        return None
    return DepthwiseConvBnActOutput(output, pooled if pool else None, None, None)


def reference(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride: int,
    pads: Sequence[int],
    training: bool,
    eps: float,
    activation: str,
    *,
    pool: bool,
    prologue: Prologue | None,
) -> DepthwiseConvBnActOutput:
    """``depthwise_conv_bn_act`` in PyTorch's own ops: the eager backend, and the tests' yardstick.

    Arguments as there, checked; ``pads`` is (top, left, bottom, right).
    """
    x = reference_prologue(input, prologue)
    top, left, bottom, right = pads
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device)  # the meta device, for one, has none
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        conv = F.conv2d(
            F.pad(x, (left, right, top, bottom)), weight, None, stride, groups=x.shape[1]
        )
        if conv.dtype == torch.float64:  # batch_norm takes no mixture with float64
            running_mean, running_var, bn_weight, bn_bias = (
                None if t is None else t.double()
                for t in (running_mean, running_var, bn_weight, bn_bias)
            )
        if training:
            y = F.batch_norm(conv, None, None, bn_weight, bn_bias, True, 0.0, eps)
        else:
            y = F.batch_norm(conv, running_mean, running_var, bn_weight, bn_bias, False, 0.0, eps)
        y = EAGER[Activation[activation]](y)
    y = y.contiguous(memory_format=torch.channels_last)
    pooled = y.sum((2, 3), dtype=checks.accumulator(y)) if pool else None
    if not training:
        return DepthwiseConvBnActOutput(y, pooled, None, None)
    with torch.no_grad():
        if conv.numel() == 0:
            zeros = conv.new_zeros(conv.shape[1], dtype=checks.accumulator(conv))
            return DepthwiseConvBnActOutput(y, pooled, zeros, zeros.clone())
        var, mean = torch.var_mean(conv.to(checks.accumulator(conv)), (0, 2, 3), correction=0)
    return DepthwiseConvBnActOutput(y, pooled, mean, var)


def check_weight(
    argument: str, weight: Tensor, input: Tensor, channels: int, *, cast: bool = False
) -> None:
    """``weight`` holds one filter for each of ``channels`` channels, in ``input``'s dtype, or in
    another from which it will be ``cast``.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape or device.
    """
    checks.check_image(argument, weight)
    shape = tuple(weight.shape)
    k = shape[2]
    if k not in (3, 5, 7) or shape != (channels, 1, k, k):
        raise ValueError(
            f"{argument}: got shape {shape}, expected ({channels}, 1, k, k) "
            "with k 3, 5 or 7, one filter a channel of input"
        )
    checks.check_weight_dtype(argument, weight, input, cast=cast)
    checks.check_same_device(argument, weight, input.device)


def check_stride(stride: int | Sequence[int]) -> int:
    """``stride``, 1 or 2, the same for height and width.

    Raises:
        TypeError: it is no int or pair of ints.
        ValueError: it is another number.
    """
    stride = checks.one_or_pair("stride", stride)
    if stride not in (1, 2):
        raise ValueError(f"stride: got {stride}, expected 1 or 2")
    return stride


def check_padding(
    padding: int | str | Sequence[int], input: Tensor, k: int, stride: int
) -> tuple[int, int, int, int]:
    """``padding`` as (top, left, bottom, right), checked against the input's extent.

    Raises:
        TypeError: it is neither "same" nor ints.
        ValueError: a side, or the input, is too small or too large.
    """
    if not isinstance(padding, (int, str, Sequence)):
        raise TypeError(f"padding: got {padding!r}, expected 'same', an int, or 2 or 4 ints")
    height, width = input.shape[2], input.shape[3]
    if isinstance(padding, str):
        if padding != "same":
            raise ValueError(f"padding: got {padding!r}, expected 'same' or numbers")
        vertical = max((-(-height // stride) - 1) * stride + k - height, 0)
        horizontal = max((-(-width // stride) - 1) * stride + k - width, 0)
        top, left = vertical // 2, horizontal // 2
        pads = (top, left, vertical - top, horizontal - left)
    elif isinstance(padding, int) and not isinstance(padding, bool):
        pads = (padding,) * 4
    else:
        sides = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        if len(sides) == 2:
            sides = (sides[1], sides[1], sides[0], sides[0])
        if len(sides) != 4 or any(not isinstance(p, int) or isinstance(p, bool) for p in sides):
            raise TypeError(f"padding: got {padding!r}, expected 'same', an int, or 2 or 4 ints")
        left, right, top, bottom = sides
        pads = (top, left, bottom, right)
    top, left, bottom, right = pads
    if not (0 <= top < k and 0 <= left < k and 0 <= bottom < k and 0 <= right < k):
        raise ValueError(f"padding: got {padding!r}, expected 0 to {k - 1} on every side")
    if height + top + bottom < k or width + left + right < k:
        raise ValueError(
            f"input: got {height} x {width} pixels, expected at least {k - top - bottom} x "
            f"{k - left - right} for a {k} x {k} kernel with padding {padding!r}"
        )
    return pads


def output_hw(input: Tensor, weight: Tensor, stride: int, pads: Sequence[int]) -> tuple[int, int]:
    """Height and width of the convolution; ``pads`` is (top, left, bottom, right)."""
    top, left, bottom, right = pads
    k = weight.shape[2]
    return (
        (input.shape[2] + top + bottom - k) // stride + 1,
        (input.shape[3] + left + right - k) // stride + 1,
    )


def _output_size(input: Tensor, weight: Tensor, stride: int, pads: Sequence[int]) -> int:
    height, width = output_hw(input, weight, stride, pads)
    return height * width


# --------------------------------------------------------------------------------------------------
# The registered functional ops. Each allocates its results and has the backend's kernel fill them.
# On CPU tensors the compiled ops do both in C++ (csrc/cpu): there a call's own time is not hidden
# behind the kernel's. Results not asked for have no elements.
# --------------------------------------------------------------------------------------------------

_GEOMETRY = "int stride, SymInt[4] padding, int activation"
_PROLOGUE = "Tensor? prologue_scale, Tensor? prologue_shift, int prologue_activation"


def _empty_output(input: Tensor, weight: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    return library.empty_image(input, input.shape[1], *output_hw(input, weight, stride, padding))


def _empty_vector(input: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=checks.accumulator(input), device=input.device)


def _allocate_inference(
    input: Tensor, weight: Tensor, stride: int, padding: Sequence[int], pool: bool
) -> tuple[Tensor, Tensor]:
    pooled_shape = (input.shape[0], input.shape[1]) if pool else (0,)
    return (
        _empty_output(input, weight, stride, padding),
        _empty_vector(input, *pooled_shape),
    )


def _inference(
    backend: str, input: Tensor, weight: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, padding: Sequence[int], activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    output, pooled = _allocate_inference(input, weight, stride, padding, pool)
    if output.numel() == 0:
        return output, pooled.zero_()
    backends.kernel(backend, "depthwise_conv_bn_act_out")(
        input, weight, mean, var, bn_weight, bn_bias, eps,
        stride, padding[0], padding[1], activation,
        prologue_scale, prologue_shift, prologue_activation, output, pooled if pool else None,
    )  # fmt: skip
    return output, pooled


def _inference_fake(
    input: Tensor, weight: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, padding: Sequence[int], activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    pool: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _allocate_inference(input, weight, stride, padding, pool)


def _allocate_train(
    input: Tensor, weight: Tensor, frozen: bool, stride: int, padding: Sequence[int], pool: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    output, pooled = _allocate_inference(input, weight, stride, padding, pool)
    statistics = (0,) if frozen else (input.shape[1],)
    return (
        output,
        pooled,
        _empty_vector(input, *statistics),
        _empty_vector(input, *statistics),
        torch.empty_like(output),
    )


def _train(
    backend: str, input: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, padding: Sequence[int], activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    output, pooled, batch_mean, batch_var, conv = _allocate_train(
        input, weight, mean is not None, stride, padding, pool
    )
    if output.numel() == 0:
        return output, pooled.zero_(), batch_mean.zero_(), batch_var.zero_(), conv
    backends.kernel(backend, "depthwise_conv_bn_act_train_out")(
        input, weight, bn_weight, bn_bias, eps, stride, padding[0], padding[1], activation,
        prologue_scale, prologue_shift, prologue_activation, mean is None,
        conv, batch_mean if mean is None else mean, batch_var if var is None else var,
        output, pooled if pool else None,
    )  # fmt: skip
    return output, pooled, batch_mean, batch_var, conv


def _train_fake(
    input: Tensor, weight: Tensor, mean: Tensor | None, var: Tensor | None,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float,
    stride: int, padding: Sequence[int], activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_train(input, weight, mean is not None, stride, padding, pool)


def _allocate_backward(
    input: Tensor, weight: Tensor, prologue: bool, needs_input: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    channels = input.shape[1]
    prologue_shape = (channels,) if prologue and needs_input else (0,)
    return (
        torch.empty_like(input, memory_format=torch.channels_last) if needs_input
        else input.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if needs_weight
        else weight.new_empty(0),
        _empty_vector(input, channels),
        _empty_vector(input, channels),
        _empty_vector(input, *prologue_shape),
        _empty_vector(input, *prologue_shape),
    )  # fmt: skip


def _backward(
    backend: str, grad_output: Tensor, grad_pooled: Tensor | None,
    conv: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, batch_stats: bool,
    input: Tensor, weight: Tensor, stride: int, padding: Sequence[int], activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    needs_input: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    has_prologue = prologue_scale is not None
    grads = _allocate_backward(input, weight, has_prologue, needs_input, needs_weight)
    if conv.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_scale, grad_shift = grads
    with_prologue = has_prologue and needs_input
    backends.kernel(backend, "depthwise_conv_bn_act_backward_out")(
        grad_output.contiguous(memory_format=torch.channels_last),
        None if grad_pooled is None else grad_pooled.contiguous(),
        conv, mean, var, bn_weight, bn_bias, eps, activation, batch_stats,
        input, weight, stride, padding[0], padding[1],
        prologue_scale, prologue_shift, prologue_activation,
        grad_input if needs_input else None, grad_weight if needs_weight else None,
        grad_bn_weight, grad_bn_bias,
        grad_scale if with_prologue else None, grad_shift if with_prologue else None,
    )  # fmt: skip
    return grads


def _backward_fake(
    grad_output: Tensor, grad_pooled: Tensor | None, conv: Tensor, mean: Tensor, var: Tensor,
    bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float, batch_stats: bool,
    input: Tensor, weight: Tensor, stride: int, padding: Sequence[int], activation: int,
    prologue_scale: Tensor | None, prologue_shift: Tensor | None, prologue_activation: int,
    needs_input: bool, needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_backward(input, weight, prologue_scale is not None, needs_input, needs_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        input, weight, mean, var, bn_weight, bn_bias, eps, stride, padding, activation,
        prologue_scale, prologue_shift, prologue_activation, pool,
    ) = inputs  # fmt: skip
    _, _, batch_mean, batch_var, conv = output
    ctx.mark_non_differentiable(batch_mean, batch_var, conv)
    ctx.set_materialize_grads(False)
    ctx.batch_stats = mean is None
    ctx.pool = pool
    ctx.save_for_backward(
        input, weight, batch_mean if mean is None else mean, batch_var if var is None else var,
        bn_weight, bn_bias, conv, prologue_scale, prologue_shift,
    )  # fmt: skip
    ctx.eps, ctx.stride, ctx.padding, ctx.activation = eps, stride, padding, activation
    ctx.prologue_activation = prologue_activation


def _autograd_backward(
    backend: str,
    ctx: Any,
    grad_output: Tensor | None,
    grad_pooled: Tensor | None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    input, weight, mean, var, bn_weight, bn_bias, conv, scale, shift = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if not ctx.pool:
        grad_pooled = None
    if grad_output is None:
        if grad_pooled is None:
            return (None,) * len(needs)
        grad_output = torch.zeros_like(conv)
    needs_prologue = scale is not None and (needs[10] or needs[11])
    grads = _BACKWARD[backend](
        grad_output, grad_pooled, conv, mean, var, bn_weight, bn_bias, ctx.eps, ctx.batch_stats,
        input, weight, ctx.stride, ctx.padding, ctx.activation,
        scale, shift, ctx.prologue_activation, needs[0] or needs_prologue, needs[1],
    )  # fmt: skip
    grad_input, grad_weight, grad_bn_weight, grad_bn_bias, grad_scale, grad_shift = grads
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        None,
        None,
        grad_bn_weight.to(bn_weight.dtype) if needs[4] else None,
        grad_bn_bias.to(bn_bias.dtype) if needs[5] else None,
        *(None,) * 4,
        grad_scale if needs[10] else None,
        grad_shift if needs[11] else None,
        *(None,) * 2,
    )


_INFERENCE = library.register(
    OP,
    "(Tensor input, Tensor weight, Tensor mean, Tensor var, Tensor? bn_weight, Tensor? bn_bias, "
    f"float eps, {_GEOMETRY}, {_PROLOGUE}, bool pool) "
    "-> (Tensor output, Tensor pooled)",
    implementation=_inference,
    fake=_inference_fake,
)
_TRAIN = library.register(
    f"{OP}_train",
    "(Tensor input, Tensor weight, Tensor? mean, Tensor? var, Tensor? bn_weight, Tensor? bn_bias, "
    f"float eps, {_GEOMETRY}, {_PROLOGUE}, bool pool) "
    "-> (Tensor output, Tensor pooled, Tensor batch_mean, Tensor batch_var, Tensor conv)",
    implementation=_train,
    fake=_train_fake,
)
library.differentiable(f"{OP}_train", backward=_autograd_backward, setup_context=_setup_context)
_BACKWARD = library.register(
    f"{OP}_backward",
    "(Tensor grad_output, Tensor? grad_pooled, Tensor conv, Tensor mean, Tensor var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, bool batch_stats, "
    f"Tensor input, Tensor weight, {_GEOMETRY}, {_PROLOGUE}, "
    "bool needs_input, bool needs_weight) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bn_weight, Tensor grad_bn_bias, "
    "Tensor grad_prologue_scale, Tensor grad_prologue_shift)",
    implementation=_backward,
    fake=_backward_fake,
)
library.not_differentiable(f"{OP}_backward", f"{OP} has no second derivative (double backward)")
