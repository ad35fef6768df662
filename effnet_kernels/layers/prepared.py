"""The prepared networks of modules: packed weights, for as long as the module's own stay the same.

What a module's call costs beyond its network is a look at everything that may have changed: the
parameters and buffers below it, by identity, memory and version, its children, their modes and
hooks. What it cannot see: values written through ``.data`` or a NumPy array that shares memory.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from effnet_kernels.layers.remembered import HOOKS
from effnet_kernels.ops.prepared import PreparedNetwork, PreparedStage

_Stages = Callable[[Any], Sequence[PreparedStage] | None]
_values = dict.values
_training = operator.itemgetter("training")
_version = operator.attrgetter("_version")
_data_ptr = torch.Tensor.data_ptr


class _Tensors:
    """The parameters and buffers of a module and those below, as they are now."""

    def __init__(self, dicts: list[Any]) -> None:
        self._tensors = _present(dicts)
        self._versions = list(map(_version, self._tensors))
        self._pointers = list(map(_data_ptr, self._tensors))

    def stay(self, dicts: list[Any]) -> bool:
        now = _present(dicts)
        return (
            _same(now, self._tensors)
            and list(map(_version, now)) == self._versions
            and list(map(_data_ptr, now)) == self._pointers
        )


class _Prepared:
    """The network of one module, made again when its weights have changed.

    It does not keep the module alive.
    """

    def __init__(self, module: nn.Module, find: _Stages) -> None:
        self._find = find
        self._look_at(module)

    def _look_at(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._attributes = [m.__dict__ for m in modules]
        self._child_dicts = [m.__dict__["_modules"] for m in modules]
        self._children = list(chain.from_iterable(map(_values, self._child_dicts)))
        self._tensor_dicts = [
            m.__dict__[kind] for m in modules for kind in ("_parameters", "_buffers")
        ]
        self._hooks = [m.__dict__[name] for m in modules[1:] for name in HOOKS]
        self._tensors = _Tensors(self._tensor_dicts)
        stages = self._find(module)
        self._network = PreparedNetwork(stages) if stages else None

    def network(self, module: nn.Module) -> PreparedNetwork | None:
        """The network that stands in for ``module`` as it is now, or None."""
        if any(self._hooks) or any(map(_training, self._attributes)):
            return None
        children = list(chain.from_iterable(map(_values, self._child_dicts)))
        if not (_same(children, self._children) and self._tensors.stay(self._tensor_dicts)):
            self._look_at(module)
        return self._network


_PREPARED: weakref.WeakKeyDictionary[nn.Module, _Prepared] = weakref.WeakKeyDictionary()


def _present(dicts: list[Any]) -> list[Tensor]:
    return [t for t in chain.from_iterable(map(_values, dicts)) if t is not None]


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


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
    ):
        return None
    network = entry.network(module)
    return network if network is not None and network.takes(input) else None
