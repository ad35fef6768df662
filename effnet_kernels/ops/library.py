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
    return torch.empty_strided(
        (like.shape[0], channels, height, width),
        (height * width * channels, 1, width * channels, channels),
        dtype=like.dtype,
        device=like.device,
    )


class Op:
    """A functional op on one backend.

    Calling it is calling ``overload``, but for the time that the dispatcher takes to bring thirty
    arguments to Python and back, once for autograd and once for the device: more than all launches
    of a block. Where nothing but the op has to know of the call, they go there directly.

    Attributes:
        overload: the op of the dispatcher.
    """

    def __init__(self, overload: Any, backend: str, direct: Callable[..., Any]) -> None:
        self.overload = overload
        self._direct = direct
        self._devices = backends.KERNEL_BACKENDS[backend].devices
        self._apply: Any = None

    def differentiate(
        self, backward: Callable[..., Any], setup_context: Callable[..., Any]
    ) -> None:
        """Gives it its derivative, as ``differentiable`` has it, for a known backend."""
        derivative = _derivative(self.overload._opname, self._direct, backward, setup_context)
        # Not Function.apply itself, which looks at each argument for functorch's sake.
        self._apply = super(torch.autograd.Function, derivative).apply  # type: ignore[misc]

    def __call__(self, *arguments: Any) -> Any:
        """The op's results."""
        if (
            torch.compiler.is_compiling()
            or arguments[0].device.type not in self._devices
            or not _PLAIN.issuperset(map(type, arguments))
            or _is_watched()
        ):
            return self.overload(*arguments)
        if torch.is_grad_enabled() and _require_grad(arguments):
            return self._apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._direct(*arguments)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, tuple, list))
"""Classes of arguments that the dispatcher has no other way for."""


def _is_watched() -> bool:
    """Whether something sees, or takes, what goes through the dispatcher."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def _require_grad(arguments: tuple[Any, ...]) -> bool:
    for x in arguments:  # noqa: SIM110 - on every call; any() over a generator costs more
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


OPS: dict[str, dict[str, Any]] = {}
"""All of them by name, then by backend."""


def register(
    name: str,
    schema: str,
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    on_cpu: bool = False,
) -> dict[str, Op]:
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
    run = {backend: partial(implementation, backend) for backend in backends.KERNEL_BACKENDS}
    _COMPILED.impl(name, run[backends.CUDA.name], "CUDA")
    if on_cpu:
        _COMPILED.impl(name, run[backends.CPU.name], "CPU")
    for key in ("CPU", "CUDA"):
        _TRITON.impl(name, run[backends.TRITON.name], key)
    compiled = getattr(torch.ops.effnet_kernels, name).default
    if not on_cpu:
        run[backends.CPU.name] = compiled
    overloads = {
        backends.CPU.name: compiled,
        backends.CUDA.name: compiled,
        backends.TRITON.name: getattr(torch.ops.effnet_kernels_triton, name).default,
    }
    ops = {name: Op(overload, name, run[name]) for name, overload in overloads.items()}
    OPS[name] = ops
    return ops


def differentiable(
    name: str, *, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Gives op ``name``, whose schema has no defaults, its derivative.

    ``torch.library.register_autograd`` would do, but takes a tenth of a millisecond of each call to
    look for default values.

    Args:
        name: the op's name.
        backward: takes the name of a backend, then the context and the gradients.
        setup_context: takes the context, the inputs and the outputs, and saves what ``backward``
            needs.
    """
    for library, backend in ((_COMPILED, backends.CUDA), (_TRITON, backends.TRITON)):
        _register_autograd(library, name, partial(backward, backend.name), setup_context)
    for backend_name, op in OPS[name].items():
        op.differentiate(partial(backward, backend_name), setup_context)


def not_differentiable(name: str, message: str) -> None:
    """Makes a gradient through op ``name`` an error with ``message``, not a wrong answer."""

    def backward(backend: str, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(message)

    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        pass

    differentiable(name, backward=backward, setup_context=setup_context)


def _derivative(
    name: str,
    run: Callable[..., Any],
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """``run``, which is below autograd, with its derivative."""

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                outputs = run(*inputs)
            setup_context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    Derivative.__name__ = name
    return Derivative


def _register_autograd(
    library: torch.library.Library,
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[..., Any],
) -> None:
    op = getattr(getattr(torch.ops, library.ns), name).default
    derivative = _derivative(name, op, backward, setup_context)

    def autograd(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and _require_grad(inputs):
            return derivative.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    library.impl(name, autograd, "Autograd")
