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
from effnet_kernels.ops.batch_norm_act import backward_out, per_sample
from effnet_kernels.ops.batch_norm_act import reference as batch_norm_reference
from effnet_kernels.ops.depthwise_conv_bn_act import output_hw
from effnet_kernels.ops.depthwise_conv_bn_act import reference as depthwise_reference
from effnet_kernels.ops.mbconv import (
    ConvBn,
    SqueezeExcite,
    block_arguments,
    check_block,
    kernel_conv_bn,
    kernel_squeeze_excite,
    names_of,
    no_residual,
    to_autocast,
)
from effnet_kernels.ops.prologue import affine
from effnet_kernels.ops.squeeze_excite import reference as squeeze_excite_reference

OP = "mbconv_train"
_PROJECT_FROM_CONV = ("cpu",)
"""Backends where the library's own product, which computes z as it loads d, is the faster one. On a
GPU it has not been measured.
"""
_IDENTITY = 0


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
            if block.output.shape != input.shape:
                raise no_residual(input, tuple(block.output.shape))
            return block._replace(output=block.output + input)
        input = input.to(low)
        expand, depthwise, project = to_autocast(low, expand, depthwise, project)
    stride, pads, shape = check_block(
        input, expand, depthwise, squeeze_excite, project, stride, padding, residual,
        statistics=not training,
    )  # fmt: skip
    n, _, out_h, out_w = shape
    if sample_scale is not None:
        checks.check_shape("sample_scale", sample_scale, (n,), input.device)
    if training and n * min(out_h * out_w, input.shape[2] * input.shape[3]) == 1:
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, one value a channel; training needs more"
        )

    backend = backends.select(OP, input)
    if backend == backends.EAGER:
        return reference(
            input, expand, depthwise, squeeze_excite, project, stride, pads, training=training,
            residual=residual, sample_scale=sample_scale,
        )  # fmt: skip
    output, means, variances = _FORWARD[backend](
        input.contiguous(memory_format=torch.channels_last),
        *kernel_conv_bn(expand, input),
        *kernel_conv_bn(depthwise, input),
        stride,
        pads,
        *kernel_squeeze_excite(squeeze_excite, input),
        *kernel_conv_bn(project, input),
        residual,
        None if sample_scale is None else sample_scale.to(checks.accumulator(input)),
        training,
    )[:3]
    if not training:
        return MbconvTrainOutput(output, None, None, None)
    sizes = _sizes(input, expand, depthwise.weight, project.weight)
    statistics = [
        Statistics(mean, var, elements)
        for mean, var, elements in zip(
            means.split(sizes),
            variances.split(sizes),
            (n * input.shape[2] * input.shape[3], n * out_h * out_w, n * out_h * out_w),
            strict=True,
        )
    ]
    return MbconvTrainOutput(
        output, None if expand is None else statistics[0], statistics[1], statistics[2]
    )


def _sizes(
    input: Tensor, expand: Any, depthwise_weight: Tensor, project_weight: Tensor
) -> list[int]:
    """The channels of the three BNs, 0 for one that is not there."""
    channels = depthwise_weight.shape[0]
    return [0 if expand is None else channels, channels, project_weight.shape[0]]


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
        return result.output, _statistics(result.batch_mean, result.batch_var, y)

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
        output, expanded, _statistics(d.batch_mean, d.batch_var, d.output), projected
    )


