r"""Squeeze-and-excitation: each channel of an image scaled by a gate that sees all of the image.

    mean = pooled / (H * W)                       pooled: (N, C), sums of the image over H and W
    hidden = reduce_weight @ mean + reduce_bias   (N, S), S much smaller than C
    gate = g(expand_weight @ a(hidden) + expand_bias)
    output = input * gate

The arithmetic is two matrix-vector products an image; the traffic is the image's.

Memory traffic, in activation tensors read + written (y: the input's size; what is (N, C) is left
out)

=====================  ===========  ===========================  =============================
step                   eager        this op                      this op, the sums given
=====================  ===========  ===========================  =============================
forward: pool          y            y                            -
         gate          -            -                            -
         scale         2y           2y                           2y
         **all**       **3y**       **3y**                       **2y**
backward: scale        2y + 3y      2y, gradient of the gate     2y, gradient of the gate
          pool         y + 3y       \                            \
                                    2y, scale + pool             2y, scale
          **all**      **9y**       **4y**                       **4y**
saved for backward     y, gate      y, gate, (N, C + S) values   y, gate, (N, C + S) values
=====================  ===========  ===========================  =============================

In inference the 2y of the scaling go too where the next convolution multiplies the gate in as it
loads its input: ``squeeze_excite_gate`` is for that.

Source: "Squeeze-and-Excitation Networks" (arXiv:1709.01507), as MBConv has it
(arXiv:1905.11946).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.activations import EAGER, Activation, activation_code
from effnet_kernels.ops import checks, library

OP = "squeeze_excite"
HIDDEN_ACTIVATIONS = ("relu", "silu", "hardswish")
GATES = ("sigmoid", "hardsigmoid")


def squeeze_excite(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str = "silu",
    gate: str = "sigmoid",
    *,
    pooled: Tensor | None = None,
) -> Tensor:
    """``input`` times its gate; differentiable in everything but the settings.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64; channels-last is taken as it is,
            other layouts are converted once.
        reduce_weight: (S, C) or (S, C, 1, 1), floating point. Under autocast, weights are used as
            they are: the products are in float32 anyway.
        reduce_bias: (S,) or None.
        expand_weight: (C, S) or (C, S, 1, 1).
        expand_bias: (C,) or None.
        activation: of the hidden values: relu, silu or hardswish.
        gate: sigmoid or hardsigmoid.
        pooled: (N, C) float32 (float64 beside float64) sums of ``input`` over height and width,
            where another op has them already (``depthwise_conv_bn_act(..., pool=True)``). Their
            gradient goes to them, not to ``input``.

    Returns:
        (N, C, H, W), channels-last, the input's dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's rank, shape, device or value is wrong. Both name the argument, and
            come before any kernel runs.
        RuntimeError: the backend that ``use_backend`` demands cannot take the call.
    """
    checks.check_image("input", input)
    n, channels, height, width = input.shape
    if pooled is not None:
        _check_pooled(pooled, (n, channels), input.device, checks.accumulator(input))
    weights = check_weights(
        reduce_weight, reduce_bias, expand_weight, expand_bias, channels, input.device
    )
    activation_index, gate_index = codes(activation, gate)
    if height * width == 0:
        raise ValueError(f"input: got shape {tuple(input.shape)}, expected pixels to pool")
    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, reduce_weight, reduce_bias, expand_weight, expand_bias, activation, gate,
            pooled=pooled,
        )  # fmt: skip
    output, _, _, _ = _FORWARD[backend](
        input.contiguous(memory_format=torch.channels_last),
        None if pooled is None else pooled.contiguous(),
        *kernel_weights(weights, input.dtype),
        activation_index,
        gate_index,
    )
    return output  # type: ignore[no-any-return]


def squeeze_excite_gate(
    pooled: Tensor,
    pixels: int,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str = "silu",
    gate: str = "sigmoid",
) -> Tensor:
    """The gate alone, from pooled sums, for a convolution that multiplies it in; inference only.

    Args:
        pooled: (N, C) float32 (or float64) sums over an image's pixels.
        pixels: how many those are.
        reduce_weight: as in ``squeeze_excite``, like all that follow.
        reduce_bias: (S,) or None.
        expand_weight: (C, S) or (C, S, 1, 1).
        expand_bias: (C,) or None.
        activation: relu, silu or hardswish.
        gate: sigmoid or hardsigmoid.

    Returns:
        (N, C), the dtype of ``pooled``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``squeeze_excite``; a gradient through it is a
            RuntimeError.
    """
    if not isinstance(pooled, Tensor):
        raise TypeError(f"pooled: got {type(pooled).__name__}, expected a Tensor")
    if pooled.ndim != 2:
        raise ValueError(f"pooled: got shape {tuple(pooled.shape)}, expected (N, C)")
    _check_pooled(pooled, (pooled.shape[0], pooled.shape[1]), pooled.device, pooled.dtype)
    if not isinstance(pixels, int) or isinstance(pixels, bool):
        raise TypeError(f"pixels: got {type(pixels).__name__}, expected an int")
    if pixels < 1:
        raise ValueError(f"pixels: got {pixels}, expected at least 1")
    weights = check_weights(
        reduce_weight, reduce_bias, expand_weight, expand_bias, pooled.shape[1], pooled.device
    )
    activation_index, gate_index = codes(activation, gate)
    backend = backends.select(f"{OP}_gate", pooled)
    if backend == backends.EAGER:
        mean = (pooled / pixels)[:, :, None, None]
        result = _reference_gate(mean, *weights, activation, gate)
        return result.flatten(1)
    result, _ = _GATE[backend](
        pooled.contiguous(),
        pixels,
        *kernel_weights(weights, pooled.dtype),
        activation_index,
        gate_index,
    )
    return result  # type: ignore[no-any-return]


def reference(
    input: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
    *,
    pooled: Tensor | None,
) -> Tensor:
    """``squeeze_excite`` in PyTorch's own ops: the eager backend, and the tests' yardstick."""
    if pooled is None:
        mean = input.mean((2, 3), keepdim=True)
    else:
        mean = (pooled / (input.shape[2] * input.shape[3])).to(input.dtype)[:, :, None, None]
    scale = _reference_gate(
        mean,
        reduce_weight.flatten(1),
        reduce_bias,
        expand_weight.flatten(1),
        expand_bias,
        activation,
        gate,
    )
    return (input * scale).contiguous(memory_format=torch.channels_last)


def _reference_gate(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    activation: str,
    gate: str,
) -> Tensor:
    weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    w1, b1, w2, b2 = (None if w is None else w.to(mean.dtype) for w in weights)
    assert w1 is not None and w2 is not None
    hidden = EAGER[Activation[activation]](F.conv2d(mean, w1[:, :, None, None], b1))
    return EAGER[Activation[gate]](F.conv2d(hidden, w2[:, :, None, None], b2))


Weights = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def check_weights(
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    channels: int,
    device: torch.device,
) -> Weights:
    """The four as matrices and vectors, for an input of ``channels`` channels.

    Raises:
        TypeError: one is of the wrong type or dtype.
        ValueError: one is of the wrong shape or device.
    """
    reduce = _matrix("reduce_weight", reduce_weight, device)
    expand = _matrix("expand_weight", expand_weight, device)
    squeezed = reduce.shape[0]
    if reduce.shape[1] != channels or squeezed < 1:
        raise ValueError(
            f"reduce_weight: got shape {tuple(reduce_weight.shape)}, expected (S, {channels}), S "
            "at least 1"
        )
    if tuple(expand.shape) != (channels, squeezed):
        raise ValueError(
            f"expand_weight: got shape {tuple(expand_weight.shape)}, "
            f"expected ({channels}, {squeezed})"
        )
    checks.check_channel_vector("reduce_bias", reduce_bias, squeezed, device)
    checks.check_channel_vector("expand_bias", expand_bias, channels, device)
    return reduce, reduce_bias, expand, expand_bias


def _matrix(argument: str, tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument}: got {type(tensor).__name__}, expected a Tensor")
    if tensor.dtype not in checks.FLOATING:
        raise TypeError(f"{argument}: got dtype {tensor.dtype}, expected a floating-point dtype")
    if tensor.ndim not in (2, 4) or tuple(tensor.shape[2:]) not in ((), (1, 1)):
        raise ValueError(
            f"{argument}: got shape {tuple(tensor.shape)}, expected a matrix or a 1x1 kernel"
        )
    checks.check_same_device(argument, tensor, device)
    return tensor.flatten(1)


def _check_pooled(
    pooled: Tensor, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> None:
    if not isinstance(pooled, Tensor):
        raise TypeError(f"pooled: got {type(pooled).__name__}, expected a Tensor or None")
    if pooled.dtype != dtype or dtype not in (torch.float32, torch.float64):
        wanted = dtype if dtype in (torch.float32, torch.float64) else "float32 or float64"
        raise TypeError(f"pooled: got dtype {pooled.dtype}, expected {wanted}")
    if tuple(pooled.shape) != shape:
        raise ValueError(f"pooled: got shape {tuple(pooled.shape)}, expected {shape}")
    checks.check_same_device("pooled", pooled, device)


def codes(activation: str, gate: str) -> tuple[int, int]:
    """The codes of both activations.

    Raises:
        ValueError: one is not among ``HIDDEN_ACTIVATIONS`` or ``GATES``.
    """
    code, gate_code = activation_code("activation", activation), activation_code("gate", gate)
    if activation not in HIDDEN_ACTIVATIONS:
        raise ValueError(
            f"activation: got {activation!r}, expected one of {', '.join(HIDDEN_ACTIVATIONS)}"
        )
    if gate not in GATES:
        raise ValueError(f"gate: got {gate!r}, expected one of {', '.join(GATES)}")
    return int(code), int(gate_code)


def kernel_weights(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights as the kernels read them: contiguous, and all of one dtype, which is theirs if
    they agree, else float32 (float64 beside float64).
    """
    given = [w for w in weights if w is not None]
    common = given[0].dtype if all(w.dtype == given[0].dtype for w in given) else torch.float32
    if dtype == torch.float64 or common == torch.float64:
        common = torch.float64 if dtype == torch.float64 else torch.float32
    w1, b1, w2, b2 = (None if w is None else w.to(common).contiguous() for w in weights)
    assert w1 is not None and w2 is not None
    return w1, b1, w2, b2


