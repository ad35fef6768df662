r"""The Fused-MBConv block with gradients: only what the convolutions computed is kept for backward.

    e = conv(input)                               k x k, C to M channels; kept
    z = act(bn(e)) * gate
    p = project_weight @ z                        kept
    output = bn(p) * sample_scale + input

Normalised, activated and scaled tensors are recomputed in backward from e and p. The convolution
and the products are PyTorch's (cuDNN and cuBLAS, oneDNN and MKL); all that surrounds them is fused.
On the CPU project's product is ours in forward, which computes z as it loads e: 2e less than in the
table. A block that does not expand is ``conv2d`` and ``batch_norm_act``.

Memory traffic, in activation tensors read + written (x: the input, e, p as above, y: the output; in
backward the gradients count as what they belong to)

===========================  =========================  =========================
step                         eager                      this op
===========================  =========================  =========================
expand                       x + e                      x + e, e for statistics
  BN, activation             5e                         2e for z
project                      e + p                      e + p
  BN, drop path, residual    8p                         3p + x
**forward**                  **x + 7e + 9p**            **2x + 5e + 4p**
backward: BN of p            8p + 3p                    5p
          product, weight    2 (p + e)                  2 (p + e), 2e for z
          activation, BN     8e                         5e
          convolution        2 (e + x) + 3x             2 (e + x) + 3x
**backward**                 **13p + 12e + 5x**         **7p + 11e + 5x**
saved for backward           x + 3e + p                 x + e + p
===========================  =========================  =========================

Source: as ``fused_mbconv``; "In-Place Activated BatchNorm" (arXiv:1712.02616) recomputes the same
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.ops import checks, library
from effnet_kernels.ops.batch_norm_act import backward_out, batch_norm_act
from effnet_kernels.ops.batch_norm_act import reference as batch_norm_reference
from effnet_kernels.ops.block import (
    ConvBn,
    SqueezeExcite,
    Statistics,
    check_residual,
    to_autocast,
)
from effnet_kernels.ops.block_train import (
    Excite,
    Expanded,
    Project,
    empty_gradients,
    project_backward,
    project_forward,
    register,
    rows_of_weights,
    statistics_of,
)
from effnet_kernels.ops.depthwise_conv_bn_act import output_hw
from effnet_kernels.ops.fused_mbconv import block_arguments, check_block, conv2d, kernel_block
from effnet_kernels.ops.squeeze_excite import reference as squeeze_excite_reference

OP = "fused_mbconv_train"


class FusedMbconvTrainOutput(NamedTuple):
    """Results of ``fused_mbconv_train``.

    Attributes:
        output: (N, K, OH, OW), channels-last, the input's dtype.
        expand: the statistics of expand's BN, or None unless ``training``.
        project: of project's, or None without one or unless ``training``.
    """

    output: Tensor
    expand: Statistics | None
    project: Statistics | None


def fused_mbconv_train(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    stride: int = 1,
    padding: int | str | Sequence[int] = 0,
    *,
    training: bool = True,
    residual: bool = False,
    sample_scale: Tensor | None = None,
) -> FusedMbconvTrainOutput:
    """``fused_mbconv``, differentiable, with batch statistics or running ones.

    Functional: updating the running statistics is the caller's. Gradients reach ``input``, all
    weights and biases. A second derivative is an error.

    Args:
        input: as in ``fused_mbconv``, like all that are not named here.
        expand: C to M channels; its running statistics are unused in training.
        squeeze_excite: of M channels, or None.
        project: M to K channels, or None; its running statistics likewise.
        stride: of the k x k convolution.
        padding: of it.
        training: normalise by the statistics of this batch instead of the running ones.
        residual: add the input.
        sample_scale: (N,), floating point: what drop path multiplies an image by before the
            residual. Not differentiable.

    Returns:
        The output, and the batch statistics in training.

    Raises:
        TypeError, ValueError, RuntimeError: as ``fused_mbconv``.
    """
    checks.check_image("input", input)
    low = checks.autocast_dtype(input)
    if low is not None:
        if residual and input.dtype != low:
            block = fused_mbconv_train(
                input.to(low), expand, squeeze_excite, project, stride, padding,
                training=training, sample_scale=sample_scale,
            )  # fmt: skip
            check_residual(True, input, tuple(block.output.shape))
            return block._replace(output=block.output + input)
        input = input.to(low)
        expand, project = to_autocast(low, expand, project)
    checked = check_block(
        input, expand, squeeze_excite, project, stride, padding, residual, statistics=not training
    )
    n, _, out_h, out_w = checked.shape
    if sample_scale is not None:
        checks.check_shape("sample_scale", sample_scale, (n,), input.device)
    if training and n * out_h * out_w == 1:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, one result a channel; training needs more"
        )

    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, expand, squeeze_excite, project, checked.stride, checked.pads,
            training=training, residual=residual, sample_scale=sample_scale,
        )  # fmt: skip
    if project is None:
        image = input.contiguous(memory_format=torch.channels_last)
        conv = conv2d(image, expand.weight, checked.stride, checked.pads)
        result = batch_norm_act(
            conv, *expand[1:5], training, *expand[5:], residual=image if residual else None,
            sample_scale=sample_scale,
        )  # fmt: skip
        statistics = statistics_of(result.batch_mean, result.batch_var, conv)
        return FusedMbconvTrainOutput(result.output, statistics, None)
    output, vectors, *_ = _OPS.forward[backend](
        input.contiguous(memory_format=torch.channels_last),
        *kernel_block(input, expand, squeeze_excite, project, checked),
        residual,
        None if sample_scale is None else sample_scale.to(checks.accumulator(input)),
        training,
    )
    if not training:
        return FusedMbconvTrainOutput(output, None, None)
    sizes = rows_of_weights(expand.weight, project.weight)
    means, variances = _halves(vectors, sizes)
    pixels = n * out_h * out_w
    return FusedMbconvTrainOutput(
        output,
        Statistics(means[0], variances[0], pixels),
        Statistics(means[1], variances[1], pixels),
    )


def _halves(vectors: Tensor, sizes: list[int]) -> tuple[Sequence[Any], Sequence[Any]]:
    """The vectors of one kind by BN, and those of the other."""
    parts = vectors.split_with_sizes([*sizes, *sizes])
    return parts[: len(sizes)], parts[len(sizes) :]


def reference(
    input: Tensor,
    expand: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn | None,
    stride: int,
    pads: Sequence[int],
    *,
    training: bool,
    residual: bool,
    sample_scale: Tensor | None,
) -> FusedMbconvTrainOutput:
    """``fused_mbconv_train`` in PyTorch's own ops: the eager backend, and the tests' yardstick.

    Arguments as there, checked; ``pads`` is (top, left, bottom, right).
    """

    def norm(
        conv: Tensor, stage: ConvBn, residual: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Statistics | None]:
        _, mean, var, bn_weight, bn_bias, eps, activation = stage
        result = batch_norm_reference(
            conv, mean, var, bn_weight, bn_bias, training, eps, activation, residual=residual,
            sample_scale=scale,
        )  # fmt: skip
        return result.output, statistics_of(result.batch_mean, result.batch_var, conv)

    last = (input if residual else None, sample_scale)
    x = conv2d(input, expand.weight, stride, pads)
    x, expanded = norm(x, expand, *((None, None) if project is not None else last))
    if project is None:
        return FusedMbconvTrainOutput(x, expanded, None)
    if squeeze_excite is not None:
        x = squeeze_excite_reference(x, *squeeze_excite, pooled=None)
    x = F.conv2d(x, project.weight.flatten(1)[:, :, None, None])
    output, projected = norm(x, project, *last)
    return FusedMbconvTrainOutput(output, expanded, projected)


# --------------------------------------------------------------------------------------------------
# The registered functional ops (see depthwise_conv_bn_act.py). Vectors are the parts of one tensor:
# in forward the means of both BNs in training, then their variances.
# --------------------------------------------------------------------------------------------------


_ARGUMENTS = f"{block_arguments('Tensor?')}, bool residual, Tensor? sample_scale, bool training"


def _allocate(
    input: Tensor, expand_weight: Tensor, reduce_weight: Tensor | None, project_weight: Tensor,
    stride: int, padding: Sequence[int], training: bool, conv: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What forward returns; ``conv`` is PyTorch's own."""
    n = input.shape[0]
    channels, features = rows_of_weights(expand_weight, project_weight)
    out_hw = output_hw(input, expand_weight, stride, padding)
    dtype = checks.accumulator(input)
    gated = (0, 0) if reduce_weight is None else (n, channels)
    squeezed = (0, 0) if reduce_weight is None else (n, reduce_weight.shape[0])
    return (
        library.empty_image(input, features, *out_hw),
        input.new_empty(2 * (channels + features) if training else 0, dtype=dtype),
        library.empty_image(input, channels, *out_hw) if conv is None else conv,
        library.empty_image(input, features, *out_hw),
        input.new_empty((2, *gated), dtype=dtype),
        input.new_empty(squeezed, dtype=dtype),
    )


