r"""What MBConv and Fused-MBConv share in training: the second half of the block, and how the ops
are registered with their derivatives.

    z = act(bn(e)) * gate                         gate: squeeze-and-excitation of act(bn(e))
    p = project_weight @ z
    output = bn(p) * sample_scale + residual

e and p, the convolutions' outputs, are all that is kept of it. The product is PyTorch's (cuBLAS,
MKL) or, where that measured faster, the library's own; the rest is fused kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.ops import checks, library
from effnet_kernels.ops.batch_norm_act import BatchNorm, affine_out, backward_out, per_sample
from effnet_kernels.ops.block import Statistics, names_of

_PROJECT_FROM_CONV = ("cpu",)
"""Backends where the library's own product, which computes z as it loads e, is the faster one. On a
GPU it has not been measured.
"""
_IDENTITY = 0


class Expanded(NamedTuple):
    """What is projected, before its BN.

    Attributes:
        conv: e, (N, C, H, W), channels-last, what a convolution computed.
        bn: its BN.
        activation: the code of the activation after that.
    """

    conv: Tensor
    bn: BatchNorm
    activation: int


class Excite(NamedTuple):
    """Squeeze-and-excitation, where ``reduce_weight`` is given.

    Attributes:
        reduce_weight: (S, C, ...).
        reduce_bias: (S,) or None; unused in backward, like the other bias.
        excite_weight: (C, S, ...).
        excite_bias: (C,) or None.
        activation: a code, like the one that follows.
        gate: of the gate.
        values: (2, N, C): the sums over pixels and the gate. Written in forward.
        hidden: (N, S). Written in forward.
    """

    reduce_weight: Tensor | None
    reduce_bias: Tensor | None
    excite_weight: Tensor | None
    excite_bias: Tensor | None
    activation: int
    gate: int
    values: Tensor
    hidden: Tensor


class Project(NamedTuple):
    """The projection and what is done to it.

    Attributes:
        matrix: (K, C).
        bn: BN's mean and variance are written in forward, if ``training``.
        activation: the code of the activation after it.
        conv: p, (N, K, H, W), channels-last. Written in forward.
        sample_scale: (N,), what each image is multiplied by, or None.
        training: BN is by the statistics of the batch.
    """

    matrix: Tensor
    bn: BatchNorm
    activation: int
    conv: Tensor
    sample_scale: Tensor | None
    training: bool


def rows_of(image: Tensor) -> Tensor:
    """A dense channels-last image as the matrix (pixels, C) that it is."""
    n, channels, height, width = image.shape
    return image.as_strided((n * height * width, channels), (channels, 1))


def statistics_of(mean: Tensor | None, var: Tensor | None, of: Tensor) -> Statistics | None:
    """The statistics of the channels of image ``of``, where there are any."""
    if mean is None or var is None:
        return None
    return Statistics(mean, var, of.numel() // of.shape[1])


def project_forward(
    backend: str,
    expanded: Expanded,
    excite: Excite,
    project: Project,
    residual: Tensor | None,
    output: Tensor,
) -> None:
    """Fills ``output``, and what ``excite`` and ``project`` keep for backward.

    Args:
        backend: a kernel backend's name.
        expanded: what is projected.
        excite: squeeze-and-excitation.
        project: the projection.
        residual: an image like ``output``, or None.
        output: (N, K, H, W), channels-last.
    """
    conv, bn, activation = expanded
    projected = project.conv
    gate = None
    if excite.reduce_weight is not None:
        pooled, gate = excite.values.unbind()
        backends.kernel(backend, "batch_norm_act_out")(
            conv, *bn, activation, None, None, None, pooled
        )
        backends.kernel(backend, "squeeze_excite_gate_out")(
            pooled, conv.shape[2] * conv.shape[3], *excite[:6], excite.hidden, gate
        )
    if backend in _PROJECT_FROM_CONV:
        dtype = checks.accumulator(conv)
        scale, shift = conv.new_empty((2, conv.shape[1]), dtype=dtype).unbind()
        affine_out(backend, bn, scale, shift)
        mean, var = scale.new_zeros(projected.shape[1]), scale.new_ones(projected.shape[1])
        backends.kernel(backend, "pointwise_conv_bn_act_out")(
            conv, project.matrix, mean, var, None, None, 0.0, _IDENTITY, scale, shift, activation,
            gate, None, False, projected, None,
        )  # fmt: skip
    else:
        scaled = torch.empty_like(conv)
        backends.kernel(backend, "batch_norm_act_out")(
            conv, *bn, activation, gate, None, scaled, None
        )
        torch.mm(rows_of(scaled), project.matrix.t(), out=rows_of(projected))
    if project.training:
        backends.kernel(backend, "channel_statistics_out")(projected, *project.bn[:2])
    backends.kernel(backend, "batch_norm_act_out")(
        projected, *project.bn, project.activation,
        per_sample(project.sample_scale, projected.shape[1]), residual, output, None,
    )  # fmt: skip


def project_backward(
    backend: str,
    grad_output: Tensor,
    expanded: Expanded,
    excite: Excite,
    project: Project,
    grad_excite: Sequence[Tensor],
    grad_project: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """The gradient of ``act(bn(e))``.

    Args:
        backend: a kernel backend's name.
        grad_output: (N, K, H, W), channels-last.
        expanded: as in forward.
        excite: as forward left it.
        project: likewise.
        grad_excite: of the weights and biases of ``excite``, in its order; written with it.
        grad_project: of the matrix, and of the weight and bias of its BN; written.

    Returns:
        The image, and (N, C) to be added to each of its pixels, or None.
    """
    conv, bn, activation = expanded
    projected = project.conv
    grad_matrix, grad_weight, grad_bias = grad_project
    grad_projected, grad_scaled, scaled = (torch.empty_like(t) for t in (projected, conv, conv))
    backward_out(
        backend, grad_output, projected, project.bn, project.activation,
        per_sample(project.sample_scale, projected.shape[1]), project.training, grad_projected,
        grad_weight, grad_bias,
    )  # fmt: skip
    grad_rows = rows_of(grad_projected)
    torch.mm(grad_rows, project.matrix, out=rows_of(grad_scaled))
    # The gate, and z once more for the weight.
    grad_pooled = None
    if excite.reduce_weight is None or excite.excite_weight is None:
        backends.kernel(backend, "batch_norm_act_out")(
            conv, *bn, activation, None, None, scaled, None
        )
    else:
        pooled, gate = excite.values.unbind()
        grad_gate, grad_pooled = torch.empty_like(excite.values).unbind()
        backends.kernel(backend, "batch_norm_act_gate_out")(
            grad_scaled, conv, *bn, activation, gate, grad_gate, scaled, grad_scaled
        )
        grad_reduce, grad_reduce_bias, grad_expand, grad_expand_bias = grad_excite
        backends.kernel(backend, "squeeze_excite_gate_backward_out")(
            grad_gate, pooled, conv.shape[2] * conv.shape[3], excite.hidden, gate,
            excite.reduce_weight, excite.excite_weight, excite.activation, excite.gate, grad_pooled,
            grad_reduce.flatten(1), grad_reduce_bias, grad_expand.flatten(1), grad_expand_bias,
        )  # fmt: skip
    torch.mm(grad_rows.t(), rows_of(scaled), out=grad_matrix)
    return grad_scaled, grad_pooled


def rows_of_weights(*weights: Tensor | None) -> list[int]:
    """How many channels each has, 0 for one that is not there."""
    return [0 if weight is None else weight.shape[0] for weight in weights]


def empty_gradients(
    like: Tensor,
    reduce_weight: Tensor | None,
    excite_weight: Tensor | None,
    project_weight: Tensor,
    norms: int,
) -> tuple[Tensor, ...]:
    """Those that every block has: of squeeze-and-excitation's weights and biases in turn, of
    project's weight, and of all BNs' parameters; without elements for what is not there.

    Args:
        like: an image of the block.
        reduce_weight: (S, C, ...) or None.
        excite_weight: (C, S, ...) or None.
        project_weight: (K, C, ...).
        norms: channels of all BNs.
    """

    def pair(weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None:
            return like.new_empty(0), like.new_empty(0)
        return torch.empty_like(weight), weight.new_empty(weight.shape[0])

    return (
        *pair(reduce_weight),
        *pair(excite_weight),
        torch.empty_like(project_weight),
        like.new_empty(2 * norms, dtype=checks.accumulator(like)),
    )


class Operators(NamedTuple):
    """A block's two functional ops.

    Attributes:
        forward: by backend: the op's arguments to the output and what backward needs.
        backward: by backend: the gradient of the output, what forward saved, the tensors of its
            arguments and the rest of those, to the gradients.
    """

    forward: dict[str, library.Op]
    backward: dict[str, library.Op]


def register(
    name: str,
    arguments: str,
    *,
    stages: Sequence[str],
    saved: Sequence[str],
    gradients: Sequence[str],
    forward: Callable[..., tuple[Tensor, ...]],
    allocate: Callable[[dict[str, Any]], tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    allocate_backward: Callable[[dict[str, Any]], tuple[Tensor, ...]],
) -> Operators:
    """Registers op ``name`` and ``name``_backward, its derivative.

    Args:
        name: the op's.
        arguments: in a schema.
        stages: the stages with a BN, in the order of their parameters' gradients.
        saved: the names of forward's results after the output.
        gradients: the arguments that backward computes a tensor each of, before one with the
            gradients of all BNs' weights, then biases.
        forward: takes a backend's name and ``arguments``.
        allocate: takes the arguments by name and allocates the results.
        backward: takes a backend's name, the output's gradient, what is ``saved``, those of
            ``arguments`` that are tensors, without the biases of squeeze-and-excitation, and those
            that are not.
        allocate_backward: takes its arguments by name and allocates the gradients.
    """
    argument_of = dict(zip(names_of(arguments), arguments.split(", "), strict=True))
    names = list(argument_of)
    tensors = [
        name
        for name, argument in argument_of.items()
        if argument.startswith("Tensor") and name not in ("reduce_bias", "excite_bias")
    ]
    settings = [n for n, argument in argument_of.items() if not argument.startswith("Tensor")]
    norms = [f"{stage}_bn_{kind}" for kind in ("weight", "bias") for stage in stages]
    tensor_slots, setting_slots, gradient_slots, norm_slots = (
        [names.index(name) for name in group] for group in (tensors, settings, gradients, norms)
    )
    weight_slots = [names.index(f"{stage}_weight") for stage in stages]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.settings = [inputs[slot] for slot in setting_slots]
        ctx.save_for_backward(*output[1:], *(inputs[slot] for slot in tensor_slots))

    def differentiate(
        backend: str, ctx: Any, grad_output: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needs)
        if grad_output is None:
            return tuple(result)
        kept = ctx.saved_tensors
        *grads, grad_bn = backward_ops[backend](grad_output, *kept, *ctx.settings)
        for slot, grad in zip(gradient_slots, grads, strict=True):
            if needs[slot]:
                result[slot] = grad
        given = dict(zip(tensor_slots, kept[len(saved) :], strict=True))
        sizes = rows_of_weights(*(given[slot] for slot in weight_slots))
        for slot, grad in zip(norm_slots, grad_bn.split_with_sizes([*sizes, *sizes]), strict=True):
            if needs[slot]:
                dtype = given[slot].dtype
                result[slot] = grad if grad.dtype == dtype else grad.to(dtype)
        return tuple(result)

    forward_ops = library.register(
        name,
        f"({arguments}) -> (Tensor output, {', '.join(f'Tensor {result}' for result in saved)})",
        implementation=forward,
        fake=lambda *values: allocate(dict(zip(names, values, strict=True))),
        on_cpu=True,
    )
    library.differentiable(name, backward=differentiate, setup_context=setup_context)
    backward_arguments = [
        "Tensor grad_output",
        *(f"Tensor {result}" for result in saved),
        *(argument_of[argument] for argument in (*tensors, *settings)),
    ]
    backward_names = names_of(", ".join(backward_arguments))
    results = ", ".join(f"Tensor grad_{argument}" for argument in (*gradients, "bn"))
    backward_ops = library.register(
        f"{name}_backward",
        f"({', '.join(backward_arguments)}) -> ({results})",
        implementation=backward,
        fake=lambda *values: allocate_backward(dict(zip(backward_names, values, strict=True))),
        on_cpu=True,
    )
    library.not_differentiable(
        f"{name}_backward", f"{name} has no second derivative (double backward)"
    )
    return Operators(forward_ops, backward_ops)
