"""The dispatcher namespaces of the functional ops, one for each way that kernels are written.

An op exists twice, with one schema, one fake and one derivative:

*   ``torch.ops.effnet_kernels.<op>``: the compiled kernels. For CUDA tensors it is allocation in
    Python around kernels of ``csrc/cuda``; for CPU tensors ``csrc/cpu`` implements it whole, or it
    is in Python around kernels of ``csrc/cpu``.
*   ``torch.ops.effnet_kernels_triton.<op>``: Triton's, for CUDA tensors, and for CPU tensors in
    Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import backends

_COMPILED = torch.library.Library("effnet_kernels", "DEF")
_TRITON = torch.library.Library("effnet_kernels_triton", "DEF")


def empty_image(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A channels-last image as ``like``, but for its channels and size; not initialised."""
    return torch.empty(
        (like.shape[0], channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def call(op: Callable[..., Any], *arguments: Any) -> Any:
    """``op``, as ``register`` gives it, on ``arguments``.

    Where no gradient is wanted the dispatcher starts below autograd, whose step is in Python and
    would take as long again as the rest.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def register(
    name: str,
    schema: str,
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    on_cpu: bool = False,
) -> dict[str, Any]:
    """Registers the functional op ``name`` in both namespaces.

    Args:
        name: the op's name.
        schema: arguments and results, as in ``(Tensor x) -> Tensor``.
        implementation: takes the name of a backend and the op's arguments, allocates the results
            and calls the backend's kernel.
        on_cpu: ``implementation`` is for CPU tensors too; else ``csrc/cpu`` has one of its own.
        fake: takes the op's arguments and allocates only.

    Returns:
        The op by the name of the backend that it runs on.
    """
    for library in (_COMPILED, _TRITON):
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    _COMPILED.impl(name, partial(implementation, backends.CUDA.name), "CUDA")
    if on_cpu:
        _COMPILED.impl(name, partial(implementation, backends.CPU.name), "CPU")
    for key in ("CPU", "CUDA"):
        _TRITON.impl(name, partial(implementation, backends.TRITON.name), key)
    compiled = getattr(torch.ops.effnet_kernels, name).default
    return {
        backends.CPU.name: compiled,
        backends.CUDA.name: compiled,
        backends.TRITON.name: getattr(torch.ops.effnet_kernels_triton, name).default,
    }


def differentiable(
    name: str, *, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Gives op ``name``, whose schema has no defaults, its derivative.

    ``torch.library.register_autograd`` would do, but takes a tenth of a millisecond of each call to
    look for default values.

    Args:
        name: the op's name.
        backward: takes the name of a backend whose namespace is the forward op's, then the context
            and the gradients.
        setup_context: takes the context, the inputs and the outputs, and saves what ``backward``
            needs.
    """
    for library, backend in ((_COMPILED, backends.CUDA), (_TRITON, backends.TRITON)):
        _differentiate(library, name, partial(backward, backend.name), setup_context)


def not_differentiable(name: str, message: str) -> None:
    """Makes a gradient through op ``name`` an error with ``message``, not a wrong answer."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(message)

    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        pass

    for library in (_COMPILED, _TRITON):
        _differentiate(library, name, backward, setup_context)


def _differentiate(
    library: torch.library.Library,
    name: str,
    derivative: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> None:
    op = getattr(getattr(torch.ops, library.ns), name).default

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return derivative(ctx, *grads)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in inputs
        ):
            return Derivative.apply(*inputs)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    Derivative.__name__ = name
    library.impl(name, autograd, "Autograd")
