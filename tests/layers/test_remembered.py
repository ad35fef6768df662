"""What a block's checks found is asked for again when anything that they read has changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from effnet_kernels.layers.remembered import remembered


def make_module() -> nn.Sequential:
    """Two levels of children, with parameters and buffers."""
    inner = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2))
    return nn.Sequential(inner, nn.SiLU())


class Finder:
    """Counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, module: nn.Module) -> int:
        """How often, this time included."""
        self.asked += 1
        return self.asked


def replace_parameter(module: nn.Sequential) -> None:
    """One that was None."""
    module[0][0].bias = nn.Parameter(module[0][1].running_mean.clone())


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "child": lambda m: m[0].__setitem__(1, nn.BatchNorm2d(2)),
    "new child": lambda m: m[0].append(nn.ReLU()),
    "attribute": lambda m: setattr(m[0][0], "stride", (2, 2)),
    "own attribute": lambda m: setattr(m, "has_skip", True),
    "mode": lambda m: m[0][1].eval(),
    "class": lambda m: setattr(m[0][0], "__class__", type("Other", (nn.Conv2d,), {})),
    "own class": lambda m: setattr(m, "__class__", type("Other", (nn.Sequential,), {})),
    "buffer": lambda m: setattr(m[0][1], "running_mean", None),
    "parameter": replace_parameter,
    "patched forward": lambda m: setattr(m[1], "forward", lambda x: x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_change_is_seen(change: Callable[[nn.Sequential], object]) -> None:
    """Once, and what it changed to is remembered in its turn."""
    module, find = make_module(), Finder()
    assert [remembered(module, find) for _ in range(3)] == [1, 1, 1]
    change(module)
    assert [remembered(module, find) for _ in range(3)] == [2, 2, 2]


def test_tensor_as_attribute() -> None:
    """One that is no parameter or buffer, and another in its place."""
    module, find = make_module(), Finder()
    module[1].mask = torch.ones(2)
    assert [remembered(module, find) for _ in range(2)] == [1, 1]
    module[1].mask = torch.ones(2)
    assert [remembered(module, find) for _ in range(2)] == [2, 2]


def test_values_do_not_matter() -> None:
    """Parameters and buffers may change, in dtype too."""
    module, find = make_module(), Finder()
    remembered(module, find)
    module[0][1].running_mean.add_(1)
    module.double()
    assert remembered(module, find) == 1


def test_hooks() -> None:
    """With a hook below nothing is remembered, and without it all is asked again."""
    module, find = make_module(), Finder()
    remembered(module, find)
    handle = module[0][0].register_forward_hook(lambda *_: None)
    assert [remembered(module, find) for _ in range(2)] == [2, 3]
    handle.remove()
    assert [remembered(module, find) for _ in range(2)] == [4, 4]


def test_copies_and_lifetime() -> None:
    """A copy is asked for itself, and nothing keeps a module alive."""
    module, find = make_module(), Finder()
    remembered(module, find)
    assert remembered(copy.deepcopy(module), find) == 2
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None
