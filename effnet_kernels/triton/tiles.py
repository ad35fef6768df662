"""Tiles that ``effnet-kernels tune`` measured to be the fastest, by GPU architecture.

``tiles/<architecture>.json`` beside this file is the committed table. A launcher asks for its
problem, and takes a formula's tile where nothing like it was measured: no call ever searches.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOLDER = Path(__file__).with_name("tiles")


class Tile(NamedTuple):
    """How one program of a matrix product is cut.

    Attributes:
        pixels: rows of the tile.
        channels: of a slice of the sum.
        features: columns of the tile.
        warps: of the program.
        stages: slices, or tiles of pixels, that are on their way or in shared memory.
    """

    pixels: int
    channels: int
    features: int
    warps: int
    stages: int


class Problem(NamedTuple):
    """A pointwise convolution, as far as its tile depends on it.

    Attributes:
        pixels: of the whole batch.
        channels: of the input.
        features: of the output.
        itemsize: bytes of an element.
        transformed: it has a prologue or a gate.
    """

    pixels: int
    channels: int
    features: int
    itemsize: int
    transformed: bool


class BlockProblem(NamedTuple):
    """A Fused-MBConv block, as far as its tile depends on it.

    Attributes:
        pixels: of the whole batch, of the output.
        kernel: size of the convolution.
        channels: of the input.
        middle: channels of the expanded tensor; a tile's features are those of a chunk of it.
        features: of the output, or 0 without a project convolution.
        itemsize: bytes of an element.
        precise: float32 products with all of its digits.
    """

    pixels: int
    kernel: int
    channels: int
    middle: int
    features: int
    itemsize: int
    precise: bool


# By the section of the table, which is the op's name.
PROBLEMS: dict[str, type[Problem] | type[BlockProblem]] = {
    "pointwise_conv_bn_act": Problem,
    "fused_mbconv": BlockProblem,
}

_forced: dict[type, Tile] = {}


@contextlib.contextmanager
def force(tile: Tile, problem: type = Problem) -> Iterator[None]:
    """Every launch for a ``problem`` in the ``with`` block takes ``tile`` (process-wide): for the
    tuner.
    """
    global _forced
    before, _forced = _forced, {**_forced, problem: tile}
    try:
        yield
    finally:
        _forced = before


def architecture(tensor: Tensor) -> str | None:
    """``sm_90``, say: of the device of ``tensor``, or None where that is no GPU."""
    return _architecture(tensor.device.index) if tensor.is_cuda else None


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def measured(architecture: str | None, problem: Problem | BlockProblem) -> Tile | None:
    """The tile of the measured problem that is most like ``problem``, or None.

    Like it is one that differs in nothing but the pixels, and there by a factor of four at most.
    """
    if type(problem) in _forced:
        return _forced[type(problem)]
    return None if architecture is None else _nearest(architecture, problem)


@functools.lru_cache(maxsize=1024)
def _nearest(architecture: str, problem: Problem | BlockProblem) -> Tile | None:
    """On every launch: looked for once."""
    found = _table(architecture).get((type(problem), *problem[1:]))
    if not found or not problem.pixels:
        return None

    def distance(pixels: int) -> float:
        return abs(math.log2(pixels / problem.pixels))

    nearest = min(found, key=distance)
    return found[nearest] if distance(nearest) <= 2 else None


@functools.cache
def _table(architecture: str) -> dict[tuple[Any, ...], dict[int, Tile]]:
    """Tiles by pixels, by the rest of the problem and its type."""
    path = FOLDER / f"{architecture}.json"
    table: dict[tuple[Any, ...], dict[int, Tile]] = {}
    if path.exists():
        sections = json.loads(path.read_text())
        for op, kind in PROBLEMS.items():
            for entry in sections.get(op, []):
                problem = kind(**entry["problem"])
                key = (kind, *problem[1:])
                table.setdefault(key, {})[problem.pixels] = Tile(**entry["tile"])
    return table
