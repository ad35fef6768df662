r"""The MBConv block with gradients: only what the convolutions computed is kept for backward.

    e = expand_weight @ input                     C_in to C channels; kept
    d = depthwise_conv(act(bn(e)))                kept
    z = act(bn(d)) * gate
    p = project_weight @ z                        kept
    output = bn(p) * sample_scale + input

Normalised, activated and scaled tensors are recomputed in backward from e and d. The products are
PyTorch's (cuBLAS, oneDNN, MKL); all that surrounds them is fused. On the CPU project's is ours in
forward, which computes z as it loads d: 2d less than in the table.

Memory traffic, in activation tensors read + written (x: the input, e, d, p as above, y: the output;
in backward the gradients count as what they belong to)

===========================  =========================  =========================
step                         eager                      this op
===========================  =========================  =========================
expand                       x + e                      x + e, e for statistics
  BN, activation             5e                         \
depthwise                    e + d                      e + d, with statistics
  BN, activation             5d                         \
squeeze-and-excite           3d                         d for the sums, 2d for z
project                      d + p                      d + p
  BN, drop path, residual    8p                         3p + x
**forward**                  **x + 7e + 10d + 9p**      **2x + 3e + 5d + 4p**
backward: BN of p            8p + 3p                    5p
          product, weight    2 (p + d)                  2 (p + d)
          squeeze-and-excite 8d                         4d
          depthwise stage    10d + 2e                   4d + 2e
          BN of e            8e                         3e
          product, weight    2 (e + x) + 3x             2 (e + x) + x
**backward**                 **13p + 20d + 12e + 5x**   **7p + 10d + 7e + 3x**
saved for backward           x + 3e + 4d + p            x + e + d + p
===========================  =========================  =========================

Source: as ``mbconv``; "In-Place Activated BatchNorm" (arXiv:1712.02616) recomputes the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.ops import checks, library
from effnet_kernels.ops.batch_norm_act import affine_out, standardise_out
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
    rows_of,
    rows_of_weights,
    statistics_of,
)
from effnet_kernels.ops.depthwise_conv_bn_act import output_hw
from effnet_kernels.ops.depthwise_conv_bn_act import reference as depthwise_reference
from effnet_kernels.ops.mbconv import block_arguments, check_block, kernel_block
from effnet_kernels.ops.squeeze_excite import reference as squeeze_excite_reference

OP = "mbconv_train"
_IDENTITY = 0


class MbconvTrainOutput(NamedTuple):
    """Results of ``mbconv_train``.

    Attributes:
        output: (N, K, OH, OW), channels-last, the input's dtype.
        expand: the statistics of expand's BN, or None without an expansion or unless ``training``.
        depthwise: of the depthwise stage's, or None unless ``training``.
        project: of project's, likewise.
    """

    output: Tensor
    expand: Statistics | None
    depthwise: Statistics | None
    project: Statistics | None


def mbconv_train(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int = 1,
    padding: int | str | Sequence[int] = 0,
    *,
    training: bool = True,
    residual: bool = False,
    sample_scale: Tensor | None = None,
) -> MbconvTrainOutput:
    """``mbconv``, differentiable, with batch statistics or running ones.

    Functional: updating the running statistics is the caller's. Gradients reach ``input``, all
    weights and biases. A second derivative is an error.

    Args:
        input: as in ``mbconv``, like all that are not named here.
        expand: C_in to C channels, or None; its running statistics are unused in training.
        depthwise: k x k; likewise.
        squeeze_excite: of C channels, or None.
        project: C to K channels; likewise.
        stride: of the depthwise convolution.
        padding: of the depthwise convolution.
        training: normalise by the statistics of this batch instead of the running ones.
        residual: add the input.
        sample_scale: (N,), floating point: what drop path multiplies an image by before the
            residual. Not differentiable.

    Returns:
        The output, and the batch statistics in training.

    Raises:
        TypeError, ValueError, RuntimeError: as ``mbconv``.
    """
    checks.check_image("input", input)
    low = checks.autocast_dtype(input)
    if low is not None:
        if residual and input.dtype != low:
            block = mbconv_train(
                input.to(low), expand, depthwise, squeeze_excite, project, stride, padding,
                training=training, sample_scale=sample_scale,
            )  # fmt: skip
            check_residual(True, input, tuple(block.output.shape))
            return block._replace(output=block.output + input)
        input = input.to(low)
    checked = check_block(
        input, expand, depthwise, squeeze_excite, project, stride, padding, residual,
        statistics=not training, cast=low is not None,
    )  # fmt: skip
    n, _, out_h, out_w = checked.shape
    if sample_scale is not None:
        checks.check_shape("sample_scale", sample_scale, (n,), input.device)
    if training and n * min(out_h * out_w, input.shape[2] * input.shape[3]) == 1:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, one value a channel; training needs more"
        )

    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        if low is not None:
            expand, depthwise, project = to_autocast(low, expand, depthwise, project)
        return reference(
            input, expand, depthwise, squeeze_excite, project, checked.stride, checked.pads,
            training=training, residual=residual, sample_scale=sample_scale,
        )  # fmt: skip
    output, vectors, *_ = _OPS.forward[backend](
        input.contiguous(memory_format=torch.channels_last),
        *kernel_block(input, expand, depthwise, squeeze_excite, project, checked),
        residual,
        None if sample_scale is None else sample_scale.to(checks.accumulator(input)),
        training,
    )
    if not training:
        return MbconvTrainOutput(output, None, None, None)
    weights = (None if expand is None else expand.weight, depthwise.weight, project.weight)
    parts = vectors.split_with_sizes(_vector_sizes(rows_of_weights(*weights), training))
    pixels = n * out_h * out_w
    return MbconvTrainOutput(
        output,
        None if expand is None
        else Statistics(parts[0], parts[3], n * input.shape[2] * input.shape[3]),
        Statistics(parts[1], parts[4], pixels),
        Statistics(parts[2], parts[5], pixels),
    )  # fmt: skip


def reference(
    input: Tensor,
    expand: ConvBn | None,
    depthwise: ConvBn,
    squeeze_excite: SqueezeExcite | None,
    project: ConvBn,
    stride: int,
    pads: Sequence[int],
    *,
    training: bool,
    residual: bool,
    sample_scale: Tensor | None,
) -> MbconvTrainOutput:
    """``mbconv_train`` in PyTorch's own ops: the eager backend, and the tests' yardstick.

    Arguments as there, checked; ``pads`` is (top, left, bottom, right).
    """

    def pointwise(
        x: Tensor, conv: ConvBn, residual: Tensor | None = None, scale: Tensor | None = None
    ) -> tuple[Tensor, Statistics | None]:
        weight, mean, var, bn_weight, bn_bias, eps, activation = conv
        y = torch.nn.functional.conv2d(x, weight.flatten(1)[:, :, None, None])
        result = batch_norm_reference(
            y, mean, var, bn_weight, bn_bias, training, eps, activation, residual=residual,
            sample_scale=scale,
        )  # fmt: skip
        return result.output, statistics_of(result.batch_mean, result.batch_var, y)

    x, expanded = (input, None) if expand is None else pointwise(input, expand)
    weight, mean, var, bn_weight, bn_bias, eps, activation = depthwise
    d = depthwise_reference(
        x, weight, mean, var, bn_weight, bn_bias, stride, pads, training, eps, activation,
        pool=False, prologue=None,
    )  # fmt: skip
    x = d.output
    if squeeze_excite is not None:
        x = squeeze_excite_reference(x, *squeeze_excite, pooled=None)
    output, projected = pointwise(x, project, input if residual else None, sample_scale)
    return MbconvTrainOutput(
        output, expanded, statistics_of(d.batch_mean, d.batch_var, d.output), projected
    )


# --------------------------------------------------------------------------------------------------
# The registered functional ops (see depthwise_conv_bn_act.py). What is small is allocated at once:
# vectors are the parts of one tensor, in forward means and variances of all BNs in training, those
# of expand first, then the scale and shift that expand's BN is; in backward the gradients of BNs'
# weights, then of their biases. Weights of another dtype than the input's, as under autocast, are
# cast together, and so are their gradients.
# --------------------------------------------------------------------------------------------------


_ARGUMENTS = f"{block_arguments('Tensor?')}, bool residual, Tensor? sample_scale, bool training"


def _vector_sizes(sizes: list[int], training: bool) -> list[int]:
    """The parts of ``vectors``: means, variances, scale, shift."""
    return [*sizes, *sizes, sizes[0], sizes[0]] if training else [sizes[0], sizes[0]]


_ALIGNMENT = 8
"""What weights in one tensor begin at a multiple of: 16 bytes, the widest load."""


def _low_sizes(input: Tensor, weights: Sequence[Tensor | None]) -> list[int]:
    """The elements of each weight in the tensor that those are cast to, or none if all are as the
    input already.
    """
    given = [weight for weight in weights if weight is not None]
    if all(weight.dtype == input.dtype for weight in given):
        return []
    return [_aligned(weight.numel()) for weight in given]


def _aligned(elements: int) -> int:
    return -(-elements // _ALIGNMENT) * _ALIGNMENT


def _low_matrices(low: Tensor, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The parts of ``low``, which has ``_low_sizes``, as matrices with a row a filter; ``weights``
    themselves where it has none.
    """
    if low.numel() == 0:
        return [None if weight is None else weight.flatten(1) for weight in weights]
    parts: list[Tensor | None] = []
    offset = 0
    for weight in weights:
        if weight is None:
            parts.append(None)
            continue
        rows, elements = weight.shape[0], weight.numel()
        columns = elements // rows
        parts.append(low.as_strided((rows, columns), (columns, 1), offset))
        offset += _aligned(elements)
    return parts


