"""What every launcher decides before its kernels: device, vector width, parallelism."""

from __future__ import annotations

import contextlib
import functools
import math
from contextlib import AbstractContextManager

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


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the device of ``tensor``; an H200's where it is not a CUDA device."""
    return _multiprocessors(tensor.device.index) if tensor.is_cuda else 132


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


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
