"""The activations every kernel knows, by name and by the code that the op schemas carry."""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


class Activation(enum.IntEnum):
    """Code of an activation in the op schemas; the same list as ``csrc/epilogue.h``."""

    identity = 0
    relu = 1
    relu6 = 2
    silu = 3
    hardswish = 4
    sigmoid = 5
    hardsigmoid = 6


EAGER: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.identity: lambda x: x,
    Activation.relu: F.relu,
    Activation.relu6: F.relu6,
    Activation.silu: F.silu,
    Activation.hardswish: F.hardswish,
    Activation.sigmoid: lambda x: x.sigmoid(),
    Activation.hardsigmoid: F.hardsigmoid,
}


def activation_code(argument: str, name: str) -> Activation:
    """The code of activation ``name``.

    Raises:
        ValueError: ``name`` is no activation; the message names ``argument`` and lists what is.
    """
    try:
        return Activation[name]
    except KeyError:
        known = ", ".join(a.name for a in Activation)
        raise ValueError(f"{argument}: got {name!r}, expected one of {known}") from None
