r"""The Fused-MBConv block in inference, as one op.

    e = act(bn(conv(input)))                      k x k, stride 1 or 2, C to M channels
    gate = g(excite_weight @ a(reduce_weight @ mean(e)))
    output = bn(project_weight @ (e * gate)) + input

EfficientNetV2's early stages are such blocks without squeeze-and-excitation. Where they do not
expand (``project`` None, M = K), the block is its first line and the residual.

Memory traffic, in activation tensors read + written (x: the input, e: the expanded tensor, y: the
output; with stride 1 e is 4x to 6x)

=====================  ===================  ===================  ==================
step                   eager                convs fused with BN  this op
=====================  ===================  ===================  ==================
expand                 x + e                x + e                \
  BN, activation       4e                   \                    \
project                e + y                e + y                x + y
  BN, residual         2y + 3y              y                    x
**all**                **x + 6e + 6y**      **x + 2e + 2y**      **2x + y**
with SE                + 3e                 + 3e                 + 2e
=====================  ===================  ===================  ==================

On a GPU that is one launch, and the expanded tensor lives in registers and shared memory: the
second convolution is 1x1, so no tile needs its neighbours. With squeeze-and-excitation the gate
needs all of e before any of it is projected, and e is written: three launches. On the CPU a block
of pixels goes through both products in one thread's caches; a 3x3 convolution with stride 1 takes
16 products there for the 36 of a tile of 2x2 results (``csrc/cpu/winograd.h``), where products are
of the accumulate dtype.

Source: "EfficientNetV2: Smaller Models and Faster Training" (arXiv:2104.00298); the block is from
"EfficientNet-EdgeTPU" (Gupta and Tan, Google AI blog, 2019).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.activations import EAGER, Activation
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
from effnet_kernels.ops.pointwise_conv_bn_act import allows_tf32
from effnet_kernels.ops.squeeze_excite import reference as squeeze_excite_reference

OP = "fused_mbconv"
_KERNEL_SIZES = (3, 5, 7)


def fused_mbconv(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    stride: int = 1,
    padding: int | str | Sequence[int] = 0,
    *,
    residual: bool = False,
) -> Tensor:
    """The block of ``input``, in inference only: a gradient through it is an error.

    Under autocast, ``input`` and the convolutions' weights are cast as ``conv2d`` casts them, and
    the residual is the input as it was, so that the sum has its dtype.

    Args:
        input: (N, C, H, W), float32, float16, bfloat16 or float64; channels-last is taken as it is,
            other layouts are converted once.
        expand: a dense k x k convolution, C to M channels, k in {3, 5, 7}. A weight that is
            channels-last is taken as it is, others are converted at each call.
        squeeze_excite: of M channels, or None.
        project: M to K channels, or None where the block does not expand.
        stride: of the k x k convolution, 1 or 2.
        padding: of it, as in ``depthwise_conv_bn_act``.
        residual: add the input, which then has the output's shape.

    Returns:
        (N, K, OH, OW), channels-last, the input's dtype.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument's rank, shape, device or value is wrong, or ``squeeze_excite`` is
            given without ``project``. Both name the argument, and come before any kernel runs.
        RuntimeError: the backend that ``use_backend`` demands cannot take the call; or, in
            backward, a gradient was asked for.
    """
    checks.check_image("input", input)
    low = checks.autocast_dtype(input)
    if low is not None:
        if residual and input.dtype != low:
            block = fused_mbconv(input.to(low), expand, squeeze_excite, project, stride, padding)
            check_residual(True, input, tuple(block.shape))
            return block + input
        input = input.to(low)
        expand, project = to_autocast(low, expand, project)
    checked = check_block(input, expand, squeeze_excite, project, stride, padding, residual)
    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, expand, squeeze_excite, project, checked.stride, checked.pads, residual=residual
        )
    result = _OPS[backend](
        input.contiguous(memory_format=torch.channels_last),
        *kernel_block(input, expand, squeeze_excite, project, checked),
        residual,
        allows_tf32(input),
    )
    return result  # type: ignore[no-any-return]


def reference(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    stride: int,
    pads: Sequence[int],
    *,
    residual: bool,
) -> Tensor:
    """``fused_mbconv`` in PyTorch's own ops: the eager backend, and the tests' yardstick.

    Arguments as there, checked; ``pads`` is (top, left, bottom, right).
    """
    weight, mean, var, bn_weight, bn_bias, eps, activation = expand
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device)  # the meta device, for one, has none
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        x = conv2d(input, weight, stride, pads)
        if x.dtype == torch.float64:  # batch_norm takes no mixture with float64
            mean, var, bn_weight, bn_bias = (
                None if t is None else t.double() for t in (mean, var, bn_weight, bn_bias)
            )
        x = F.batch_norm(x, mean, var, bn_weight, bn_bias, False, 0.0, eps)
        x = EAGER[Activation[activation]](x).contiguous(memory_format=torch.channels_last)
    if squeeze_excite is not None:
        x = squeeze_excite_reference(x, *squeeze_excite, pooled=None)
    if project is not None:
        x = pointwise(x, project)
    return x + input if residual else x


def conv2d(input: Tensor, weight: Tensor, stride: int, pads: Sequence[int]) -> Tensor:
    """PyTorch's convolution with any padding, (top, left, bottom, right)."""
    top, left, bottom, right = pads
    if top == bottom and left == right:
        return F.conv2d(input, weight, None, stride, (top, left))
    return F.conv2d(F.pad(input, (left, right, top, bottom)), weight, None, stride)


