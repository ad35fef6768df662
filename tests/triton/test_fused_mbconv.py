"""Fused-MBConv in Triton, against float64 and eager; and the tiles that its launcher chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import FORWARD, assert_error_rule
from devices import device_of, skip_in_interpreter
from ops.block_cases import Case
from ops.test_fused_mbconv import check, make_arguments
from torch import Tensor

from effnet_kernels.activations import EAGER, Activation
from effnet_kernels.ops.depthwise_conv_bn_act import check_padding
from effnet_kernels.ops.fused_mbconv import conv2d
from effnet_kernels.triton import fused_mbconv as module
from effnet_kernels.triton import tiles
from effnet_kernels.triton.launch import Hardware

CASES = [
    Case(2, 16, 64, 16, 9, 11, residual=True),
    Case(2, 8, 32, 24, 12, 15, stride=2),
    Case(1, 24, 72, 16, 10, 8, kernel=5, stride=2, project_activation="relu6"),
    Case(2, 13, 29, 11, 7, 6, padding=(1, 0, 1, 2), activation="relu"),
    Case(1, 3, 5, 7, 6, 5, kernel=7, stride=2, padding=(3, 2, 1, 3), affine=False),
    Case(2, 24, 24, 0, 9, 8, residual=True),
    Case(1, 10, 33, 0, 8, 9, kernel=5, stride=2, activation="hardswish"),
    Case(3, 16, 48, 16, 7, 6, squeezed=4, residual=True),
    Case(2, 8, 36, 12, 9, 11, kernel=5, stride=2, squeezed=3),
    Case(3, 12, 20, 12, 1, 1, residual=True),
    # Real ones: V2-S's and -M's widths, whose chunks are as wide as those of whole images.
    Case(1, 48, 192, 48, 8, 9, residual=True),
    Case(1, 64, 256, 64, 9, 8, stride=2),
    Case(1, 80, 320, 80, 6, 5, residual=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    """Kernels, strides, pads, ragged extents, no project convolution, squeeze-and-excitation."""
    skip_in_interpreter("triton", dtype, CASES.index(case))
    check(case, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tile", [tiles.Tile(64, 32, 16, 4, 2), tiles.Tile(128, 64, 128, 8, 3)], ids=str
)
def test_any_tile(tile: tiles.Tile, dtype: torch.dtype) -> None:
    """Chunks of a part of the middle width, and one that is wider than it; two images a tile."""
    case = Case(3, 10, 72, 20, 7, 6, residual=False)
    with tiles.force(tile, tiles.BlockProblem):
        check(case, dtype, "triton")
        check(replace(case, squeezed=4), dtype, "triton")


@pytest.mark.parametrize("size", [(5, 6), (13, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pooled(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Sums by image of what the convolution gives, before the residual; of one tile and several."""
    case = Case(2, 40, 40, 0, *size)
    arguments = make_arguments(case, dtype, device_of("triton"))
    x, expand = arguments["input"], arguments["expand"]
    weight = expand.weight.contiguous(memory_format=torch.channels_last)
    pads = check_padding("same", x, 3, 1)
    output = torch.empty_like(x).fill_(torch.nan)
    pooled = torch.full((2, 40), torch.nan, device=x.device)
    bn = (expand.running_mean, expand.running_var, expand.bn_weight, expand.bn_bias)
    module.fused_mbconv_out(
        x, weight, *bn, 1e-3, Activation.silu, 1, pads[0], pads[1],
        None, None, None, None, None, 0.0, Activation.identity, x, False, output, pooled,
    )  # fmt: skip

    def reference(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        z = conv2d(x.to(compute), weight.to(compute), 1, pads)
        z = torch.nn.functional.batch_norm(z, *(t.to(compute) for t in bn), False, 0.0, 1e-3)
        z = EAGER[Activation.silu](z)
        return z + x.to(compute), z.sum((2, 3), dtype=torch.promote_types(compute, torch.float32))

    exact, eager = reference(torch.float64), reference(dtype)
    assert_error_rule("output", output, eager[0], exact[0], dtype, FORWARD)
    assert_error_rule("pooled", pooled, eager[1], exact[1], torch.float32, FORWARD)


HARDWARE = {
    "sm_80": Hardware(108, 163 * 1024, 8),
    "sm_89": Hardware(128, 99 * 1024, 8),
    "sm_90": Hardware(132, 227 * 1024, 9),
    "sm_100": Hardware(148, 227 * 1024, 10),
}


@pytest.mark.parametrize("name", HARDWARE)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("pixels", [1, 48 * 48, 128 * 96 * 96])
def test_every_problem_has_a_tile(pixels: int, itemsize: int, name: str) -> None:
    """Whatever the widths, some tile fits, on every GPU."""
    for channels, middle, features, kernel, precise in (
        (3, 24, 0, 3, False),
        (24, 24, 0, 3, True),
        (13, 29, 11, 5, True),
        (48, 192, 48, 3, False),
        (96, 384, 96, 3, True),
        (96, 768, 192, 3, True),
        (512, 3072, 640, 7, True),
    ):
        problem = tiles.BlockProblem(
            pixels, kernel, channels, middle, features, itemsize, precise and itemsize == 4
        )
        hardware = HARDWARE[name]
        tile = module.usual_tile(problem, hardware)
        assert module.shared_bytes(problem, tile) <= hardware.shared
        assert tile.pixels in (64, 128) and tile.stages in (2, 3)


def test_chunk_is_the_middle_width() -> None:
    """Where registers hold it, the input is gathered once."""
    problem = tiles.BlockProblem(128 * 96 * 96, 3, 48, 192, 48, 2, False)
    assert module.usual_tile(problem, HARDWARE["sm_90"])[:3] == (128, 64, 256)
    narrow = problem._replace(channels=24, middle=96)
    assert module.usual_tile(narrow, HARDWARE["sm_90"])[:3] == (64, 64, 128)
