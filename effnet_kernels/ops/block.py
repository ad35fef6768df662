"""What the ops that are whole blocks share: their stages as arguments, the checks of those and the
form that kernels take them in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels.activations import Activation, activation_code
from effnet_kernels.ops import checks
from effnet_kernels.ops.pointwise_conv_bn_act import reference as pointwise_reference
from effnet_kernels.ops.squeeze_excite import check_weights as check_squeeze_excite_weights
from effnet_kernels.ops.squeeze_excite import codes as squeeze_excite_codes
from effnet_kernels.ops.squeeze_excite import kernel_weights

_CODES = {activation.name: int(activation) for activation in Activation}


class ConvBn(NamedTuple):
    """A convolution without bias, the BN after it, and an activation.

    Attributes:
        weight: (K, C, 1, 1) or (K, C) of a 1x1 convolution, (C, 1, k, k) of a depthwise one,
            (K, C, k, k) of a dense one; the input's dtype.
        running_mean: (K,); None is for training with batch statistics.
        running_var: (K,), biased; likewise.
        bn_weight: (K,) or None for ones.
        bn_bias: (K,) or None for zeros.
        eps: added to the variance.
        activation: an activation's name.
    """

    weight: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    eps: float = 1e-5
    activation: str = "identity"


class SqueezeExcite(NamedTuple):
    """Squeeze-and-excitation of the expanded tensor, before project.

    Attributes:
        reduce_weight: (S, C) or (S, C, 1, 1), floating point.
        reduce_bias: (S,) or None.
        expand_weight: (C, S) or (C, S, 1, 1).
        expand_bias: (C,) or None.
        activation: of the hidden values: relu, silu or hardswish.
        gate: sigmoid or hardsigmoid.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor | None
    expand_weight: Tensor
    expand_bias: Tensor | None
    activation: str = "silu"
    gate: str = "sigmoid"


class Statistics(NamedTuple):
    """A batch's, for the caller to update running ones with.

    Attributes:
        mean: (C,) float32.
        var: (C,) float32, biased.
        elements: of a channel.
    """

    mean: Tensor
    var: Tensor
    elements: int


Stages = tuple[Any, ...]
"""A block's ``ConvBn``, ``SqueezeExcite`` and, for one that is not there, None, in order."""


def pointwise(x: Tensor, conv: ConvBn) -> Tensor:
    """A 1x1 stage in inference, in PyTorch's own ops."""
    return pointwise_reference(x, *conv, prologue=None, gate=None, residual=None, pool=False).output


def to_autocast(low: torch.dtype, *convs: ConvBn | None) -> tuple[Any, ...]:
    """``convs`` with their weights in ``low``; what is no ``ConvBn`` stays for the checks."""
    has_weight = [isinstance(c, ConvBn) and isinstance(c.weight, Tensor) for c in convs]
    weights = [c.weight for c, has in zip(convs, has_weight, strict=True) if c is not None and has]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        cast = [weight.to(low) for weight in weights]
    elif all(weight.dtype == low for weight in weights):
        return convs
    else:  # in one launch
        cast = [torch.empty_like(weight, dtype=low) for weight in weights]
        torch._foreach_copy_(cast, weights)
    left = iter(cast)
    return tuple(
        c._replace(weight=next(left)) if c is not None and has else c
        for c, has in zip(convs, has_weight, strict=True)
    )


class CheckedBlock(NamedTuple):
    """What the checks of a block find.

    Attributes:
        stride: of its k x k convolution.
        pads: its padding, (top, left, bottom, right).
        shape: the output's.
        as_given: the kernels read the tensors, the input apart, without a conversion.
    """

    stride: int
    pads: tuple[int, int, int, int]
    shape: tuple[int, int, int, int]
    as_given: bool


_CHECKED: dict[Any, tuple[Any, CheckedBlock]] = {}
_MOST_CHECKED = 1024


