"""Which blocks are fast here: the search for a network that a device likes.

EfficientNetV2 (arXiv:2104.00298, section 3.3) found that early stages, of few channels and many
pixels, are faster as Fused-MBConv though they then compute more, and late ones as MBConv: depthwise
convolutions do not fill a device's units. ``measure`` times every stage of a table in both ways on
this device, and ``choose`` takes of the 2 ** stages tables the best under a budget.

``evolution`` searches whole tables, by training them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from effnet.efficientnet import scaled, stage_blocks
from effnet.variants import Stage, Variant
from effnet_kernels.bench.environment import default_device
from effnet_kernels.bench.timing import Contender
from effnet_kernels.bench.timing import measure as measure_times


class Cost(NamedTuple):
    """Of a stage.

    Attributes:
        seconds: of an image in inference; the median.
        parameters: of all its blocks.
    """

    seconds: float
    parameters: int


class StageCosts(NamedTuple):
    """A stage in both ways.

    Attributes:
        stage: as the table has it.
        resolution: side of its output, in pixels.
        mbconv: with depthwise convolutions and squeeze-and-excitation.
        fused: with dense convolutions.
    """

    stage: Stage
    resolution: int
    mbconv: Cost
    fused: Cost


def as_mbconv(stage: Stage) -> Stage:
    """The stage with depthwise convolutions and squeeze-and-excitation."""
    return stage._replace(fused=False, squeeze=0.25)


def as_fused(stage: Stage) -> Stage:
    """The stage with 3x3 dense convolutions."""
    return stage._replace(fused=True, squeeze=0.0, kernel_size=3)


def measure(
    table: Variant,
    *,
    batch: int = 1,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.0,
) -> list[StageCosts]:
    """Times every stage as MBConv and as Fused-MBConv, in turns, in inference.

    Args:
        table: with the multipliers and the resolution that are wanted.
        batch: images at a time.
        device: where; the GPU where PyTorch sees one.
        dtype: of weights and images.
        seconds: of sampling for each stage.
    """
    device = device or default_device()
    table = scaled(table)
    channels, size, found = table.stem, -(-table.resolution // table.stem_stride), []
    for stage in table.stages:
        ways = {"mbconv": as_mbconv(stage), "fused": as_fused(stage)}
        images = torch.randn(batch, channels, size, size, device=device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        blocks: dict[str, nn.Module] = {
            name: nn.Sequential(*stage_blocks(way, channels)).to(device, dtype).eval()
            for name, way in ways.items()
        }
        with torch.no_grad():
            contenders = [Contender(name, block, [images]) for name, block in blocks.items()]
            times = measure_times(contenders, device, cold=False, seconds=seconds)
        costs = {
            name: Cost(times[name].median / batch, sum(p.numel() for p in block.parameters()))
            for name, block in blocks.items()
        }
        channels, size = stage.channels, -(-size // stage.stride)
        found.append(StageCosts(stage, size, costs["mbconv"], costs["fused"]))
    return found


def choose(
    measured: Sequence[StageCosts],
    *,
    most_seconds: float | None = None,
    most_parameters: int | None = None,
) -> tuple[Stage, ...]:
    """The best table: the fastest, or under a budget of time the one with the fewest parameters.

    Args:
        measured: of the stages.
        most_seconds: an image may take in all stages.
        most_parameters: all stages may have.

    Raises:
        ValueError: no table is within the budget; the message says what the least is.
    """
    tables = []
    for fused in itertools.product((False, True), repeat=len(measured)):
        costs = [m.fused if f else m.mbconv for m, f in zip(measured, fused, strict=True)]
        tables.append((sum(c.seconds for c in costs), sum(c.parameters for c in costs), fused))
    within = [
        table
        for table in tables
        if (most_seconds is None or table[0] <= most_seconds)
        and (most_parameters is None or table[1] <= most_parameters)
    ]
    if not within:
        raise ValueError(
            f"budget: no table is within it; the fastest takes {min(tables)[0] * 1e3:.3g} ms, the "
            f"smallest has {min(t[1] for t in tables) / 1e6:.3g} M parameters"
        )
    # With a budget of time alone, what is left of it is spent on nothing.
    by_size = most_seconds is not None
    best = min(within, key=lambda table: (table[1], table[0]) if by_size else table[:2])
    return tuple(
        as_fused(m.stage) if fused else as_mbconv(m.stage)
        for m, fused in zip(measured, best[2], strict=True)
    )
