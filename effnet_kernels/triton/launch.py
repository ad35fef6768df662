"""What every launcher decides before its kernels: device, vector width, parallelism."""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

# Where a grid may have any number of programs, it has about this many for each multiprocessor:
# a few waves of the three to six programs that are resident at a time, so that the last, partly
# filled wave costs little.
PROGRAMS_PER_MULTIPROCESSOR = 16

_NO_GUARD = contextlib.nullcontext()


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``tensor`` the current one, on which Triton launches; cheap if it is."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NO_GUARD


class Hardware(NamedTuple):
    """What a tile is cut for.

    Attributes:
        multiprocessors: of the device.
        shared: bytes of shared memory that one program may have.
        generation: the major number of its compute capability.
    """

    multiprocessors: int
    shared: int
    generation: int

    @property
    def tensor_memory(self) -> bool:
        """Sums of products are in a memory of the tensor cores', not in registers."""
        return self.generation == 10

    @property
    def asynchronous(self) -> bool:
        """Tensor cores read both factors from shared memory, while the warps go on."""
        return self.generation in (9, 10)


# An H200's, where there is no CUDA device.
_DEFAULT = Hardware(132, 232448, 9)


def hardware(tensor: Tensor) -> Hardware:
    """That of the device of ``tensor``; an H200's where it is not a CUDA device."""
    return _hardware(tensor.device.index) if tensor.is_cuda else _DEFAULT


@functools.cache
def _hardware(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    return Hardware(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.major,
    )


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the device of ``tensor``; an H200's where it is not a CUDA device."""
    return hardware(tensor).multiprocessors


def vector_width(channels: int, itemsize: int) -> int:
    """Channels that one access may move: up to 16 bytes, where ``channels`` is a multiple.

    Kernels get the channel count as ``channels // VECTOR`` and multiply, so that the compiler knows
    the pitch of a pixel to be a multiple of VECTOR, and of no more.
    """
    return math.gcd(channels, 16 // itemsize)


def index_type(elements: int) -> tl.dtype:
    """The integer type of offsets inside a region of ``elements`` elements."""
    return tl.int32 if elements < 2**31 else tl.int64


def splits(units: int, independent: int, programs: int, reduced: bool) -> tuple[int, int]:
    """How to split each of ``independent`` groups of ``units``: (parts, units a part).

    Args:
        units: tiles, say; no part is empty.
        independent: programs there are without a split.
        programs: programs there should be, as a rule.
        reduced: the parts of a group have sums to add, by another kernel. Then they stay whole
            where that alone makes two waves of three programs a multiprocessor.
    """
    whole = reduced and independent * PROGRAMS_PER_MULTIPROCESSOR >= programs * 6
    parts = 1 if whole else min(units, -(-programs // independent))
    each = -(-units // parts)
    return -(-units // each), each
