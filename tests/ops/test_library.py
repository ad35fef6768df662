"""The direct way to an op's implementation, and who still sees what goes through the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_kernels import use_backend
from effnet_kernels.ops import batch_norm_act

NAME = "effnet_kernels::batch_norm_act"


def run(grad: bool = False) -> Tensor:
    """A call on the CPU backend."""
    x = torch.randn(2, 3, 4, 4, requires_grad=grad)
    with use_backend("cpu"):
        return batch_norm_act(x, torch.zeros(3), torch.ones(3)).output


class DispatchMode(TorchDispatchMode):
    """Notes the names of ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it."""
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class FunctionMode(TorchFunctionMode):
    """The same, of what Python calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs it."""
        if isinstance(func, torch._ops.OpOverload):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", [DispatchMode, FunctionMode])
def test_modes_see_the_op(mode: type[DispatchMode] | type[FunctionMode], grad: bool) -> None:
    """Both kinds, with a gradient and without."""
    with mode() as seen:
        run(grad)
    assert NAME in seen.names


def test_profiler_sees_the_op() -> None:
    """By its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    assert NAME in {event.key for event in profile.key_averages()}


def test_subclasses_see_the_op() -> None:
    """A subclass's own rules hold."""

    class Seen(Tensor):
        names: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if isinstance(func, torch._ops.OpOverload):
                cls.names.append(func.name())
            return super().__torch_function__(func, types, args, kwargs or {})

    with use_backend("cpu"):
        x = torch.randn(2, 3, 4, 4).as_subclass(Seen)
        batch_norm_act(x, torch.zeros(3), torch.ones(3))
    assert NAME in Seen.names


def test_both_ways_agree() -> None:
    """Results, gradients and the error of a second derivative."""
    grads = []
    for mode in (DispatchMode, None):
        torch.manual_seed(3)
        if mode is None:
            output = run(True)
        else:
            with mode():
                output = run(True)
        assert output.grad_fn is not None
        grads.append((output.detach(), output.grad_fn.name()))
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][1] == grads[1][1]