def check_block(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
    *,
    statistics: bool = True,
    cast: bool = False,
) -> CheckedBlock:
    """The arguments of ``fused_mbconv`` are right.

    Raises:
        TypeError, ValueError: as ``fused_mbconv``.
    """
    return remembered(
        _check_block, expand, input, (expand, squeeze_excite, project), stride, padding, residual,
        statistics, cast,
    )  # fmt: skip


def _check_block(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    stride: int,
    padding: int | str | Sequence[int],
    residual: bool,
    statistics: bool,
    cast: bool,
) -> CheckedBlock:
    check_conv_bn("expand", expand)
    weight = expand.weight
    checks.check_image("expand.weight", weight)
    channels, _, k, _ = weight.shape
    if k not in _KERNEL_SIZES or tuple(weight.shape) != (channels, input.shape[1], k, k):
        raise ValueError(
            f"expand.weight: got shape {tuple(weight.shape)}, expected (M, {input.shape[1]}, k, k) "
            "with k 3, 5 or 7"
        )
    checks.check_weight_dtype("expand.weight", weight, input, cast=cast)
    checks.check_same_device("expand.weight", weight, input.device)
    check_bn("expand", expand, channels, input.device, statistics)
    stride = check_stride(stride)
    pads = check_padding(padding, input, k, stride)
    check_squeeze_excite(squeeze_excite, channels, input.device)
    features = channels
    if project is not None:
        check_pointwise("project", project, input, channels, statistics, cast)
        features = project.weight.shape[0]
    elif squeeze_excite is not None:
        raise ValueError("squeeze_excite: got a SqueezeExcite, expected None without project")
    shape = (input.shape[0], features, *output_hw(input, weight, stride, pads))
    check_residual(residual, input, shape)
    return CheckedBlock(stride, pads, shape, as_given=False)


