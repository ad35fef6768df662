"""Memory traffic and arithmetic of a model, counted from its ops, at several levels of fusion.

The model runs once on the meta device, and every ATen op is recorded with the activation tensors
it reads and writes. A level of fusion is a rule that joins ops into kernels: a kernel reads each
tensor that comes from outside once and writes each tensor that is used outside once, whatever
happens within is free. Weights are counted apart, once a batch.

===============  ===================================================================================
level            what is one kernel
===============  ===================================================================================
``eager``        every op by itself
``conv_fused``   a convolution (or linear layer) with its padding, BN, activation and residual
                 addition; squeeze-and-excitation's pool and scaling are passes of their own
``depthwise``    ``ops.depthwise_conv_bn_act``: BN and activation on both sides of a depthwise
                 convolution, and the pool after it; all other ops as in ``eager``
``mbconv``       ``conv_fused``, and: a pool in the kernel of the convolution before it, the scaling
                 of squeeze-and-excitation in the projection's, and no expanded tensor is written
                 (expand and depthwise, or expand and project of a Fused-MBConv, are one kernel)
===============  ===================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTIONS = ("convolution", "addmm", "mm", "linear")
_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "batch_norm")
_ACTIVATIONS = (
    "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "sigmoid",
    "silu", "tanh",
)  # fmt: skip
# A clone here is a change of layout, which a model that runs in one layout does not make.
_VIEWS = (
    "t", "view", "reshape", "_unsafe_view", "alias", "clone", "detach", "expand", "unsqueeze",
)  # fmt: skip


@dataclass
class Value:
    """An activation tensor: its size, the op that wrote it (None for the input) and its readers."""

    bytes: int
    producer: int | None
    shape: tuple[int, ...]
    readers: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Op:
    """One recorded op.

    Attributes:
        kind: ``conv``, ``norm``, ``activation``, ``pad``, ``mean`` (a sum too), ``add``,
            ``mul`` or ``other``.
        name: ATen's name.
        reads: values read, by index.
        writes: the value written, by index.
        flops: arithmetic of convolutions and matrix products, two for a multiply-add.
        kernel_size: of a convolution; 1 for a linear layer.
        depthwise: a convolution with one filter a channel.
        weight_bytes: parameters read.
    """

    kind: str
    name: str
    reads: tuple[int, ...]
    writes: int
    flops: int = 0
    kernel_size: int = 0
    depthwise: bool = False
    weight_bytes: int = 0


@dataclass(frozen=True)
class Kernel:
    """Traffic of one kernel: bytes of activations and weights, and FLOPs."""

    ops: tuple[str, ...]
    bytes: int
    weight_bytes: int
    flops: int


@dataclass(frozen=True)
class Traffic:
    """A model's traffic at one level of fusion, for the batch it was recorded with.

    Attributes:
        level: a key of ``LEVELS``.
        kernels: each kernel's share, in order.
    """

    level: str
    kernels: tuple[Kernel, ...]

    @property
    def bytes(self) -> int:
        """Activation bytes read and written."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def weight_bytes(self) -> int:
        """Parameter bytes read."""
        return sum(kernel.weight_bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """FLOPs of convolutions and matrix products."""
        return sum(kernel.flops for kernel in self.kernels)

    def seconds(self, copy_bandwidth: float, matmul_rate: float) -> float:
        """The least time: each kernel takes the longer of its bytes and its arithmetic."""
        return sum(
            max((k.bytes + k.weight_bytes) / copy_bandwidth, k.flops / matmul_rate)
            for k in self.kernels
        )


class Recording(TorchDispatchMode):
    """Records the ops of what runs inside, as a graph of values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.values: list[Value] = []
        self._current: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a freed tensor's address would name another tensor
        self._parameters = {
            t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs ``func`` and records it."""
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        tensors = [t for t in args if isinstance(t, Tensor)]
        for group in args:
            if isinstance(group, (tuple, list)):  # cat takes a list
                tensors += [t for t in group if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[-1]
        if not isinstance(first, Tensor) or not tensors or name.startswith("empty"):
            return result
        self._alive += [first, *tensors]
        activations = [t for t in tensors if self._key(t) not in self._parameters]
        parameters = [t for t in tensors if self._key(t) in self._parameters]
        if not activations:
            if name in _VIEWS:  # a view of a parameter stays one: the storage is the parameter's
                return result
            self._parameters.add(self._key(first))
            return result
        reads = tuple(dict.fromkeys(self._value(t) for t in activations))
        if name in _VIEWS:
            self._current[self._key(first)] = reads[0]
            return result
        self._record(name, args, first, reads, parameters)
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _value(self, tensor: Tensor) -> int:
        key = self._key(tensor)
        if key not in self._current:
            self._current[key] = self._new_value(tensor, None)
        return self._current[key]

    def _new_value(self, tensor: Tensor, producer: int | None) -> int:
        self.values.append(
            Value(tensor.numel() * tensor.element_size(), producer, tuple(tensor.shape))
        )
        return len(self.values) - 1

    def _record(
        self,
        name: str,
        args: tuple[Any, ...],
        result: Tensor,
        reads: tuple[int, ...],
        parameters: list[Tensor],
    ) -> None:
        index = len(self.ops)
        for read in reads:
            self.values[read].readers.append(index)
        written = self._new_value(result, index)
        self._current[self._key(result)] = written  # in place: a new value in the same storage
        stem = name.removesuffix("_")
        flops = kernel_size = 0
        depthwise = False
        kind = "other"
        if stem in _CONVOLUTIONS:
            kind = "conv"
            kernel_size = 1
            weight = parameters[-1]
            if stem == "convolution":
                weight = args[1]
                kernel_size = weight.shape[2]
                depthwise = args[8] == weight.shape[0] > 1 and weight.shape[1] == 1
                flops = 2 * result.numel() * weight[0].numel()
            else:
                flops = 2 * result.numel() * self.values[reads[0]].shape[-1]
        elif stem in _NORMS:
            kind = "norm"
        elif stem in _ACTIVATIONS:
            kind = "activation"
        elif stem == "constant_pad_nd":
            kind = "pad"
        elif stem in ("mean", "sum"):
            kind = "mean"
        elif stem in ("add", "mul"):
            kind = stem
        self.ops.append(
            Op(
                kind, name, reads, written, flops, kernel_size, depthwise,
                sum(p.numel() * p.element_size() for p in parameters),
            )
        )  # fmt: skip


def record(model: nn.Module, image: Tensor) -> Recording:
    """The ops of ``model(image)`` in evaluation mode; both on the meta device.

    Raises:
        ValueError: a tensor of the model or the image is not on the meta device.
    """
    for tensor in (image, *model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            raise ValueError(f"model: got a tensor on {tensor.device}, expected meta")
    was_training = model.training
    recording = Recording(model.eval())
    with torch.no_grad(), recording:
        model(image)
    model.train(was_training)
    return recording


class _Kernels:
    """A partition of the ops into kernels."""

    def __init__(self, recording: Recording) -> None:
        self.ops, self.values = recording.ops, recording.values
        self._parent = list(range(len(self.ops)))

    def root(self, op: int) -> int:
        while self._parent[op] != op:
            op = self._parent[op]
        return op

    def join(self, op: int, other: int) -> None:
        low, high = sorted((self.root(op), self.root(other)))
        self._parent[high] = low

    def members(self, op: int) -> list[Op]:
        root = self.root(op)
        return [o for i, o in enumerate(self.ops) if self.root(i) == root]

    def sole_producer(self, value: int) -> int | None:
        """The op that wrote ``value``, where only one op reads it."""
        if len(self.values[value].readers) != 1:
            return None
        return self.values[value].producer

    def convolution(self, op: int | None) -> Op | None:
        """The last convolution of the kernel that ``op`` is in."""
        if op is None:
            return None
        found = [o for o in self.members(op) if o.kind == "conv"]
        return found[-1] if found else None

    def unpadded(self, value: int) -> int:
        """``value``, or what it pads."""
        producer = self.sole_producer(value)
        if producer is not None and self.ops[producer].kind == "pad":
            return self.ops[producer].reads[0]
        return value

    def traffic(self, level: str) -> Traffic:
        kernels = []
        for root in sorted({self.root(i) for i in range(len(self.ops))}):
            indices = [i for i in range(len(self.ops)) if self.root(i) == root]
            inside = set(indices)
            written = {self.ops[i].writes for i in indices}
            read = {value for i in indices for value in self.ops[i].reads} - written
            kept = {
                v for v in written
                if not self.values[v].readers or not inside.issuperset(self.values[v].readers)
            }  # fmt: skip
            kernels.append(
                Kernel(
                    tuple(self.ops[i].name for i in indices),
                    sum(self.values[v].bytes for v in read | kept),
                    sum(self.ops[i].weight_bytes for i in indices),
                    sum(self.ops[i].flops for i in indices),
                )
            )
        return Traffic(level, tuple(kernels))


def _eager(kernels: _Kernels) -> None:
    pass


def _conv_fused(kernels: _Kernels) -> None:
    for index, op in enumerate(kernels.ops):
        if op.kind in ("norm", "activation"):
            producer = kernels.sole_producer(op.reads[0])
            if producer is not None and kernels.convolution(producer) is not None:
                kernels.join(index, producer)
        elif op.kind == "add":
            # The later operand is the block's own, the earlier one its shortcut.
            producers = [p for p in map(kernels.sole_producer, op.reads) if p is not None]
            producers = [p for p in producers if kernels.convolution(p) is not None]
            if producers:
                kernels.join(index, max(producers))
        elif op.kind == "conv":
            producer = kernels.sole_producer(op.reads[0])
            if producer is not None and kernels.ops[producer].kind == "pad":
                kernels.join(index, producer)


def _depthwise(kernels: _Kernels) -> None:
    for index, op in enumerate(kernels.ops):
        if op.kind == "conv" and op.depthwise:
            value = op.reads[0]
            for kind in ("pad", "activation", "norm"):
                producer = kernels.sole_producer(value)
                if producer is not None and kernels.ops[producer].kind == kind:
                    kernels.join(index, producer)
                    value = kernels.ops[producer].reads[0]
        elif op.kind in ("norm", "activation"):
            producer = kernels.sole_producer(op.reads[0])
            if producer is not None and _ends_depthwise(kernels, producer):
                kernels.join(index, producer)
    _pool(kernels, after_any=False)


def _ends_depthwise(kernels: _Kernels, producer: int) -> bool:
    convolution = kernels.convolution(producer)
    return convolution is not None and convolution.depthwise


def _pool(kernels: _Kernels, *, after_any: bool) -> None:
    for index, op in enumerate(kernels.ops):
        producer = kernels.values[op.reads[0]].producer
        if op.kind == "mean" and producer is not None:
            convolution = kernels.convolution(producer)
            if convolution is not None and (convolution.depthwise or after_any):
                kernels.join(index, producer)


def _mbconv(kernels: _Kernels) -> None:
    _conv_fused(kernels)
    _pool(kernels, after_any=True)
    for index, op in enumerate(kernels.ops):
        if op.kind != "conv":
            continue
        producer = kernels.sole_producer(kernels.unpadded(op.reads[0]))
        if producer is not None and kernels.ops[producer].kind == "mul":
            kernels.join(index, producer)
            continue
        before = kernels.convolution(producer)
        if producer is None or before is None:
            continue
        expand_depthwise = op.depthwise and before.kernel_size == 1
        expand_project = (
            op.kernel_size == 1
            and before.kernel_size > 1
            and not before.depthwise
            and kernels.values[before.reads[0]].shape[1] < kernels.values[before.writes].shape[1]
        )
        if expand_depthwise or expand_project:
            kernels.join(index, producer)


LEVELS: dict[str, Callable[[_Kernels], None]] = {
    "eager": _eager,
    "conv_fused": _conv_fused,
    "depthwise": _depthwise,
    "mbconv": _mbconv,
}
"""The levels of fusion, least first."""


def count(recording: Recording) -> Iterator[Traffic]:
    """The traffic of a recorded model at each of ``LEVELS``."""
    for level, fuse in LEVELS.items():
        kernels = _Kernels(recording)
        fuse(kernels)
        yield kernels.traffic(level)
