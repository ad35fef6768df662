"""What was found out about a module, for as long as the module stays what it was.

A fused block asks at each call whether its children still are what its op stands in for: they can
be replaced, have hooks added or be set up anew. To ask all of that takes longer than to launch the
op's kernels; to see that nothing changed since it was asked does not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

_M = TypeVar("_M", bound=nn.Module)
_T = TypeVar("_T")

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_values = dict.values


class _State:
    """Everything of a module and those below it but its own hooks and the values of parameters and
    buffers. It does not keep the module alive.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        below = modules[1:]
        self._class = type(module)
        self._below = below
        self._classes = list(map(type, below))
        # Values are compared by identity before anything else, and all but the modes stay.
        self._attributes = [(m.__dict__, dict(m.__dict__)) for m in modules]
        self._child_dicts: list[Any] = [m.__dict__["_modules"] for m in modules]
        self._tensor_dicts: list[Any] = [
            m.__dict__[kind] for m in modules for kind in ("_parameters", "_buffers")
        ]
        self._hooks = [m.__dict__[name] for m in below for name in HOOKS]
        self._children = self._present_children()
        self._tensors = self._present_tensors()

    def _present_children(self) -> list[Any]:
        return list(chain.from_iterable(map(_values, self._child_dicts)))

    def _present_tensors(self) -> list[type]:
        return list(map(type, chain.from_iterable(map(_values, self._tensor_dicts))))

    def stays(self, module: nn.Module) -> bool:
        """Whether ``module`` is as it was. With hooks below it, it is not."""
        if (
            any(self._hooks)
            or type(module) is not self._class
            or list(map(type, self._below)) != self._classes
        ):
            return False
        try:
            for now, before in self._attributes:
                if now != before:
                    return False
        except (RuntimeError, ValueError):  # tensors and arrays, neither equal nor not
            return False
        return (
            self._present_children() == self._children and self._present_tensors() == self._tensors
        )


_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[Callable[..., Any], _State, Any]] = (
    weakref.WeakKeyDictionary()
)


def remembered(module: _M, find: Callable[[_M], _T]) -> _T:
    """``find(module)``, found again when something has changed.

    Args:
        module: whose children and attributes ``find`` reads, and those of the modules below and
            their hooks, and of parameters and buffers whether they are there and of what class.
        find: its result has no reference to ``module``.
    """
    if torch.compiler.is_compiling():
        return find(module)
    found = _FOUND.get(module)
    if found is not None and found[0] is find and found[1].stays(module):
        result: _T = found[2]
        return result
    result = find(module)
    state = _State(module)
    if state.stays(module):
        _FOUND[module] = find, state, result
    else:  # a hook can go without a trace
        _FOUND.pop(module, None)
    return result
