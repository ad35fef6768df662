"""The prepared networks of modules: packed weights, for as long as the module's own stay the same.

What a module's call costs beyond its network is a look at everything that may have changed: the
parameters and buffers below it, by identity, memory and version, its children, their modes and
hooks. What it cannot see: values written through ``.data`` or a NumPy array that shares memory.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from effnet_kernels import backends
from effnet_kernels.layers.remembered import HOOKS
from effnet_kernels.ops.prepared import PreparedNetwork, PreparedStage

_Stages = Callable[[Any], Sequence[PreparedStage] | None]
_values = dict.values
_training = operator.itemgetter("training")
_hooks = operator.itemgetter(*HOOKS)
_version = operator.attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr
_END = object()


class _State:
    """A module with everything below it that its network hangs on, as it was, and the network.

    The module's own ``forward`` and hooks are not among it: whoever calls the module runs them.
    """

    def __init__(self, module: nn.Module, find: _Stages) -> None:
        scripted = torch.jit.ScriptModule
        modules = [m for m in module.modules() if not isinstance(m, scripted)]
        self._attributes = [m.__dict__ for m in modules]
        self._below = self._attributes[1:]
        self._child_dicts = [m.__dict__["_modules"] for m in modules]
        self._children = list(_values_of(self._child_dicts))
        # Where there is none, in an activation or a sequence, nothing reads one.
        self._tensor_dicts = [
            tensors
            for m in modules
            for tensors in (m.__dict__["_parameters"], m.__dict__["_buffers"])
            if tensors
        ]
        self._held = list(_values_of(self._tensor_dicts))
        self._tensors = [held for held in self._held if isinstance(held, Tensor)]
        self._versions = _versions(self._tensors)
        # Held, so that no other tensor gets their memory, and a pointer says which it is.
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._pointers = list(map(_data_ptr, self._tensors))
        packable = (
            self._versions is not None
            and all(tensor.is_cpu for tensor in self._tensors)
            and not any(isinstance(child, scripted) for child in self._children)
            and not self.is_bypassing_something()
        )
        stages = find(module) if packable else None
        self.network = PreparedNetwork(stages) if stages else None

    def is_bypassing_something(self) -> bool:
        """Whether the network would leave out what a child does when it is called."""
        return (
            any(map(_training, self._attributes))
            or any(chain.from_iterable(map(_hooks, self._below)))
            or any("forward" in attributes for attributes in self._below)
        )

    def stays(self) -> bool:
        """Whether children, parameters and buffers are those that the network was made of."""
        return (
            _same(_values_of(self._child_dicts), self._children)
            and _same(_values_of(self._tensor_dicts), self._held)
            and _versions(self._tensors) == self._versions
            and list(map(_data_ptr, self._tensors)) == self._pointers
        )


class _Prepared:
    """The network of one module, made again when its weights have changed."""

    def __init__(self, module: nn.Module, find: _Stages) -> None:
        self._find = find
        self._state = _State(module, find)

    def network(self, module: nn.Module) -> PreparedNetwork | None:
        """The network that stands in for ``module`` as it is now, or None."""
        state = self._state
        if state.is_bypassing_something():
            return None
        if not state.stays():
            state = _State(module, self._find)
            if state.is_bypassing_something():
                return None  # and nothing was packed, which is no state to stay in
            # In one assignment: what cannot be finished, or another thread sees, is all old or new.
            self._state = state
        return state.network


_PREPARED: weakref.WeakKeyDictionary[nn.Module, _Prepared] = weakref.WeakKeyDictionary()


def _values_of(dicts: list[Any]) -> Iterator[Any]:
    """All values, and an end that is none of them."""
    return chain(chain.from_iterable(map(_values, dicts)), (_END,))


def _same(now: Iterator[Any], before: list[Any]) -> bool:
    """Whether both have the same objects up to the end that both have."""
    return all(map(operator.is_, now, before))


def _versions(tensors: list[Any]) -> list[int] | None:
    """How often each was changed, or None where that is not counted: under inference mode."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return None


def prepare_module(module: nn.Module, find: _Stages) -> bool:
    """Packs the weights of ``module``.

    Args:
        module: in evaluation mode.
        find: the stages that a module's inference consists of, or None.

    Returns:
        Whether it has such.
    """
    entry = _Prepared(module, find)
    _PREPARED[module] = entry
    return entry.network(module) is not None


def forget_module(module: nn.Module) -> None:
    """Lets go of what ``prepare_module`` packed."""
    _PREPARED.pop(module, None)


def is_prepared(module: nn.Module) -> bool:
    """Whether ``module`` would run on packed weights as it stands."""
    entry = _PREPARED.get(module)
    return entry is not None and entry.network(module) is not None


def stages_of(module: nn.Module) -> Sequence[PreparedStage] | None:
    """The packed stages of a module that was prepared, or None."""
    entry = _PREPARED.get(module)
    network = None if entry is None else entry.network(module)
    return None if network is None else network.stages


def prepared_network(module: nn.Module, input: Tensor) -> PreparedNetwork | None:
    """What runs in the place of ``module`` on ``input``, or None: the module was not prepared, is
    in training mode, something hangs on a child of it or on all modules, or the call is traced or
    not for the CPU's kernels.
    """
    if torch.compiler.is_compiling():
        return None
    entry = _PREPARED.get(module)
    if (
        entry is None
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or nn_module._has_any_global_hook()
        or not backends.takes_as_given(input)
    ):
        return None
    network = entry.network(module)
    return network if network is not None and network.takes(input) else None
