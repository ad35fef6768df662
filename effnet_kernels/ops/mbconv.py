r"""The MBConv block (inverted residual with squeeze-and-excitation) in inference, as one op.

    e = act(bn(expand_weight @ input))            1x1, C_in to C channels, C about 6 times as wide
    d = act(bn(depthwise_conv(e)))                k x k, stride 1 or 2; pooled on the way
    gate = g(excite_weight @ a(reduce_weight @ mean(d)))
    output = bn(project_weight @ (d * gate)) + input

Without an expansion (``DepthwiseSeparableConv``) e is the input.

Memory traffic, in activation tensors read + written (x: the input, e: the expanded tensor, d: the
depthwise result, y: the output; all of the block's, with stride 1 d = e and y about x)

=====================  =====================  ====================  ======================
step                   eager                  convs fused with BN,  this op
                                              the rest separate
=====================  =====================  ====================  ======================
expand                 x + e                  x + e                 \
  BN, activation       4e                     2e                    \
depthwise              e + d                  e + d                 x + d
  BN, activation       4d                     2d                    \
squeeze-and-excite     d + 2d                 d + 2d                \
project                d + y                  d + y                 d + y
  BN, residual         2y + 3y                3y                    x
**all, in inference**  **x + 6e + 9d + 6y**   **x + 4e + 7d + 4y**  **2x + 2d + y**
=====================  =====================  ====================  ======================

On a GPU that is three launches: expand + depthwise + sums, the gate, project + residual. Where the
expansion recomputed in the halo of every tile costs more than it saves (``fuses_expand``), it is a
launch of its own and 2e come back. On the CPU not even d leaves the cache: an image goes through
the block as a whole, x + y.

Source: "EfficientNet: Rethinking Model Scaling for CNNs" (arXiv:1905.11946), after "MobileNetV2"
(arXiv:1801.04381) and "Squeeze-and-Excitation Networks" (arXiv:1709.01507).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.ops import checks, library
from effnet_kernels.ops.block import (
    SQUEEZE_EXCITE_SCHEMA,
    CheckedBlock,
    ConvBn,
    SqueezeExcite,
    check_bn,
    check_conv_bn,
    check_pointwise,
    check_residual,
    check_squeeze_excite,
    conv_bn_schema,
    flat_conv_bn,
    flat_squeeze_excite,
    kernel_stages,
    names_of,
    pointwise,
    remembered,
    to_autocast,
)
from effnet_kernels.ops.depthwise_conv_bn_act import check_padding, check_stride, output_hw
from effnet_kernels.ops.depthwise_conv_bn_act import check_weight as check_depthwise_weight
from effnet_kernels.ops.depthwise_conv_bn_act import reference as depthwise_reference
from effnet_kernels.ops.mbconv_cost import fuses_expand
from effnet_kernels.ops.pointwise_conv_bn_act import allows_tf32
from effnet_kernels.ops.squeeze_excite import reference as squeeze_excite_reference

OP = "mbconv"


def mbconv(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int = 1,
    padding: int | str | Sequence[int] = 0,
    *,
    residual: bool = False,
) -> Tensor:
    """The block of ``input``, in inference only: a gradient through it is an error.

    Under autocast, ``input`` and the convolutions' weights are cast as ``conv2d`` casts them, and
    the residual is the input as it was, so that the sum has its dtype.

    Args:
        input: (N, C_in, H, W), float32, float16, bfloat16 or float64; channels-last is taken as it
            is, other layouts are converted once.
        expand: C_in to C channels, or None.
        depthwise: k x k with k in {3, 5, 7}, of C channels.
        squeeze_excite: of C channels, or None.
        project: C to K channels.
        stride: of the depthwise convolution, 1 or 2.
        padding: of the depthwise convolution, as in ``depthwise_conv_bn_act``.
        residual: add the input, which then has the output's shape.

    Returns:
        (N, K, OH, OW), channels-last, the input's dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's rank, shape, device or value is wrong. Both name the argument, and
            come before any kernel runs.
        RuntimeError: the backend that ``use_backend`` demands cannot take the call; or, in
            backward, a gradient was asked for.
    """
    if backends.takes_as_given(input):
        result = _as_given(
            input, expand, depthwise, squeeze_excite, project, stride, padding, residual
        )
        if result is not None:
            return result

    checks.check_image("input", input)
    low = checks.autocast_dtype(input)
    if low is not None:
        if residual and input.dtype != low:
            block = mbconv(
                input.to(low), expand, depthwise, squeeze_excite, project, stride, padding
            )
            check_residual(True, input, tuple(block.shape))
            return block + input
        input = input.to(low)
        expand, depthwise, project = to_autocast(low, expand, depthwise, project)
    checked = check_block(
        input, expand, depthwise, squeeze_excite, project, stride, padding, residual
    )
    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, expand, depthwise, squeeze_excite, project, checked.stride, checked.pads,
            residual=residual,
        )  # fmt: skip
    result = _OPS[backend](
        input.contiguous(memory_format=torch.channels_last),
        *kernel_block(input, expand, depthwise, squeeze_excite, project, checked),
        residual,
        allows_tf32(input),
    )
    return result  # type: ignore[no-any-return]


def _as_given(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
) -> Tensor | None:
    """A call on CPU tensors that needs no conversion, or None where it needs one: as the depthwise
    op has it, the compiled op's own checks come first and those in Python find the words.
    """
    try:
        pads = (
            (padding,) * 4
            if padding.__class__ is int
            else check_padding(padding, input, depthwise.weight.shape[2], stride)
        )
        result = _OPS[backends.CPU.name](
            input,
            *flat_conv_bn(expand),
            *flat_conv_bn(depthwise),
            stride,
            pads,
            *flat_squeeze_excite(squeeze_excite),
            *flat_conv_bn(project),
            residual,
            False,
        )
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return None
    return result  # type: ignore[no-any-return]


def reference(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int,
    pads: Sequence[int],
    *,
    residual: bool,
) -> Tensor:
    """``mbconv`` in PyTorch's own ops: the eager backend, and the tests' yardstick.

    Arguments as there, checked; ``pads`` is (top, left, bottom, right).
    """
    x = input if expand is None else pointwise(input, expand)
    weight, mean, var, bn_weight, bn_bias, eps, activation = depthwise
    x = depthwise_reference(
        x, weight, mean, var, bn_weight, bn_bias, stride, pads, False, eps, activation,
        pool=False, prologue=None,
    ).output  # fmt: skip
    if squeeze_excite is not None:
        x = squeeze_excite_reference(x, *squeeze_excite, pooled=None)
    x = pointwise(x, project)
    return x + input if residual else x


def check_block(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
    *,
    statistics: bool = True,
    cast: bool = False,
) -> CheckedBlock:
    """The arguments of ``mbconv`` are right.

    Raises:
        TypeError, ValueError: as ``mbconv``.
    """
    return remembered(
        _check_block, depthwise, input, (expand, depthwise, squeeze_excite, project), stride,
        padding, residual, statistics, cast,
    )  # fmt: skip


def _check_block(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
    statistics: bool,
    cast: bool,
) -> CheckedBlock:
    channels = input.shape[1]
    if expand is not None:
        check_pointwise("expand", expand, input, channels, statistics, cast)
        channels = expand.weight.shape[0]
    check_conv_bn("depthwise", depthwise)
    check_depthwise_weight("depthwise.weight", depthwise.weight, input, channels, cast=cast)
    check_bn("depthwise", depthwise, channels, input.device, statistics)
    stride = check_stride(stride)
    pads = check_padding(padding, input, depthwise.weight.shape[2], stride)
    check_squeeze_excite(squeeze_excite, channels, input.device)
    check_pointwise("project", project, input, channels, statistics, cast)
    out_h, out_w = output_hw(input, depthwise.weight, stride, pads)
    shape = (input.shape[0], project.weight.shape[0], out_h, out_w)
    check_residual(residual, input, shape)
    return CheckedBlock(stride, pads, shape, as_given=False)


def kernel_block(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    checked: CheckedBlock,
) -> tuple[Any, ...]:
    """A checked block as the functional ops take it, from expand's weight to project's activation.

    Weights keep their dtype.
    """
    stages = (expand, depthwise, squeeze_excite, project)
    if not checked.as_given:
        stages = kernel_stages(stages, input)
    expand, depthwise, squeeze_excite, project = stages
    return (
        *flat_conv_bn(expand),
        *flat_conv_bn(depthwise),
        checked.stride,
        checked.pads,
        *flat_squeeze_excite(squeeze_excite),
        *flat_conv_bn(project),
    )


# --------------------------------------------------------------------------------------------------
# The registered functional op (see depthwise_conv_bn_act.py).
# --------------------------------------------------------------------------------------------------


def block_arguments(statistics: str) -> str:
    """The schema's arguments of a block, up to what ops differ in.

    Args:
        statistics: the type of running means and variances.
    """
    return (
        f"Tensor input, {conv_bn_schema('expand', 'Tensor?', 'Tensor?')}, "
        f"{conv_bn_schema('depthwise', 'Tensor', statistics)}, int stride, SymInt[4] padding, "
        f"{SQUEEZE_EXCITE_SCHEMA}, {conv_bn_schema('project', 'Tensor', statistics)}"
    )


_ARGUMENTS = f"{block_arguments('Tensor')}, bool residual, bool allow_tf32"
_NAMES = names_of(_ARGUMENTS)

# What csrc/cuda/pointwise_expand.cuh takes at most (channels) and at least (pixels).
_EXPAND_CHANNELS, _EXPAND_PIXELS = 96, 1 << 15


def _empty_output(
    input: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    stride: int,
    padding: Sequence[int],
) -> Tensor:
    height, width = output_hw(input, depthwise_weight, stride, padding)
    return library.empty_image(input, project_weight.shape[0], height, width)


def _is_expansion(input: Tensor, channels: int) -> bool:
    """Whether CUDA C++ has a kernel of its own for the expansion of ``input``."""
    n, in_channels, height, width = input.shape
    return (
        in_channels <= _EXPAND_CHANNELS
        and in_channels < channels
        and in_channels % 8 == channels % 8 == 0
        and n * height * width >= _EXPAND_PIXELS
    )


def _inference(
    backend: str, input: Tensor,
    expand_weight: Tensor | None, expand_mean: Tensor | None, expand_var: Tensor | None,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None, expand_eps: float,
    expand_activation: int,
    depthwise_weight: Tensor, depthwise_mean: Tensor, depthwise_var: Tensor,
    depthwise_bn_weight: Tensor | None, depthwise_bn_bias: Tensor | None, depthwise_eps: float,
    depthwise_activation: int, stride: int, padding: Sequence[int],
    reduce_weight: Tensor | None, reduce_bias: Tensor | None,
    excite_weight: Tensor | None, excite_bias: Tensor | None,
    se_activation: int, gate_activation: int,
    project_weight: Tensor, project_mean: Tensor, project_var: Tensor,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, project_eps: float,
    project_activation: int, residual: bool, allow_tf32: bool,
) -> Tensor:  # fmt: skip
    """The launches of a GPU: two or three for d and its sums, one for the gate, one for project."""
    input = input.contiguous(memory_format=torch.channels_last)
    output = _empty_output(input, depthwise_weight, project_weight, stride, padding)
    if output.numel() == 0:
        return output
    n, _, height, width = input.shape
    channels = depthwise_weight.shape[0]
    out_h, out_w = output.shape[2:]
    depthwise = library.empty_image(input, channels, out_h, out_w)
    pooled = gate = None
    if reduce_weight is not None:
        pooled = input.new_empty((n, channels), dtype=checks.accumulator(input))
        gate = torch.empty_like(pooled)
    expansion = (
        expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias, expand_eps,
        expand_activation,
    )  # fmt: skip
    depthwise_bn = (
        depthwise_weight, depthwise_mean, depthwise_var, depthwise_bn_weight, depthwise_bn_bias,
        depthwise_eps,
    )  # fmt: skip
    geometry = (stride, padding[0], padding[1], depthwise_activation)
    if expand_weight is not None and fuses_expand(
        input, channels, depthwise_weight.shape[2], stride, (out_h, out_w)
    ):
        backends.kernel(backend, "expand_depthwise_out")(
            input, *expansion, *depthwise_bn, *geometry, allow_tf32, depthwise, pooled
        )
    else:
        expanded = input
        if expand_weight is not None:
            expanded = library.empty_image(input, channels, height, width)
            kernel = backends.fastest_kernel(
                backend, "pointwise_conv_bn_act_out", expanded,
                few_channels=_is_expansion(input, channels),
            )  # fmt: skip
            kernel(input, *expansion, None, None, 0, None, None, allow_tf32, expanded, None)
        backends.kernel(backend, "depthwise_conv_bn_act_out")(
            expanded, *depthwise_bn, *geometry, None, None, 0, depthwise, pooled
        )
    if pooled is not None and reduce_weight is not None:
        hidden = pooled.new_empty((n, reduce_weight.shape[0]))
        backends.fastest_kernel(backend, "squeeze_excite_gate_out", depthwise)(
            pooled, out_h * out_w, reduce_weight, reduce_bias, excite_weight, excite_bias,
            se_activation, gate_activation, hidden, gate,
        )  # fmt: skip
    backends.fastest_kernel(backend, "pointwise_conv_bn_act_out", depthwise)(
        depthwise, project_weight, project_mean, project_var, project_bn_weight, project_bn_bias,
        project_eps, project_activation, None, None, 0, gate, input if residual else None,
        allow_tf32, output, None,
    )  # fmt: skip
    return output


def _inference_fake(input: Tensor, *rest: Any) -> Tensor:
    named = dict(zip(_NAMES, (input, *rest), strict=True))
    return _empty_output(
        input, named["depthwise_weight"], named["project_weight"], named["stride"],
        named["padding"],
    )  # fmt: skip


_OPS: dict[str, Any] = library.register(
    OP,
    f"({_ARGUMENTS}) -> Tensor",
    implementation=_inference,
    fake=_inference_fake,
)
library.not_differentiable(OP, f"{OP} has no derivative: it is for inference")
