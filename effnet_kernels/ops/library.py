"""The dispatcher namespace of the functional ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "effnet_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(
    name: str, schema: str, *, implementation: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Registers the functional op ``effnet_kernels::name``.

    Args:
        name: the op's name.
        schema: arguments and results, as in ``(Tensor x) -> Tensor``.
        implementation: allocates the results and calls the backend's kernel; CPU and CUDA.
        fake: the same without the kernel.
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def differentiable(
    name: str, *, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Gives op ``name`` its derivative (see ``torch.library.register_autograd``)."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
    )


def not_differentiable(name: str, message: str) -> None:
    """Makes a gradient through op ``name`` an error with ``message``, not a wrong answer."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(message)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, lib=_library)