def _statistics(mean: Tensor | None, var: Tensor | None, of: Tensor) -> Statistics | None:
    if mean is None or var is None:
        return None
    return Statistics(mean, var, of.numel() // of.shape[1])


# --------------------------------------------------------------------------------------------------
# The registered functional ops (see depthwise_conv_bn_act.py). Vectors of all BNs are one tensor,
# those of expand first, so that what is small is allocated at once.
# --------------------------------------------------------------------------------------------------


_ARGUMENTS = f"{block_arguments('Tensor?')}, bool residual, Tensor? sample_scale, bool training"
_NAMES = names_of(_ARGUMENTS)
_SAVED = (
    "input", "means", "variances", "expanded", "conv", "projected", "gate_values", "hidden",
)  # fmt: skip
"""What backward is given before those arguments that it shares with forward:"""
_BACKWARD_ARGUMENTS = ", ".join(
    argument
    for argument, name in zip(_ARGUMENTS.split(", "), _NAMES, strict=True)
    if not name.endswith(("_mean", "_var")) and name not in ("input", "reduce_bias", "excite_bias")
)
_BACKWARD_NAMES = names_of(_BACKWARD_ARGUMENTS)
_BACKWARD_TENSORS = tuple(
    name for name in _BACKWARD_NAMES if name.endswith(("_weight", "_bias", "_scale"))
)


def _rows(image: Tensor) -> Tensor:
    """A channels-last image as the matrix (pixels, C) that it is."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _allocate(
    input: Tensor, expand_weight: Tensor | None, depthwise_weight: Tensor,
    reduce_weight: Tensor | None, project_weight: Tensor, stride: int, padding: Sequence[int],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, _, height, width = input.shape
    channels, features = depthwise_weight.shape[0], project_weight.shape[0]
    out_h, out_w = output_hw(input, depthwise_weight, stride, padding)
    dtype = checks.accumulator(input)
    vectors = sum(_sizes(input, expand_weight, depthwise_weight, project_weight)) * training
    gated = (0, 0) if reduce_weight is None else (n, channels)
    return (
        library.empty_image(input, features, out_h, out_w),
        input.new_empty(vectors, dtype=dtype),
        input.new_empty(vectors, dtype=dtype),
        input.new_empty(0) if expand_weight is None
        else library.empty_image(input, channels, height, width),
        library.empty_image(input, channels, out_h, out_w),
        library.empty_image(input, features, out_h, out_w),
        input.new_empty((2, *gated), dtype=dtype),
        input.new_empty((0, 0) if reduce_weight is None else (n, reduce_weight.shape[0]),
                        dtype=dtype),
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
    output, means, variances, expanded, conv, projected, (pooled, gate), hidden = results
    if output.numel() == 0:
        means.zero_()
        variances.zero_()
        return results

    def kernel(name: str, *arguments: Any) -> None:
        backends.kernel(backend, name)(*arguments)

    sizes = _sizes(input, expand_weight, depthwise_weight, project_weight)
    normalised_by: list[Any] = [
        (expand_mean, expand_var), (depthwise_mean, depthwise_var), (project_mean, project_var),
    ]  # fmt: skip
    if training:
        normalised_by = list(zip(means.split(sizes), variances.split(sizes), strict=True))
    scale = shift = None
    if expand_weight is not None:
        torch.mm(_rows(input), expand_weight.flatten(1).t(), out=_rows(expanded))
        mean, var = normalised_by[0]
        if training:
            kernel("channel_statistics_out", expanded, mean, var)
        scale, shift, _ = affine(mean, var, expand_bn_weight, expand_bn_bias, expand_eps)
    mean, var = normalised_by[1]
    kernel(
        "depthwise_conv_bn_act_train_out", input if expand_weight is None else expanded,
        depthwise_weight, depthwise_bn_weight, depthwise_bn_bias, depthwise_eps, stride,
        padding[0], padding[1], depthwise_activation, scale, shift, expand_activation, training,
        conv, mean, var, None, None,
    )  # fmt: skip
    depthwise = (
        conv, mean, var, depthwise_bn_weight, depthwise_bn_bias, depthwise_eps,
        depthwise_activation,
    )  # fmt: skip
    if reduce_weight is not None and excite_weight is not None:
        kernel("batch_norm_act_out", *depthwise, None, None, None, pooled)
        kernel(
            "squeeze_excite_gate_out", pooled, conv.shape[2] * conv.shape[3],
            reduce_weight.flatten(1), reduce_bias, excite_weight.flatten(1), excite_bias,
            se_activation, gate_activation, hidden, gate,
        )  # fmt: skip
    by_channel = None if reduce_weight is None else gate
    if backend in _PROJECT_FROM_CONV:
        scale, shift, _ = affine(*depthwise[1:-1])
        mean, var = scale.new_zeros(projected.shape[1]), scale.new_ones(projected.shape[1])
        kernel(
            "pointwise_conv_bn_act_out", conv, project_weight, mean, var, None, None, 0.0,
            _IDENTITY, scale, shift, depthwise_activation, by_channel, None, False, projected, None,
        )  # fmt: skip
    else:
        scaled = torch.empty_like(conv)
        kernel("batch_norm_act_out", *depthwise, by_channel, None, scaled, None)
        torch.mm(_rows(scaled), project_weight.flatten(1).t(), out=_rows(projected))
    mean, var = normalised_by[2]
    if training:
        kernel("channel_statistics_out", projected, mean, var)
    kernel(
        "batch_norm_act_out", projected, mean, var, project_bn_weight, project_bn_bias,
        project_eps, project_activation, per_sample(sample_scale, projected.shape[1]),
        input if residual else None, output, None,
    )  # fmt: skip
    return results


def _forward_fake(
    input: Tensor, expand_weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    named = dict(zip(_NAMES[2:], rest, strict=True))
    return _allocate(
        input, expand_weight, named["depthwise_weight"], named["reduce_weight"],
        named["project_weight"], named["stride"], named["padding"], named["training"],
    )  # fmt: skip


def _allocate_backward(
    input: Tensor, expand_weight: Tensor | None, depthwise_weight: Tensor,
    reduce_weight: Tensor | None, excite_weight: Tensor | None, project_weight: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    vectors = sum(_sizes(input, expand_weight, depthwise_weight, project_weight))
    dtype = checks.accumulator(input)

    def like(weight: Tensor | None) -> Tensor:
        return input.new_empty(0) if weight is None else torch.empty_like(weight)

    def bias(weight: Tensor | None) -> Tensor:
        return input.new_empty(0) if weight is None else weight.new_empty(weight.shape[0])

    return (
        torch.empty_like(input, memory_format=torch.channels_last),
        like(expand_weight),
        like(depthwise_weight),
        like(reduce_weight),
        bias(reduce_weight),
        like(excite_weight),
        bias(excite_weight),
        like(project_weight),
        input.new_empty(vectors, dtype=dtype),
        input.new_empty(vectors, dtype=dtype),
    )


def _backward(
    backend: str, grad_output: Tensor, input: Tensor, means: Tensor, variances: Tensor,
    expanded: Tensor, conv: Tensor, projected: Tensor, values: Tensor, hidden: Tensor,
    expand_weight: Tensor | None, expand_bn_weight: Tensor | None, expand_bn_bias: Tensor | None,
    expand_eps: float, expand_activation: int,
    depthwise_weight: Tensor, depthwise_bn_weight: Tensor | None,
    depthwise_bn_bias: Tensor | None, depthwise_eps: float, depthwise_activation: int,
    stride: int, padding: Sequence[int],
    reduce_weight: Tensor | None, excite_weight: Tensor | None,
    se_activation: int, gate_activation: int,
    project_weight: Tensor, project_bn_weight: Tensor | None, project_bn_bias: Tensor | None,
    project_eps: float, project_activation: int,
    residual: bool, sample_scale: Tensor | None, training: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """means and variances are those that were normalised by, of all BNs."""
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
        grad_excite_bias, grad_project, grad_bn_weights, grad_bn_biases,
    ) = grads  # fmt: skip

    def kernel(name: str, *arguments: Any) -> None:
        backends.kernel(backend, name)(*arguments)

    sizes = _sizes(input, expand_weight, depthwise_weight, project_weight)
    mean, var, grad_weight, grad_bias = (
        t.split(sizes) for t in (means, variances, grad_bn_weights, grad_bn_biases)
    )
    # project and its BN
    grad_projected, grad_scaled, scaled = (torch.empty_like(t) for t in (projected, conv, conv))
    backward_out(
        backend, grad_output, projected,
        (mean[2], var[2], project_bn_weight, project_bn_bias, project_eps), project_activation,
        per_sample(sample_scale, projected.shape[1]), training, grad_projected, grad_weight[2],
        grad_bias[2],
    )  # fmt: skip
    torch.mm(_rows(grad_projected), project_weight.flatten(1), out=_rows(grad_scaled))
    # the gate, and z once more for project's weight
    bn = (mean[1], var[1], depthwise_bn_weight, depthwise_bn_bias, depthwise_eps)
    grad_pooled = None
    if reduce_weight is None or excite_weight is None:
        kernel("batch_norm_act_out", conv, *bn, depthwise_activation, None, None, scaled, None)
    else:
        pooled, gate = values
        grad_gate, grad_pooled = torch.empty_like(values)
        kernel(
            "batch_norm_act_gate_out", grad_scaled, conv, *bn, depthwise_activation, gate,
            grad_gate, scaled, grad_scaled,
        )  # fmt: skip
        kernel(
            "squeeze_excite_gate_backward_out", grad_gate, pooled, conv.shape[2] * conv.shape[3],
            hidden, gate, reduce_weight.flatten(1), excite_weight.flatten(1), se_activation,
            gate_activation, grad_pooled, grad_reduce.flatten(1), grad_reduce_bias,
            grad_excite.flatten(1), grad_excite_bias,
        )  # fmt: skip
    torch.mm(_rows(grad_projected).t(), _rows(scaled), out=grad_project.flatten(1))
    del scaled, grad_projected
    # the depthwise stage, through the activation of expand
    depthwise = (
        grad_scaled, grad_pooled, conv, *bn, depthwise_activation, training,
    )  # fmt: skip
    geometry = (depthwise_weight, stride, padding[0], padding[1])
    depthwise_grads = (grad_depthwise, grad_weight[1], grad_bias[1])
    if expand_weight is None:
        kernel(
            "depthwise_conv_bn_act_backward_out", *depthwise, input, *geometry, None, None,
            _IDENTITY, grad_input, *depthwise_grads, None, None,
        )  # fmt: skip
        if residual:
            grad_input.add_(grad_output)
        return grads
    bn = (mean[0], var[0], expand_bn_weight, expand_bn_bias, expand_eps)
    scale, shift, invstd = affine(*bn)
    grad_scale, grad_shift = torch.empty_like(scale), grad_bias[0]
    grad_expanded = torch.empty_like(expanded)
    kernel(
        "depthwise_conv_bn_act_backward_out", *depthwise, expanded, *geometry, scale, shift,
        expand_activation, grad_expanded, *depthwise_grads, grad_scale, grad_shift,
    )  # fmt: skip
    del grad_scaled, depthwise
    # expand and its BN, whose d scale was taken around zero and is wanted around the mean
    torch.addcmul(grad_scale, mean[0], grad_shift, value=-1, out=grad_weight[0]).mul_(invstd)
    if training:
        kernel(
            "batch_norm_act_backward_out", grad_expanded, expanded, *bn, _IDENTITY, None, None,
            grad_weight[0], grad_shift, True, grad_expanded,
        )  # fmt: skip
    rows, matrix = _rows(grad_expanded), expand_weight.flatten(1)
    if residual:
        torch.addmm(_rows(grad_output), rows, matrix, out=_rows(grad_input))
    else:
        torch.mm(rows, matrix, out=_rows(grad_input))
    torch.mm(rows.t(), _rows(input), out=grad_expand.flatten(1))
    return grads


def _backward_fake(grad_output: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    named = dict(zip(_BACKWARD_NAMES, rest[len(_SAVED) - 1 :], strict=True))
    return _allocate_backward(
        input, named["expand_weight"], named["depthwise_weight"], named["reduce_weight"],
        named["excite_weight"], named["project_weight"],
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    named = dict(zip(_NAMES, inputs, strict=True))
    _, means, variances, expanded, conv, projected, values, hidden = output
    ctx.mark_non_differentiable(means, variances, expanded, conv, projected, values, hidden)
    ctx.set_materialize_grads(False)
    if not named["training"]:
        running = [f"{stage}_{{}}" for stage in ("expand", "depthwise", "project")]
        means, variances = (
            torch.cat([
                named[name.format(kind)].to(values.dtype)
                for name in running
                if named[name.format(kind)] is not None
            ])
            for kind in ("mean", "var")
        )  # fmt: skip
    ctx.settings = {name: named[name] for name in _BACKWARD_NAMES if name not in _BACKWARD_TENSORS}
    ctx.save_for_backward(
        named["input"], means, variances, expanded, conv, projected, values, hidden,
        *(named[name] for name in _BACKWARD_TENSORS),
    )  # fmt: skip


def _autograd_backward(
    backend: str, ctx: Any, grad_output: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    if grad_output is None:
        return (None,) * len(needs)
    saved = ctx.saved_tensors
    tensors = dict(zip(_BACKWARD_TENSORS, saved[len(_SAVED) :], strict=True))
    named = tensors | ctx.settings
    (
        grad_input, grad_expand, grad_depthwise, grad_reduce, grad_reduce_bias, grad_excite,
        grad_excite_bias, grad_project, grad_bn_weights, grad_bn_biases,
    ) = _BACKWARD[backend](
        grad_output, *saved[: len(_SAVED)], *(named[name] for name in _BACKWARD_NAMES)
    )  # fmt: skip
    sizes = _sizes(
        grad_input, tensors["expand_weight"], tensors["depthwise_weight"],
        tensors["project_weight"],
    )  # fmt: skip
    grads = {
        "input": grad_input,
        "expand_weight": grad_expand,
        "depthwise_weight": grad_depthwise,
        "reduce_weight": grad_reduce,
        "reduce_bias": grad_reduce_bias,
        "excite_weight": grad_excite,
        "excite_bias": grad_excite_bias,
        "project_weight": grad_project,
    }
    for stage, weight, bias in zip(
        ("expand", "depthwise", "project"),
        grad_bn_weights.split(sizes),
        grad_bn_biases.split(sizes),
        strict=True,
    ):
        for name, grad in ((f"{stage}_bn_weight", weight), (f"{stage}_bn_bias", bias)):
            if tensors[name] is not None:
                grads[name] = grad.to(tensors[name].dtype)
    return tuple(
        grads.get(name) if need else None for name, need in zip(_NAMES, needs, strict=True)
    )


_FORWARD: dict[str, Any] = library.register(
    OP,
    f"({_ARGUMENTS}) -> (Tensor output, Tensor means, Tensor variances, Tensor expanded, "
    "Tensor conv, Tensor projected, Tensor gate_values, Tensor hidden)",
    implementation=_forward,
    fake=_forward_fake,
    on_cpu=True,
)
library.differentiable(OP, backward=_autograd_backward, setup_context=_setup_context)
_BACKWARD: dict[str, Any] = library.register(
    f"{OP}_backward",
    "(Tensor grad_output, "
    + "".join(f"Tensor {name}, " for name in _SAVED)
    + _BACKWARD_ARGUMENTS
    + ") -> (Tensor grad_input, Tensor grad_expand_weight, Tensor grad_depthwise_weight, "
    "Tensor grad_reduce_weight, Tensor grad_reduce_bias, Tensor grad_excite_weight, "
    "Tensor grad_excite_bias, Tensor grad_project_weight, Tensor grad_bn_weights, "
    "Tensor grad_bn_biases)",
    implementation=_backward,
    fake=_backward_fake,
    on_cpu=True,
)
library.not_differentiable(f"{OP}_backward", f"{OP} has no second derivative (double backward)")
