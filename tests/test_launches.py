"""What a GPU launches and moves for EfficientNet-B0 in inference, counted without one.

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

MODEL, SIZE = "efficientnet_b0", 224
LAUNCHES = 60
"""The most at batch 1: three for each of the sixteen blocks, and the stem, head and classifier."""
MEGABYTES = 16.0
"""The most that an image may move in bfloat16 where no expanded tensor is written."""

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
            head = name in ("conv_head", "bn2")
            if name.count(".") == 2 * name.startswith("blocks") and not head:
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


def launches(monkeypatch: pytest.MonkeyPatch, batch: int, *, converted: bool) -> Launches:
    """Those of one call of the model on ``batch`` images in bfloat16."""
    device = torch.device(device_of("triton"))
    model: nn.Module = timm.create_model(MODEL).eval()
    model = model.to(device, torch.bfloat16, memory_format=torch.channels_last)
    if converted:
        effnet_kernels.convert(model, strict=True)
    images = torch.zeros(batch, 3, SIZE, SIZE, dtype=torch.bfloat16, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    found = Launches(model, device)
    kind = type(depthwise_conv_bn_act.depthwise_conv_kernel)
    monkeypatch.setattr(kind, "run", lambda kernel, *a, **options: found.kernel(kernel, *a))
    with torch.no_grad(), use_backend("triton"), found:
        model(images)
    return found


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """At batch 1, where they are the time, less than a third of the stock model's."""
    ours = launches(monkeypatch, 1, converted=True)
    stock = launches(monkeypatch, 1, converted=False)
    print(ours.table(1))
    print(f"stock: {len(stock.list)} launches, {stock.bytes / 1e6:.1f} MB")
    assert len(ours.list) <= LAUNCHES
    assert len(stock.list) > 3 * len(ours.list)


def test_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """With expansion and depthwise convolution in one launch everywhere, whatever is faster."""
    with fuse_expand(True):
        ours = launches(monkeypatch, 2, converted=True)
    print(ours.table(2))
    assert ours.bytes / 2 <= MEGABYTES * 1e6
