"""What an op applies to its input as it loads it, in place of a pass over the tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels.activations import EAGER, Activation, activation_code
from effnet_kernels.ops import checks


class Prologue(NamedTuple):
    """What is applied to the input as it is loaded: ``activation(input * scale + shift)``.

    Attributes:
        scale: (C,), floating point.
        shift: (C,), floating point.
        activation: an activation's name.
    """

    scale: Tensor
    shift: Tensor
    activation: str = "identity"


def affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BN by ``mean`` and biased ``var`` as a prologue has it: ``x * scale + shift``.

    Returns:
        (scale, shift, 1 / sqrt(var + eps)), (C,) each, float32 or float64.
    """
    dtype = checks.accumulator(mean)
    mean, invstd = mean.to(dtype), torch.rsqrt(var.to(dtype) + eps)
    scale = invstd if weight is None else invstd * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return scale, shift.to(dtype), invstd


def check_prologue(prologue: Any, channels: int, device: torch.device) -> int:
    """``prologue`` is None or a ``Prologue`` of an input with C channels; its activation's code.

    Raises:
        TypeError: it or a member is of another type.
        ValueError: a member's shape, device or name is wrong.
    """
    if prologue is None:
        return int(Activation.identity)
    if not isinstance(prologue, Prologue):
        raise TypeError(f"prologue: got {type(prologue).__name__}, expected a Prologue or None")
    for argument, vector in (("scale", prologue.scale), ("shift", prologue.shift)):
        if vector is None:
            raise TypeError(f"prologue.{argument}: got None, expected a Tensor")
        checks.check_channel_vector(f"prologue.{argument}", vector, channels, device)
    return int(activation_code("prologue.activation", prologue.activation))


def kernel_prologue(
    prologue: Prologue | None, input: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scale and shift as the kernels read them: contiguous, of the accumulate dtype."""
    if prologue is None:
        return None, None
    dtype = checks.accumulator(input)
    return prologue.scale.to(dtype).contiguous(), prologue.shift.to(dtype).contiguous()


def reference_prologue(input: Tensor, prologue: Prologue | None) -> Tensor:
    """``prologue`` in PyTorch's own ops, rounded to the input's dtype."""
    if prologue is None:
        return input
    x = torch.addcmul(prologue.shift.view(-1, 1, 1), input, prologue.scale.view(-1, 1, 1))
    return EAGER[Activation[prologue.activation]](x.to(input.dtype))