# --------------------------------------------------------------------------------------------------
# The registered functional ops (see depthwise_conv_bn_act.py). Sums, hidden values and gates are
# float32, float64 beside float64.
# --------------------------------------------------------------------------------------------------

_WEIGHTS = "Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, Tensor? expand_bias"
_SETTINGS = "int activation, int gate_activation"


def _allocate(
    input: Tensor, pooled: Tensor | None, reduce_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, channels = input.shape[0], input.shape[1]

    def values(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=checks.accumulator(input), device=input.device)

    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        values(n, channels) if pooled is None else values(0),
        values(n, reduce_weight.shape[0]),
        values(n, channels),
    )


def _forward(
    backend: str, input: Tensor, pooled: Tensor | None, reduce_weight: Tensor,
    reduce_bias: Tensor | None, expand_weight: Tensor, expand_bias: Tensor | None,
    activation: int, gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    output, sums, hidden, gate = _allocate(input, pooled, reduce_weight)
    if output.numel() == 0:
        return output, sums, hidden, gate
    if pooled is None:
        backends.kernel(backend, "channel_sums_out")(input, None, sums)
        pooled = sums
    backends.kernel(backend, "squeeze_excite_gate_out")(
        pooled, input.shape[2] * input.shape[3], reduce_weight, reduce_bias, expand_weight,
        expand_bias, activation, gate_activation, hidden, gate,
    )  # fmt: skip
    backends.kernel(backend, "channel_scale_out")(input, gate, None, output)
    return output, sums, hidden, gate


def _forward_fake(
    input: Tensor, pooled: Tensor | None, reduce_weight: Tensor,
    reduce_bias: Tensor | None, expand_weight: Tensor, expand_bias: Tensor | None,
    activation: int, gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate(input, pooled, reduce_weight)


def _allocate_backward(
    input: Tensor, gate: Tensor, reduce_weight: Tensor, expand_weight: Tensor, given: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        torch.empty_like(gate) if given else gate.new_empty(0),
        torch.empty_like(reduce_weight),
        reduce_weight.new_empty(reduce_weight.shape[0]),
        torch.empty_like(expand_weight),
        expand_weight.new_empty(expand_weight.shape[0]),
    )


def _backward(
    backend: str, grad_output: Tensor, input: Tensor, pooled: Tensor, given: bool, hidden: Tensor,
    gate: Tensor, reduce_weight: Tensor, expand_weight: Tensor, activation: int,
    gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grads = _allocate_backward(input, gate, reduce_weight, expand_weight, given)
    if input.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_input, grad_pooled, *grad_weights = grads
    grad_gate = torch.empty_like(gate)
    shift = grad_pooled if given else torch.empty_like(gate)
    backends.kernel(backend, "channel_sums_out")(grad_output, input, grad_gate)
    backends.kernel(backend, "squeeze_excite_gate_backward_out")(
        grad_gate, pooled, input.shape[2] * input.shape[3], hidden, gate, reduce_weight,
        expand_weight, activation, gate_activation, shift, *grad_weights,
    )  # fmt: skip
    backends.kernel(backend, "channel_scale_out")(
        grad_output, gate, None if given else shift, grad_input
    )
    return grads


def _backward_fake(
    grad_output: Tensor, input: Tensor, pooled: Tensor, given: bool, hidden: Tensor,
    gate: Tensor, reduce_weight: Tensor, expand_weight: Tensor, activation: int,
    gate_activation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_backward(input, gate, reduce_weight, expand_weight, given)


def _allocate_gate(pooled: Tensor, reduce_weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pooled), pooled.new_empty(pooled.shape[0], reduce_weight.shape[0])


def _gate(
    backend: str, pooled: Tensor, pixels: int, reduce_weight: Tensor, reduce_bias: Tensor | None,
    expand_weight: Tensor, expand_bias: Tensor | None, activation: int, gate_activation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gate, hidden = _allocate_gate(pooled, reduce_weight)
    if gate.numel() > 0:
        backends.kernel(backend, "squeeze_excite_gate_out")(
            pooled, pixels, reduce_weight, reduce_bias, expand_weight, expand_bias,
            activation, gate_activation, hidden, gate,
        )  # fmt: skip
    return gate, hidden


def _gate_fake(
    pooled: Tensor, pixels: int, reduce_weight: Tensor, reduce_bias: Tensor | None,
    expand_weight: Tensor, expand_bias: Tensor | None, activation: int, gate_activation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _allocate_gate(pooled, reduce_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        input, pooled, reduce_weight, _reduce_bias, expand_weight, _expand_bias,
        activation, gate_activation,
    ) = inputs  # fmt: skip
    _, sums, hidden, gate = output
    ctx.mark_non_differentiable(sums, hidden, gate)
    ctx.set_materialize_grads(False)
    ctx.given = pooled is not None
    ctx.save_for_backward(
        input, pooled if ctx.given else sums, hidden, gate, reduce_weight, expand_weight
    )
    ctx.settings = activation, gate_activation


def _autograd_backward(
    backend: str, ctx: Any, grad_output: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * len(needs)
    input, pooled, hidden, gate, reduce_weight, expand_weight = ctx.saved_tensors
    grads = _BACKWARD[backend](
        grad_output, input, pooled, ctx.given, hidden, gate, reduce_weight, expand_weight,
        *ctx.settings,
    )  # fmt: skip
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=False))
    return (*wanted, None, None)


_FORWARD = library.register(
    OP,
    f"(Tensor input, Tensor? pooled, {_WEIGHTS}, {_SETTINGS}) "
    "-> (Tensor output, Tensor sums, Tensor hidden, Tensor gate)",
    implementation=_forward,
    fake=_forward_fake,
)
library.differentiable(OP, backward=_autograd_backward, setup_context=_setup_context)
_BACKWARD = library.register(
    f"{OP}_backward",
    "(Tensor grad_output, Tensor input, Tensor pooled, bool given, Tensor hidden, Tensor gate, "
    f"Tensor reduce_weight, Tensor expand_weight, {_SETTINGS}) "
    "-> (Tensor grad_input, Tensor grad_pooled, Tensor grad_reduce_weight, "
    "Tensor grad_reduce_bias, Tensor grad_expand_weight, Tensor grad_expand_bias)",
    implementation=_backward,
    fake=_backward_fake,
)
library.not_differentiable(f"{OP}_backward", f"{OP} has no second derivative (double backward)")
_GATE = library.register(
    f"{OP}_gate",
    f"(Tensor pooled, SymInt pixels, {_WEIGHTS}, {_SETTINGS}) -> (Tensor gate, Tensor hidden)",
    implementation=_gate,
    fake=_gate_fake,
)
library.not_differentiable(f"{OP}_gate", f"{OP}_gate has no derivative: {OP} scales and has one")