def _cast_between(weights: Sequence[Tensor | None], matrices: Sequence[Tensor | None]) -> Any:
    """The pairs of a cast, of ``weights`` as matrices."""
    return (
        [weight.flatten(1) for weight in weights if weight is not None],
        [matrix for matrix in matrices if matrix is not None],
    )


def _allocate(
    input: Tensor, expand_weight: Tensor | None, depthwise_weight: Tensor,
    reduce_weight: Tensor | None, project_weight: Tensor, stride: int, padding: Sequence[int],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, _, height, width = input.shape
    channels, features = depthwise_weight.shape[0], project_weight.shape[0]
    out_h, out_w = output_hw(input, depthwise_weight, stride, padding)
    dtype = checks.accumulator(input)
    sizes = rows_of_weights(expand_weight, depthwise_weight, project_weight)
    gated = (0, 0) if reduce_weight is None else (n, channels)
    low = _low_sizes(input, (expand_weight, depthwise_weight, project_weight))
    return (
        library.empty_image(input, features, out_h, out_w),
        input.new_empty(sum(_vector_sizes(sizes, training)), dtype=dtype),
        input.new_empty(0) if expand_weight is None
        else library.empty_image(input, channels, height, width),
        library.empty_image(input, channels, out_h, out_w),
        library.empty_image(input, features, out_h, out_w),
        input.new_empty((2, *gated), dtype=dtype),
        input.new_empty((0, 0) if reduce_weight is None else (n, reduce_weight.shape[0]),
                        dtype=dtype),
        input.new_empty(sum(low)),
    )  # fmt: skip


def _forward(
    backend: str, input: Tensor,
    expand_weight: Tensor | None, expand_mean: Tensor | None, expand_var: Tensor | None,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None, expand_eps: float,
    expand_activation: int,
    depthwise_weight: Tensor, depthwise_mean: Tensor | None, depthwise_var: Tensor | None,
    depthwise_bn_weight: Tensor | None, depthwise_bn_bias: Tensor | None, depthwise_eps: float,
    depthwise_activation: int, stride: int, padding: Sequence[int],
    reduce_weight: Tensor | None, reduce_bias: Tensor | None,
    excite_weight: Tensor | None, excite_bias: Tensor | None,
    se_activation: int, gate_activation: int,
    project_weight: Tensor, project_mean: Tensor | None, project_var: Tensor | None,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, project_eps: float,
    project_activation: int, residual: bool, sample_scale: Tensor | None, training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    results = _allocate(
        input, expand_weight, depthwise_weight, reduce_weight, project_weight, stride, padding,
        training,
    )  # fmt: skip
    output, vectors, expanded, conv, projected, values, hidden, low_weights = results
    if output.numel() == 0:
        vectors.zero_()
        return results

    def kernel(name: str, *arguments: Any) -> None:
        backends.kernel(backend, name)(*arguments)

    weights = (expand_weight, depthwise_weight, project_weight)
    matrices = _low_matrices(low_weights, weights)
    if low_weights.numel() > 0:
        given, low = _cast_between(weights, matrices)
        torch._foreach_copy_(low, given)
        depthwise_weight = low[-2].view(depthwise_weight.shape)
    expand_matrix, _, project_matrix = matrices
    assert project_matrix is not None
    parts = vectors.split_with_sizes(
        _vector_sizes(rows_of_weights(expand_weight, depthwise_weight, project_weight), training)
    )
    means: Sequence[Any] = (expand_mean, depthwise_mean, project_mean)
    variances: Sequence[Any] = (expand_var, depthwise_var, project_var)
    if training:
        means, variances = parts[:3], parts[3:6]
    scale = shift = None
    if expand_matrix is not None:
        torch.mm(rows_of(input), expand_matrix.t(), out=rows_of(expanded))
        if training:
            kernel("channel_statistics_out", expanded, means[0], variances[0])
        scale, shift = parts[-2:]
        bn = (means[0], variances[0], expand_bn_weight, expand_bn_bias, expand_eps)
        affine_out(backend, bn, scale, shift)
    kernel(
        "depthwise_conv_bn_act_train_out", input if expand_matrix is None else expanded,
        depthwise_weight, depthwise_bn_weight, depthwise_bn_bias, depthwise_eps, stride,
        padding[0], padding[1], depthwise_activation, scale, shift, expand_activation, training,
        conv, means[1], variances[1], None, None,
    )  # fmt: skip
    project_forward(
        backend,
        Expanded(
            conv, (means[1], variances[1], depthwise_bn_weight, depthwise_bn_bias, depthwise_eps),
            depthwise_activation,
        ),
        Excite(
            reduce_weight, reduce_bias, excite_weight, excite_bias, se_activation, gate_activation,
            values, hidden,
        ),
        Project(
            project_matrix,
            (means[2], variances[2], project_bn_weight, project_bn_bias, project_eps),
            project_activation, projected, sample_scale, training,
        ),
        input if residual else None,
        output,
    )  # fmt: skip
    return results


def _allocate_backward(
    input: Tensor, expand_weight: Tensor | None, depthwise_weight: Tensor,
    reduce_weight: Tensor | None, excite_weight: Tensor | None, project_weight: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    norms = sum(rows_of_weights(expand_weight, depthwise_weight, project_weight))
    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        input.new_empty(0) if expand_weight is None else torch.empty_like(expand_weight),
        torch.empty_like(depthwise_weight),
        *empty_gradients(input, reduce_weight, excite_weight, project_weight, norms),
    )


def _backward(
    backend: str, grad_output: Tensor, vectors: Tensor, expanded: Tensor, conv: Tensor,
    projected: Tensor, values: Tensor, hidden: Tensor, low_weights: Tensor, input: Tensor,
    expand_weight: Tensor | None, expand_mean: Tensor | None, expand_var: Tensor | None,
    expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None,
    depthwise_weight: Tensor, depthwise_mean: Tensor | None, depthwise_var: Tensor | None,
    depthwise_bn_weight: Tensor | None, depthwise_bn_bias: Tensor | None,
    reduce_weight: Tensor | None, excite_weight: Tensor | None,
    project_weight: Tensor, project_mean: Tensor | None, project_var: Tensor | None,
    project_bn_weight: Tensor | None, project_bn_bias: Tensor | None, sample_scale: Tensor | None,
    expand_eps: float, expand_activation: int, depthwise_eps: float, depthwise_activation: int,
    stride: int, padding: Sequence[int], se_activation: int, gate_activation: int,
    project_eps: float, project_activation: int, residual: bool, training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    input = input.contiguous(memory_format=torch.channels_last)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grads = _allocate_backward(
        input, expand_weight, depthwise_weight, reduce_weight, excite_weight, project_weight
    )
    if input.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    (
        grad_input, grad_expand, grad_depthwise, grad_reduce, grad_reduce_bias, grad_excite,
        grad_excite_bias, grad_project, grad_bn,
    ) = grads  # fmt: skip

    def kernel(name: str, *arguments: Any) -> None:
        backends.kernel(backend, name)(*arguments)

    sizes = rows_of_weights(expand_weight, depthwise_weight, project_weight)
    parts = vectors.split_with_sizes(_vector_sizes(sizes, training))
    means: Sequence[Any] = (expand_mean, depthwise_mean, project_mean)
    variances: Sequence[Any] = (expand_var, depthwise_var, project_var)
    if training:
        means, variances = parts[:3], parts[3:6]
    grad_vectors = grad_bn.split_with_sizes([*sizes, *sizes])
    grad_weight, grad_bias = grad_vectors[:3], grad_vectors[3:]
    weights = (expand_weight, depthwise_weight, project_weight)
    matrices = _low_matrices(low_weights, weights)
    weight_grads = (None if expand_weight is None else grad_expand, grad_depthwise, grad_project)
    low_grads = torch.empty_like(low_weights)
    grad_matrices = _low_matrices(low_grads, weight_grads)
    grad_taps = grad_depthwise
    if low_weights.numel() > 0:
        assert matrices[1] is not None and grad_matrices[1] is not None
        grad_taps = grad_matrices[1].view(depthwise_weight.shape)
        depthwise_weight = matrices[1].view(depthwise_weight.shape)
    expand_matrix, _, project_matrix = matrices
    grad_project_matrix = grad_matrices[2]
    assert project_matrix is not None and grad_project_matrix is not None
    bn = (means[1], variances[1], depthwise_bn_weight, depthwise_bn_bias, depthwise_eps)
    grad_scaled, grad_pooled = project_backward(
        backend,
        grad_output,
        Expanded(conv, bn, depthwise_activation),
        Excite(
            reduce_weight, None, excite_weight, None, se_activation, gate_activation, values, hidden
        ),
        Project(
            project_matrix,
            (means[2], variances[2], project_bn_weight, project_bn_bias, project_eps),
            project_activation, projected, sample_scale, training,
        ),
        (grad_reduce, grad_reduce_bias, grad_excite, grad_excite_bias),
        (grad_project_matrix, grad_weight[2], grad_bias[2]),
    )  # fmt: skip
    # the depthwise stage, through the activation of expand
    depthwise = (
        grad_scaled, grad_pooled, conv, *bn, depthwise_activation, training,
    )  # fmt: skip
    geometry = (depthwise_weight, stride, padding[0], padding[1])
    depthwise_grads = (grad_taps, grad_weight[1], grad_bias[1])
    if expand_matrix is None:
        kernel(
            "depthwise_conv_bn_act_backward_out", *depthwise, input, *geometry, None, None,
            _IDENTITY, grad_input, *depthwise_grads, None, None,
        )  # fmt: skip
        if residual:
            grad_input.add_(grad_output)
    else:
        bn = (means[0], variances[0], expand_bn_weight, expand_bn_bias, expand_eps)
        grad_scale, grad_shift = grad_weight[0], grad_bias[0]
        grad_expanded = torch.empty_like(expanded)
        kernel(
            "depthwise_conv_bn_act_backward_out", *depthwise, expanded, *geometry, *parts[-2:],
            expand_activation, grad_expanded, *depthwise_grads, grad_scale, grad_shift,
        )  # fmt: skip
        del grad_scaled, depthwise
        # expand and its BN, whose d scale was taken around zero and is wanted around the mean
        grad_scale.addcmul_(means[0], grad_shift, value=-1)
        var = variances[0].to(grad_scale.dtype)
        standardise_out(backend, grad_scale, var, expand_eps, grad_scale)
        if training:
            kernel(
                "batch_norm_act_backward_out", grad_expanded, expanded, *bn, _IDENTITY, None, None,
                grad_scale, grad_shift, True, grad_expanded,
            )  # fmt: skip
        rows = rows_of(grad_expanded)
        if residual:
            torch.addmm(rows_of(grad_output), rows, expand_matrix, out=rows_of(grad_input))
        else:
            torch.mm(rows, expand_matrix, out=rows_of(grad_input))
        torch.mm(rows.t(), rows_of(input), out=grad_matrices[0])
    if low_weights.numel() > 0:
        torch._foreach_copy_(*_cast_between(weight_grads, grad_matrices))
    return grads


_OPS = register(
    OP,
    _ARGUMENTS,
    stages=("expand", "depthwise", "project"),
    saved=("vectors", "expanded", "conv", "projected", "gate_values", "hidden", "low_weights"),
    gradients=(
        "input", "expand_weight", "depthwise_weight", "reduce_weight", "reduce_bias",
        "excite_weight", "excite_bias", "project_weight",
    ),
    forward=_forward,
    allocate=lambda named: _allocate(
        named["input"], named["expand_weight"], named["depthwise_weight"], named["reduce_weight"],
        named["project_weight"], named["stride"], named["padding"], named["training"],
    ),
    backward=_backward,
    allocate_backward=lambda named: _allocate_backward(
        named["input"], named["expand_weight"], named["depthwise_weight"], named["reduce_weight"],
        named["excite_weight"], named["project_weight"],
    ),
)  # fmt: skip
