"""Activations and their derivatives inside Triton kernels.

The activation is a ``tl.constexpr`` name, so a kernel holds the arithmetic of one activation only.
Launchers turn the code of the op schemas into that name with :func:`activation_name`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from effnet_kernels.activations import Activation

_NAMES = tuple(activation.name for activation in Activation)
_OF_BFLOAT16 = {"silu": "silu_by_tanh", "sigmoid": "sigmoid_by_tanh"}


def activation_name(code: int, dtype: torch.dtype = torch.float32) -> str:
    """The name of activation ``code``, which the kernels take as a constexpr.

    A sigmoid whose results are stored as bfloat16 (``dtype``) takes one operation of the special
    function unit instead of two; its error, 2^-12, is an eighth of the rounding in (1/2, 1).
    """
    name = _NAMES[code]
    return _OF_BFLOAT16.get(name, name) if dtype == torch.bfloat16 else name


@triton.jit
def _clamp(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    # Comparisons rather than min and max: a NaN stays a NaN, as in PyTorch.
    return tl.where(x < LOW, LOW, tl.where(x > HIGH, HIGH, x))


@triton.jit
def _sixth(x):
    # 1/6 in two parts: as one float32 it is off by a quarter of an epsilon, always to one side.
    return tl.fma(x, 0.1666666567325592, x * 9.934107758624577e-09)


if triton.knobs.runtime.interpret:

    @triton.jit
    def _sigmoid(x):
        # The interpreter has no inline assembly.
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit
    def _sigmoid_by_tanh(x):
        return _sigmoid(x)

else:

    @triton.jit
    def _sigmoid(x):
        # 1 / (1 + exp(-x)) in four instructions, where tl.exp and / take twelve: 2 ulp and 1 ulp,
        # like theirs, without their steps for subnormal values. 1 + exp is not one of those, and a
        # sigmoid that would be is 0.
        exp = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [x * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [1.0 + exp],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def _sigmoid_by_tanh(x):
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;",
            "=f,f",
            [x * 0.5],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        return tanh * 0.5 + 0.5


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``act(x)`` element by element, for a float32 block of any shape."""
    if ACTIVATION == "identity":
        return x
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        return _clamp(x, 0.0, 6.0)
    elif ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "silu_by_tanh":
        return x * _sigmoid_by_tanh(x)
    elif ACTIVATION == "hardswish":
        return _sixth(x * _clamp(x + 3.0, 0.0, 6.0))
    elif ACTIVATION == "sigmoid":
        return _sigmoid(x)
    elif ACTIVATION == "sigmoid_by_tanh":
        return _sigmoid_by_tanh(x)
    else:
        tl.static_assert(ACTIVATION == "hardsigmoid", "unknown activation")
        return _sixth(_clamp(x + 3.0, 0.0, 6.0))


@triton.jit
def activate_grad(grad, x, ACTIVATION: tl.constexpr):
    """``grad * act'(x)`` element by element; at a kink the derivative is the one PyTorch picks."""
    if ACTIVATION == "identity":
        return grad
    elif ACTIVATION == "relu":
        return tl.where(x > 0.0, grad, 0.0)
    elif ACTIVATION == "relu6":
        return tl.where((x > 0.0) & (x < 6.0), grad, 0.0)
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        return grad * (s * (1.0 + x * (1.0 - s)))
    elif ACTIVATION == "silu_by_tanh":
        s = _sigmoid_by_tanh(x)
        return grad * (s * (1.0 + x * (1.0 - s)))
    elif ACTIVATION == "hardswish":
        inside = grad * (x * (1.0 / 3.0) + 0.5)
        return tl.where(x > -3.0, tl.where(x < 3.0, inside, grad), 0.0)
    elif ACTIVATION == "sigmoid":
        s = _sigmoid(x)
        return grad * (s * (1.0 - s))
    elif ACTIVATION == "sigmoid_by_tanh":
        s = _sigmoid_by_tanh(x)
        return grad * (s * (1.0 - s))
    else:
        tl.static_assert(ACTIVATION == "hardsigmoid", "unknown activation")
        return tl.where((x > -3.0) & (x < 3.0), grad * (1.0 / 6.0), 0.0)