def kernel_block(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    checked: CheckedBlock,
) -> tuple[Any, ...]:
    """A checked block as the functional ops take it, from expand's weight to project's activation.

    Weights keep their dtype.
    """
    stages = (expand, squeeze_excite, project)
    if not checked.as_given:
        stages = kernel_stages(stages, input)
    expand, squeeze_excite, project = stages
    return (
        *flat_conv_bn(expand),
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
        statistics: the type of expand's running mean and variance.
    """
    return (
        f"Tensor input, {conv_bn_schema('expand', 'Tensor', statistics)}, int stride, "
        f"SymInt[4] padding, {SQUEEZE_EXCITE_SCHEMA}, "
        f"{conv_bn_schema('project', 'Tensor?', 'Tensor?')}"
    )


_ARGUMENTS = f"{block_arguments('Tensor')}, bool residual, bool allow_tf32"
_NAMES = names_of(_ARGUMENTS)


def _empty_output(
    input: Tensor,
    expand_weight: Tensor,
    project_weight: Tensor | None,
    stride: int,
    padding: Sequence[int],
) -> Tensor:
    channels = (expand_weight if project_weight is None else project_weight).shape[0]
    return library.empty_image(input, channels, *output_hw(input, expand_weight, stride, padding))


def _is_narrow(channels: int) -> bool:
    """Whether csrc/cuda/dense_conv.cuh convolves so many channels; else the block's kernel does."""
    return channels <= 3 or (channels % 8 == 0 and channels < 48)


def _inference(
    backend: str, input: Tensor,
    expand_weight: Tensor, expand_mean: Tensor, expand_var: Tensor,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None, expand_eps: float,
    expand_activation: int, stride: int, padding: Sequence[int],
    reduce_weight: Tensor | None, reduce_bias: Tensor | None,
    excite_weight: Tensor | None, excite_bias: Tensor | None,
    se_activation: int, gate_activation: int,
    project_weight: Tensor | None, project_mean: Tensor | None, project_var: Tensor | None,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, project_eps: float,
    project_activation: int, residual: bool, allow_tf32: bool,
) -> Tensor:  # fmt: skip
    """One launch; with squeeze-and-excitation one for e and its sums, the gate, and project."""
    input = input.contiguous(memory_format=torch.channels_last)
    output = _empty_output(input, expand_weight, project_weight, stride, padding)
    if output.numel() == 0:
        return output
    expand_weight = expand_weight.contiguous(memory_format=torch.channels_last)
    added = input if residual else None
    expand = (
        input, expand_weight, expand_mean, expand_var, expand_bn_weight, expand_bn_bias,
        expand_eps, expand_activation, stride, padding[0], padding[1],
    )  # fmt: skip
    project = (
        project_weight, project_mean, project_var, project_bn_weight, project_bn_bias, project_eps,
        project_activation,
    )  # fmt: skip
    kernel = backends.fastest_kernel(
        backend, "fused_mbconv_out", input,
        few_channels=project_weight is None and _is_narrow(input.shape[1]),
    )  # fmt: skip
    if reduce_weight is None:
        kernel(*expand, *project, added, allow_tf32, output, None)
        return output
    n, channels = input.shape[0], expand_weight.shape[0]
    out_h, out_w = output.shape[2:]
    expanded = library.empty_image(input, channels, out_h, out_w)
    pooled = input.new_empty((n, channels), dtype=checks.accumulator(input))
    gate = torch.empty_like(pooled)
    no_project = (None, None, None, None, None, 0.0, int(Activation.identity))
    kernel(*expand, *no_project, None, allow_tf32, expanded, pooled)
    hidden = pooled.new_empty((n, reduce_weight.shape[0]))
    backends.fastest_kernel(backend, "squeeze_excite_gate_out", expanded)(
        pooled, out_h * out_w, reduce_weight, reduce_bias, excite_weight, excite_bias,
        se_activation, gate_activation, hidden, gate,
    )  # fmt: skip
    backends.fastest_kernel(backend, "pointwise_conv_bn_act_out", expanded)(
        expanded, *project, None, None, int(Activation.identity), gate, added, allow_tf32, output,
        None,
    )  # fmt: skip
    return output


def _inference_fake(input: Tensor, *rest: Any) -> Tensor:
    named = dict(zip(_NAMES, (input, *rest), strict=True))
    return _empty_output(
        input, named["expand_weight"], named["project_weight"], named["stride"], named["padding"]
    )


_OPS: dict[str, Any] = library.register(
    OP,
    f"({_ARGUMENTS}) -> Tensor",
    implementation=_inference,
    fake=_inference_fake,
    on_cpu=True,
)
library.not_differentiable(OP, f"{OP} has no derivative: it is for inference")