def remembered(
    check: Callable[..., CheckedBlock],
    of: ConvBn,
    input: Tensor,
    stages: Stages,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
    statistics: bool,
    cast: bool,
) -> CheckedBlock:
    """``check(input, *stages, ...)``, which is looked up where it has been made before.

    The checks read nothing but what ``_properties`` does, and take longer than the launches that
    they precede.

    Args:
        check: takes what follows.
        of: the stage of the k x k convolution, by whose weight the block is known.
        input: (N, C, H, W).
        stages: the block's.
        stride: of the k x k convolution.
        padding: likewise.
        residual: whether the input is added.
        statistics: running ones are needed.
        cast: the op casts the convolutions' weights to the input's dtype itself.

    Raises:
        TypeError, ValueError: as ``check``.
    """
    arguments = (input, *stages, stride, padding, residual, statistics, cast)
    # Not where shapes may be symbols, which a comparison would turn into constants, nor with a
    # padding that can change.
    if (
        input.__class__ is not Tensor
        or padding.__class__ not in (int, str, tuple)
        or torch.compiler.is_compiling()
    ):
        return check(*arguments)
    try:
        properties = _properties(input, stages, stride, padding, residual, statistics, cast)
        key = (id(of.weight), input.shape)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # for the checks to word
        return check(*arguments)
    known = _CHECKED.get(key)
    if known is not None and known[0] == properties:
        return known[1]
    checked = check(*arguments)
    if all(
        read is tensor
        for kernel, given in zip(kernel_stages(stages, input), stages, strict=True)
        for read, tensor in zip(kernel or (), given or (), strict=True)
        if isinstance(tensor, Tensor)
    ):
        checked = checked._replace(as_given=True)
    if len(_CHECKED) >= _MOST_CHECKED:
        _CHECKED.clear()
    _CHECKED[key] = properties, checked
    return checked


def _properties(
    input: Tensor,
    stages: Stages,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
    statistics: bool,
    cast: bool,
) -> list[Any]:
    """All of the arguments that their being right depends on."""
    given = [stage for stage in stages if stage is not None]
    tensors: list[Any] = []
    for stage in given:
        tensors += stage[: 4 if stage.__class__ is SqueezeExcite else 5]
    return [
        input.shape, input.dtype, input.device, stride.__class__, stride, padding, residual,
        statistics, cast,
        *map(type, stages),
        *(stage[-2:] for stage in given),
        *[
            None if t is None else (t.shape, t.dtype, t.device, t.is_contiguous())
            for t in tensors
        ],
    ]  # fmt: skip


def check_squeeze_excite(
    squeeze_excite: SqueezeExcite | None, channels: int, device: torch.device
) -> None:
    """``squeeze_excite`` is None or one of C channels.

    Raises:
        TypeError, ValueError: it is not.
    """
    if squeeze_excite is None:
        return
    if not isinstance(squeeze_excite, SqueezeExcite):
        raise TypeError(
            f"squeeze_excite: got {type(squeeze_excite).__name__}, expected a SqueezeExcite or None"
        )
    check_squeeze_excite_weights(*squeeze_excite[:4], channels, device)
    squeeze_excite_codes(*squeeze_excite[4:])


