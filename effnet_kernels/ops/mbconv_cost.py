"""Whether a GPU computes MBConv's expansion in the launch of its depthwise convolution.

Fused, the expanded tensor is never written, but every tile of the depthwise output needs a halo of
expanded pixels that its neighbours compute too. The model compares the two by what each launch
moves and computes:

    time(launch) = launch overhead + max(bytes / bandwidth, FLOPs / rate / efficiency)

with an H200's figures: they are ratios that hold for the other GPUs with tensor cores within what
the decision can tell apart. There the fused kernels measured at a quarter of the units' rates,
since the phases of a tile wait for each other, and the launches of one operation at half: with
these efficiencies the model says, as the measurements do, that two launches are faster for large
batches. ``fuse_expand`` overrules it.

One launch for the whole block is not among the choices. Where an image's expanded tensor fits a
multiprocessor (7 x 7 x 1152 in 16 bits: 113 kB), each of them would read all the weights for each
image: 885 kB at the last stages of EfficientNet-B0, 21 us at a multiprocessor's share of L2's
bandwidth, so some 45 us for 256 images on 132 multiprocessors. The three launches move 72 MB there,
17 us, and their overhead is 9; at batch 1, where overhead is all that they cost, one multiprocessor
would do what they spread over all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import Tensor

BANDWIDTH = 4.3e12
"""Bytes a second of a copy, read + written."""
MATMUL_RATE = {2: 600e12, 4: 60e12}
"""FLOPs a second of a product by bytes an element: 16-bit, and float32 as three TF32 products."""
VECTOR_RATE = 40e12
"""FLOPs a second of multiply-adds outside the tensor cores."""
ACTIVATION_RATE = 3e12
"""Activations a second: one special function each."""
FUSED_EFFICIENCY, SEPARATE_EFFICIENCY = 0.25, 0.5
"""Shares of these rates that the kernels reach."""
LAUNCH = 3e-6
"""Seconds that one launch more costs."""

_WHOLE_IMAGE = 28
_TILE = 16

_forced: bool | None = None


@contextlib.contextmanager
def fuse_expand(fused: bool | None) -> Iterator[None]:
    """Overrules the model in a ``with`` block (process-wide); None lets it decide again."""
    global _forced
    before, _forced = _forced, fused
    try:
        yield
    finally:
        _forced = before


def halo(size: tuple[int, int], kernel: int, stride: int) -> float:
    """Expanded pixels computed for each one there is, for outputs of ``size``: images of up to
    28 x 28 are one tile, others are cut into 16 x 16. The kernels' own tiles are as good or better.
    """
    factor = 1.0
    for extent in size:
        tile = extent if extent <= _WHOLE_IMAGE else _TILE
        if tile < extent:
            factor *= ((tile - 1) * stride + kernel) / (tile * stride)
    return factor


@functools.lru_cache(maxsize=1024)
def expand_seconds(
    shape: tuple[int, int, int, int],
    channels: int,
    kernel: int,
    stride: int,
    out_size: tuple[int, int],
    itemsize: int,
) -> tuple[float, float]:
    """Predicted seconds of expand and depthwise convolution, fused and as two launches.

    Args:
        shape: the input's (N, C_in, H, W).
        channels: the expanded C.
        kernel: of the depthwise convolution.
        stride: likewise.
        out_size: (OH, OW).
        itemsize: bytes of an element.
    """
    n, in_channels, height, width = shape
    x = n * in_channels * height * width
    e = n * channels * height * width
    d = n * channels * out_size[0] * out_size[1]
    taps = 2 * kernel * kernel * d

    def launch(
        elements: float, product: float, vector: float, activations: float, efficiency: float
    ) -> float:
        compute = (
            product / MATMUL_RATE[itemsize] + vector / VECTOR_RATE + activations / ACTIVATION_RATE
        )
        return LAUNCH + max(elements * itemsize / BANDWIDTH, compute / efficiency)

    expanded = e * halo(out_size, kernel, stride)
    fused = launch(x + d, 2 * in_channels * expanded, taps, expanded + d, FUSED_EFFICIENCY)
    separate = launch(x + e, 2 * in_channels * e, 0, e, SEPARATE_EFFICIENCY) + launch(
        e + d, 0, taps, d, SEPARATE_EFFICIENCY
    )
    return fused, separate


def fuses_expand(
    input: Tensor, channels: int, kernel: int, stride: int, out_size: tuple[int, int]
) -> bool:
    """Whether the fused launch is predicted to be the faster one for ``input``."""
    if _forced is not None:
        return _forced
    n, in_channels, height, width = input.shape
    fused, separate = expand_seconds(
        (n, in_channels, height, width),
        channels,
        kernel,
        stride,
        out_size,
        input.element_size(),
    )
    return fused < separate
