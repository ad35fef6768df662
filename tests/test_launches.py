"""What a GPU launches and moves for EfficientNets in inference, counted without one.

The launchers run; every kernel that they launch is replaced by a note of its name and tensors and
computes nothing. The ops that stay PyTorch's run as ever, those within launchers too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import timm
import torch
from devices import device_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import effnet_kernels
from effnet_kernels import use_backend
from effnet_kernels.ops.mbconv_cost import fuse_expand
from effnet_kernels.triton import depthwise_conv_bn_act

pytestmark = pytest.mark.usefixtures("one_thread")


class Bound(NamedTuple):
    """What a model may launch and move in inference.

    Attributes:
        model: timm's name.
        size: of an image.
        launches: at batch 1: three for each MBConv (two without squeeze-and-excitation), one for
            each Fused-MBConv, and the stem, head and classifier.
        fewer: how many times fewer that is than the stock model's.
        megabytes: an image, in bfloat16, where no expanded tensor is written.
    """

    model: str
    size: int
    launches: int
    fewer: int
    megabytes: float


BOUNDS = [
    Bound("efficientnet_b0", 224, 60, 3, 16.0),
    Bound("efficientnetv2_s", 384, 120, 3, 80.0),
]

# Of what ATen does, what only makes a tensor or changes how one is seen (views say so themselves).
_NO_LAUNCH = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "as_strided_"}
)


class Launch(NamedTuple):
    """One launch: in which part of the model, what, and the bytes of the activations it takes."""

    where: str
    name: str
    bytes: int


class Launches(TorchDispatchMode):
    """Notes every launch of what ``model`` runs under it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.list: list[Launch] = []
        self._where = ""
        self._weights = {
            t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())
        }
        self._key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device.type.upper()))
        for name, module in model.named_modules():
            # Deeper hooks would send a block, and those on its head the model, the stock way.
            end = name in ("conv_stem", "bn1", "conv_head", "bn2")
            if name.count(".") == 2 * name.startswith("blocks") and not end:
                module.register_forward_pre_hook(self._enter(name))
            if name == "blocks":
                module.register_forward_hook(self._enter("head"))

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._where = name

        return hook

    def note(self, name: str, tensors: Iterable[Tensor]) -> None:
        """One launch; ``tensors`` are those it reads or writes."""
        moved = sum(
            t.nbytes
            for t in tensors
            if t.ndim > 1 and t.untyped_storage().data_ptr() not in self._weights
        )
        self.list.append(Launch(self._where, name, moved))

    def kernel(self, kernel: Any, *arguments: Any, **_: Any) -> None:
        """In place of the launch of a Triton kernel."""
        name = kernel.fn.__name__.removesuffix("_kernel")
        self.note(name, [t for t in arguments if isinstance(t, Tensor)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes ``func`` where it launches, and runs it."""
        if func.namespace.startswith("effnet_kernels"):
            with self:  # what it does itself counts
                return func.redispatch(self._key, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in _NO_LAUNCH:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.note(name, tensors)
        return result

    @property
    def bytes(self) -> int:
        """Of all launches."""
        return sum(launch.bytes for launch in self.list)

    def table(self, batch: int) -> str:
        """The launches of each part, with the megabytes an image."""
        lines = [f"{len(self.list)} launches, {self.bytes / batch / 1e6:.3f} MB an image"]
        for where in dict.fromkeys(launch.where for launch in self.list):
            here = [launch for launch in self.list if launch.where == where]
            total = sum(launch.bytes for launch in here) / batch / 1e6
            each = ", ".join(f"{x.name} {x.bytes / batch / 1e6:.3f}" for x in here)
            lines.append(f"{where:12} {len(here):2} {total:7.3f}  {each}")
        return "\n".join(lines)


def launches(
    monkeypatch: pytest.MonkeyPatch, bound: Bound, batch: int, *, converted: bool
) -> Launches:
    """Those of one call of the model on ``batch`` images in bfloat16."""
    device = torch.device(device_of("triton"))
    model: nn.Module = timm.create_model(bound.model).eval()
    model = model.to(device, torch.bfloat16, memory_format=torch.channels_last)
    if converted:
        effnet_kernels.convert(model, strict=True)
    images = torch.zeros(batch, 3, bound.size, bound.size, dtype=torch.bfloat16, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    found = Launches(model, device)
    kind = type(depthwise_conv_bn_act.depthwise_conv_kernel)
    monkeypatch.setattr(kind, "run", lambda kernel, *a, **options: found.kernel(kernel, *a))
    with torch.no_grad(), use_backend("triton"), found:
        model(images)
    return found


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.model)
def test_launches(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 1, where they are the time, a fraction of the stock model's."""
    ours = launches(monkeypatch, bound, 1, converted=True)
    print(ours.table(1))
    assert len(ours.list) <= bound.launches
    small = bound._replace(size=64)  # the stock model computes what it launches
    stock = launches(monkeypatch, small, 1, converted=False)
    print(f"stock: {len(stock.list)} launches")
    assert len(stock.list) > bound.fewer * len(ours.list)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.model)
def test_traffic(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    """With expansion and depthwise convolution in one launch everywhere, whatever is faster."""
    with fuse_expand(True):
        ours = launches(monkeypatch, bound, 2, converted=True)
    print(ours.table(2))
    assert ours.bytes / 2 <= bound.megabytes * 1e6