def check_conv_bn(argument: str, conv: ConvBn) -> None:
    """``conv`` is a ``ConvBn``.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(conv, ConvBn):
        raise TypeError(f"{argument}: got {type(conv).__name__}, expected a ConvBn")


def check_pointwise(
    argument: str, conv: ConvBn, input: Tensor, channels: int, statistics: bool, cast: bool
) -> None:
    """``conv`` is a 1x1 stage of an input with C channels.

    Raises:
        TypeError, ValueError: it is not.
    """
    check_conv_bn(argument, conv)
    checks.check_pointwise_weight(f"{argument}.weight", conv.weight, input, channels, cast=cast)
    check_bn(argument, conv, conv.weight.shape[0], input.device, statistics)


def check_bn(
    argument: str, conv: ConvBn, channels: int, device: torch.device, statistics: bool
) -> None:
    """The BN of ``conv`` is one of C channels, with running ``statistics`` if those are needed.

    Raises:
        TypeError, ValueError: it is not.
    """
    for name in ("running_mean", "running_var", "bn_weight", "bn_bias"):
        vector = getattr(conv, name)
        if vector is None and statistics and name.startswith("running"):
            raise TypeError(f"{argument}.{name}: got None, expected a Tensor")
        checks.check_channel_vector(
            f"{argument}.{name}", vector, channels, device, f"the rows of {argument}.weight"
        )
    checks.check_eps(f"{argument}.eps", conv.eps)
    activation_code(f"{argument}.activation", conv.activation)


def check_residual(residual: bool, input: Tensor, shape: tuple[int, ...]) -> None:
    """The input can be added to an output of ``shape``, if it is.

    Raises:
        ValueError: it cannot.
    """
    if residual and shape != tuple(input.shape):
        raise ValueError(
            f"residual: got True, expected False where the output has shape {shape} and the input "
            f"{tuple(input.shape)}"
        )


def kernel_stages(stages: Stages, input: Tensor) -> Stages:
    """Checked stages with their tensors as the kernels read them. Weights keep their dtype."""
    return tuple(
        None if stage is None
        else _kernel_squeeze_excite(stage, input) if isinstance(stage, SqueezeExcite)
        else _kernel_conv_bn(stage, input)
        for stage in stages
    )  # fmt: skip


def _kernel_squeeze_excite(squeeze_excite: SqueezeExcite, input: Tensor) -> SqueezeExcite:
    weights = kernel_weights(squeeze_excite[:4], input.dtype)
    return SqueezeExcite(*weights, *squeeze_excite[4:])


def _kernel_conv_bn(conv: ConvBn, input: Tensor) -> ConvBn:
    mean, var, bn_weight, bn_bias = (checks.kernel_vector(vector, input) for vector in conv[1:5])
    weight = conv.weight
    dense = weight.ndim == 4 and weight.shape[1] > 1 and weight.shape[2] > 1
    if not dense:  # the layout of a dense one is the op's own business
        weight = weight.contiguous()
    return ConvBn(weight, mean, var, bn_weight, bn_bias, *conv[5:])


def flat_conv_bn(conv: ConvBn | None) -> tuple[Any, ...]:
    """A stage as the functional ops take it."""
    if conv is None:
        return (None, None, None, None, None, 0.0, 0)
    return (*conv[:6], _CODES[conv.activation])


def flat_squeeze_excite(squeeze_excite: SqueezeExcite | None) -> tuple[Any, ...]:
    """Squeeze-and-excitation as the functional ops take it."""
    if squeeze_excite is None:
        return (None, None, None, None, 0, _CODES["sigmoid"])
    _, _, _, _, activation, gate = squeeze_excite
    return (*squeeze_excite[:4], _CODES[activation], _CODES[gate])


def conv_bn_schema(stage: str, weight: str, vectors: str) -> str:
    """What ``flat_conv_bn`` gives, in a schema.

    Args:
        stage: its name.
        weight: the type of the weight.
        vectors: the type of running means and variances.
    """
    return (
        f"{weight} {stage}_weight, {vectors} {stage}_mean, {vectors} {stage}_var, "
        f"Tensor? {stage}_bn_weight, Tensor? {stage}_bn_bias, float {stage}_eps, "
        f"int {stage}_activation"
    )


SQUEEZE_EXCITE_SCHEMA = (
    "Tensor? reduce_weight, Tensor? reduce_bias, Tensor? excite_weight, Tensor? excite_bias, "
    "int se_activation, int gate_activation"
)
"""What ``flat_squeeze_excite`` gives, in a schema."""


def names_of(arguments: str) -> tuple[str, ...]:
    """The names in a schema's list of arguments."""
    return tuple(argument.split()[-1] for argument in arguments.split(", "))