def _forward(
    backend: str, input: Tensor,
    expand_weight: Tensor, expand_mean: Tensor | None, expand_var: Tensor | None,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None, expand_eps: float,
    expand_activation: int, stride: int, padding: Sequence[int],
    reduce_weight: Tensor | None, reduce_bias: Tensor | None,
    excite_weight: Tensor | None, excite_bias: Tensor | None,
    se_activation: int, gate_activation: int,
    project_weight: Tensor, project_mean: Tensor | None, project_var: Tensor | None,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, project_eps: float,
    project_activation: int, residual: bool, sample_scale: Tensor | None, training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    conv = conv2d(input, expand_weight, stride, padding)
    conv = conv.contiguous(memory_format=torch.channels_last)
    results = _allocate(
        input, expand_weight, reduce_weight, project_weight, stride, padding, training, conv
    )
    output, vectors, _, projected, values, hidden = results
    if output.numel() == 0:
        vectors.zero_()
        return results
    means: Sequence[Any] = (expand_mean, project_mean)
    variances: Sequence[Any] = (expand_var, project_var)
    if training:
        sizes = rows_of_weights(expand_weight, project_weight)
        means, variances = _halves(vectors, sizes)
        backends.kernel(backend, "channel_statistics_out")(conv, means[0], variances[0])
    project_forward(
        backend,
        Expanded(
            conv, (means[0], variances[0], expand_bn_weight, expand_bn_bias, expand_eps),
            expand_activation,
        ),
        Excite(
            reduce_weight, reduce_bias, excite_weight, excite_bias, se_activation, gate_activation,
            values, hidden,
        ),
        Project(
            project_weight.flatten(1),
            (means[1], variances[1], project_bn_weight, project_bn_bias, project_eps),
            project_activation, projected, sample_scale, training,
        ),
        input if residual else None,
        output,
    )  # fmt: skip
    return results


def _allocate_backward(
    input: Tensor, expand_weight: Tensor, reduce_weight: Tensor | None,
    excite_weight: Tensor | None, project_weight: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What backward returns after the gradients of input and expand's weight, PyTorch's own."""
    norms = sum(rows_of_weights(expand_weight, project_weight))
    return empty_gradients(input, reduce_weight, excite_weight, project_weight, norms)


def _backward(
    backend: str, grad_output: Tensor, vectors: Tensor, conv: Tensor, projected: Tensor,
    values: Tensor, hidden: Tensor, input: Tensor,
    expand_weight: Tensor, expand_mean: Tensor | None, expand_var: Tensor | None,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None,
    reduce_weight: Tensor | None, excite_weight: Tensor | None,
    project_weight: Tensor, project_mean: Tensor | None, project_var: Tensor | None,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, sample_scale: Tensor | None,
    expand_eps: float, expand_activation: int, stride: int, padding: Sequence[int],
    se_activation: int, gate_activation: int, project_eps: float, project_activation: int,
    residual: bool, training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grads = _allocate_backward(input, expand_weight, reduce_weight, excite_weight, project_weight)
    if input.numel() == 0:
        for grad in grads:
            grad.zero_()
        return _zeros(input), _zeros(expand_weight), *grads
    *grad_excite, grad_project, grad_bn = grads
    sizes = rows_of_weights(expand_weight, project_weight)
    means: Sequence[Any] = (expand_mean, project_mean)
    variances: Sequence[Any] = (expand_var, project_var)
    if training:
        means, variances = _halves(vectors, sizes)
    grad_weight, grad_bias = _halves(grad_bn, sizes)
    bn = (means[0], variances[0], expand_bn_weight, expand_bn_bias, expand_eps)
    grad_scaled, grad_pooled = project_backward(
        backend,
        grad_output,
        Expanded(conv, bn, expand_activation),
        Excite(
            reduce_weight, None, excite_weight, None, se_activation, gate_activation, values, hidden
        ),
        Project(
            project_weight.flatten(1),
            (means[1], variances[1], project_bn_weight, project_bn_bias, project_eps),
            project_activation, projected, sample_scale, training,
        ),
        grad_excite,
        (grad_project.flatten(1), grad_weight[1], grad_bias[1]),
    )  # fmt: skip
    backward_out(
        backend, grad_scaled, conv, bn, expand_activation, None, training, grad_scaled,
        grad_weight[0], grad_bias[0], grad_pooled,
    )  # fmt: skip
    top, left, bottom, right = padding
    symmetric = top == bottom and left == right
    padded = input if symmetric else F.pad(input, (left, right, top, bottom))
    grad_input, grad_expand, _ = torch.ops.aten.convolution_backward(
        grad_scaled, padded, expand_weight, None, (stride, stride),
        (top, left) if symmetric else (0, 0), (1, 1), False, (0, 0), 1, (True, True, False),
    )  # fmt: skip
    if not symmetric:
        grad_input = grad_input[:, :, top : top + input.shape[2], left : left + input.shape[3]]
    grad_input = grad_input.contiguous(memory_format=torch.channels_last)
    if residual:
        grad_input.add_(grad_output)
    grad_expand = grad_expand.contiguous(memory_format=torch.channels_last)
    return grad_input, grad_expand, *grads


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.channels_last)


def _backward_fake(named: dict[str, Any]) -> tuple[Tensor, ...]:
    names = ("input", "expand_weight", "reduce_weight", "excite_weight", "project_weight")
    input, weight, *rest = (named[name] for name in names)
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        torch.empty_like(weight, memory_format=torch.channels_last),
        *_allocate_backward(input, weight, *rest),
    )


_OPS = register(
    OP,
    _ARGUMENTS,
    stages=("expand", "project"),
    saved=("vectors", "conv", "projected", "gate_values", "hidden"),
    gradients=(
        "input", "expand_weight", "reduce_weight", "reduce_bias", "excite_weight", "excite_bias",
        "project_weight",
    ),
    forward=_forward,
    allocate=lambda named: _allocate(
        named["input"], named["expand_weight"], named["reduce_weight"], named["project_weight"],
        named["stride"], named["padding"], named["training"],
    ),
    backward=_backward,
    allocate_backward=_backward_fake,
)  # fmt: skip
