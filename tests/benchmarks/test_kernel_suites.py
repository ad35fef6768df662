"""The suites of the kernels on small problems: who runs, what is right, which bytes are counted."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from effnet_kernels import __main__ as main
from effnet_kernels import use_backend
from effnet_kernels.bench import (
    batch_norm_act,
    command,
    depthwise_conv_bn_act,
    fused_mbconv,
    kernels,
    mbconv,
    pointwise_conv_bn_act,
    results,
    shapes,
    squeeze_excite,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MODEL = "efficientnet_b0"
N = 4

# Expanded to 64 channels of 14x14, stride 2, back to 24 of 7x7; the same with a residual; one that
# expands nothing.
WIDE = shapes.Mbconv(MODEL, 16, 64, 24, 4, 14, 3, 2, False)
RESIDUAL = shapes.Mbconv(MODEL, 16, 64, 16, 4, 14, 5, 1, True)
NARROW = shapes.Mbconv(MODEL, 32, 32, 16, 8, 14, 3, 1, False)

# The same with one convolution that does both, and the one that expands nothing alone.
FUSED = shapes.FusedMbconv(MODEL, 16, 64, 24, 14, 3, 2, False)
FUSED_RESIDUAL = shapes.FusedMbconv(MODEL, 16, 64, 16, 14, 3, 1, True)
FUSED_ALONE = shapes.FusedMbconv(MODEL, 24, 24, 24, 14, 3, 1, True)
FUSED_SHAPES = (FUSED, FUSED_RESIDUAL, FUSED_ALONE)

EXPAND = shapes.Pointwise(MODEL, "expand", 16, 64, 14)
PROJECT = shapes.Pointwise(MODEL, "project", 64, 24, 14, gate=True)
GATED_RESIDUAL = shapes.Pointwise(MODEL, "project", 64, 24, 14, gate=True, residual=True)
UNGATED = shapes.Pointwise(MODEL, "project", 64, 24, 14)
HEAD = shapes.Pointwise(MODEL, "head", 64, 96, 7)

EXCITE = shapes.SqueezeExcite(MODEL, 64, 4, 14)
SILU = shapes.Norm(MODEL, 64, 14, "silu", False)
LINEAR = shapes.Norm(MODEL, 64, 14, "identity", True)

PROBLEMS: list[tuple[Any, Any, str]] = [
    *((mbconv, block, mode) for block in (WIDE, RESIDUAL, NARROW) for mode in mbconv.MODES),
    *((fused_mbconv, block, mode) for block in FUSED_SHAPES for mode in fused_mbconv.MODES),
    *((pointwise_conv_bn_act, s, s.role) for s in (EXPAND, PROJECT, GATED_RESIDUAL, UNGATED, HEAD)),
    *((squeeze_excite, EXCITE, mode) for mode in squeeze_excite.MODES),
    (batch_norm_act, SILU, "inference"),
    (batch_norm_act, SILU, "training"),
    (batch_norm_act, LINEAR, "inference+residual"),
    (batch_norm_act, LINEAR, "training+residual"),
]
IDS = [f"{suite.NAME.removeprefix('kernels-')}-{shape}-{mode}" for suite, shape, mode in PROBLEMS]

STAGE = ("weight", "bn_weight", "bn_bias")
EXCITE_NAMES = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")


@pytest.mark.parametrize(("suite", "shape", "mode"), PROBLEMS, ids=IDS)
def test_suite(suite: Any, shape: Any, mode: str) -> None:
    """Every mode: the peers and ours run, and ours is right.

    Whole blocks in inference run in bfloat16: in float32 eager, whose sums are shorter, is now and
    then more than twice as close.
    """
    whole = suite in (mbconv, fused_mbconv)
    dtype = torch.bfloat16 if whole and mode == "inference" else torch.float32
    match = suite.match(suite.Problem(shape, N, dtype, mode), CPU, only=["eager-nchw", "cpu"])
    rows = match.run(kinds=("warm",), seconds=0.001)
    assert [row.contender for row in rows] == ["eager", "eager-nchw", "cpu"]
    for row in rows:
        assert row.failed is None, row.failed
        assert not row.wrong, row
        assert row.speedups["warm"] > 0
        assert row.bytes == match.problem.bytes


@pytest.mark.parametrize(("suite", "shape", "mode"), PROBLEMS, ids=IDS)
def test_blocks_agree(suite: Any, shape: Any, mode: str) -> None:
    """Ours through its reference in PyTorch's own ops is the block of the peers, in float64."""
    problem = suite.Problem(shape, N, torch.float64, mode)
    theirs, ours = suite.Block(problem, CPU), suite.OurBlock(problem, CPU)
    ours.load_state_dict(theirs.state_dict())
    inputs = kernels.inputs_of(problem, CPU)
    results = []
    for block in (theirs, ours):
        block.double().prepare()
        with torch.set_grad_enabled(problem.training), use_backend("eager"):
            results.append(kernels.caller(block, None)(inputs))
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        # ours has sums and gates in float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folded(shape: shapes.FusedMbconv, dtype: torch.dtype) -> None:
    """The peer with BN folded is right in inference, and is none in training."""
    for mode in fused_mbconv.MODES:
        problem = fused_mbconv.Problem(shape, N, dtype, mode)
        rows = fused_mbconv.match(problem, CPU, only=["folded"]).check()
        names = ["eager"] if problem.training else ["eager", "folded"]
        assert [row.contender for row in rows] == names
        for row in rows:
            assert row.failed is None, row.failed
            assert not row.wrong, row


@pytest.mark.parametrize("folded", [fused_mbconv.FoldedBlock, fused_mbconv.CompiledFoldedBlock])
def test_folded_agrees(folded: type[fused_mbconv.FoldedBlock]) -> None:
    """With the block of the other peers, in float64; cuDNN's algorithms stay as they were set."""
    problem = fused_mbconv.Problem(FUSED_RESIDUAL, N, torch.float64, "inference")
    theirs, other = fused_mbconv.Block(problem, CPU), folded(problem, CPU)
    other.load_state_dict(theirs.state_dict())
    image = kernels.inputs_of(problem, CPU).image
    with torch.no_grad():
        other.double().prepare()
        before = image.clone()
        (result,) = other(image)
        torch.testing.assert_close(result, theirs.double()(image)[0])
    torch.testing.assert_close(image, before, rtol=0, atol=0)
    assert not torch.backends.cudnn.benchmark


def test_layouts() -> None:
    """The weights of a dense convolution have the layout that a contender is named by."""
    problem = fused_mbconv.Problem(FUSED, N, torch.float32, "inference")
    match = fused_mbconv.match(problem, CPU, only=["eager-nchw"])
    layouts = {"eager": torch.channels_last, "eager-nchw": torch.contiguous_format}
    with torch.no_grad():
        for contender in match.contenders:
            (result,) = contender.call(contender.inputs[0])
            assert result.is_contiguous(memory_format=layouts[contender.name]), contender.name


def test_gradients_of_fused_mbconv() -> None:
    """The input's and every parameter's, by name."""
    for shape, stages in ((FUSED, ("expand", "project")), (FUSED_ALONE, ("expand",))):
        problem = fused_mbconv.Problem(shape, N, torch.float32, "training")
        match = fused_mbconv.match(problem, CPU, only=[])
        named = {f"grad_{stage}_{name}" for stage in stages for name in STAGE}
        assert set(match.exact) == {"output", "grad_input", *named}


def test_gradients_of_mbconv() -> None:
    """The input's and every parameter's, by name."""
    problem = mbconv.Problem(RESIDUAL, N, torch.float32, "training")
    match = mbconv.match(problem, CPU, only=[])
    assert set(match.exact) == {
        "output", "grad_input",
        *(f"grad_{s}_{name}" for s in ("expand", "depthwise", "project") for name in STAGE),
        *(f"grad_excite_{name}" for name in EXCITE_NAMES),
    }  # fmt: skip


def test_bytes_of_mbconv() -> None:
    """Counted by hand, launch by launch, for float32."""
    x, e, d, y = (4 * N * c * s * s for c, s in ((16, 14), (64, 14), (64, 7), (24, 7)))
    problem = mbconv.Problem(WIDE, N, torch.float32, "inference")
    assert problem.bytes == (x + d) + (d + y)
    forward = (x + e) + e + (e + d) + d + 2 * d + (d + y) + y + 2 * y
    # BN of y; the product's two gradients; the gate; the depthwise stage; BN of e; the product's.
    backward = 5 * y + 2 * (y + d) + 4 * d + (4 * d + 2 * e) + 3 * e + 2 * (e + x)
    problem = mbconv.Problem(WIDE, N, torch.float32, "training")
    assert problem.bytes == forward + backward
    products = 14 * 14 * 16 * 64 + 7 * 7 * 64 * (3 * 3 + 24) + 2 * 64 * 4
    assert problem.flops == 3 * 2 * N * products

    x = y = 2 * N * 16 * 14 * 14
    e = d = 2 * N * 64 * 14 * 14
    problem = mbconv.Problem(RESIDUAL, N, torch.bfloat16, "inference")
    assert problem.bytes == (x + d) + (d + x + y)
    problem = mbconv.Problem(RESIDUAL, N, torch.bfloat16, "training")
    # The docstring's two sums.
    assert problem.bytes == (2 * x + 3 * e + 5 * d + 4 * y) + (7 * y + 10 * d + 7 * e + 3 * x)

    x, d, y = (4 * N * c * 14 * 14 for c in (32, 32, 16))
    problem = mbconv.Problem(NARROW, N, torch.float32, "inference")
    assert problem.bytes == (x + d) + (d + y)
    problem = mbconv.Problem(NARROW, N, torch.float32, "training")
    forward = (x + d) + d + 2 * d + (d + y) + y + 2 * y
    assert problem.bytes == forward + 5 * y + 2 * (y + d) + 4 * d + (4 * d + 2 * x)


def test_bytes_of_fused_mbconv() -> None:
    """Counted by hand, launch by launch, for float32."""
    x, e, y = (4 * N * c * s * s for c, s in ((16, 14), (64, 7), (24, 7)))
    problem = fused_mbconv.Problem(FUSED, N, torch.float32, "inference")
    assert problem.bytes == x + y
    products = 7 * 7 * 64 * (3 * 3 * 16 + 24)
    assert problem.flops == 2 * N * products
    forward = (x + e) + e + 2 * e + (e + y) + y + 2 * y
    # BN of y; the product's two gradients of e recomputed; BN of e; the convolution's two.
    backward = 5 * y + 2 * e + 2 * (y + e) + 5 * e + 2 * (e + x)
    problem = fused_mbconv.Problem(FUSED, N, torch.float32, "training")
    assert problem.bytes == forward + backward
    assert problem.flops == 3 * 2 * N * products

    x = y = 2 * N * 16 * 14 * 14
    problem = fused_mbconv.Problem(FUSED_RESIDUAL, N, torch.bfloat16, "inference")
    assert problem.bytes == 2 * x + y
    e = 2 * N * 64 * 14 * 14
    problem = fused_mbconv.Problem(FUSED_RESIDUAL, N, torch.bfloat16, "training")
    # The docstring's two sums.
    assert problem.bytes == (2 * x + 5 * e + 4 * y) + (7 * y + 11 * e + 5 * x)

    x = y = 4 * N * 24 * 14 * 14
    problem = fused_mbconv.Problem(FUSED_ALONE, N, torch.float32, "inference")
    assert problem.bytes == 2 * x + y
    assert problem.flops == 2 * N * 14 * 14 * 24 * 24 * 3 * 3
    problem = fused_mbconv.Problem(FUSED_ALONE, N, torch.float32, "training")
    assert problem.bytes == ((x + y) + y + 2 * y + x) + (5 * y + 2 * (y + x) + 3 * x)


@pytest.mark.parametrize(
    ("suite", "shape", "mode", "passes"),
    [
        (pointwise_conv_bn_act, EXPAND, "expand", (16 + 64) / 64),
        (pointwise_conv_bn_act, PROJECT, "project", (64 + 24) / 64),
        (pointwise_conv_bn_act, GATED_RESIDUAL, "project", (64 + 24 + 24) / 64),
        (squeeze_excite, EXCITE, "inference", 2),
        (squeeze_excite, EXCITE, "inference+pool", 3),
        (squeeze_excite, EXCITE, "training", 3 + 4),
        (batch_norm_act, SILU, "inference", 2),
        (batch_norm_act, LINEAR, "inference+residual", 3),
        (batch_norm_act, SILU, "training", 3 + 5),
        (batch_norm_act, LINEAR, "training+residual", 4 + 5),
    ],
)
def test_bytes(suite: Any, shape: Any, mode: str, passes: float) -> None:
    """In passes over 64 channels of 14x14."""
    problem = suite.Problem(shape, N, torch.bfloat16, mode)
    assert problem.bytes == passes * 2 * N * 64 * 14 * 14


def test_suites_are_complete() -> None:
    """What the command line needs of a suite, and that it offers them all."""
    assert tuple(command.SUITES) == main.SUITES
    for suite in command.SUITES.values():
        assert suite.NAME
        assert results.BASELINE in suite.PEERS
        if suite is not pointwise_conv_bn_act:
            assert set(suite.MODES) >= {"inference", "training"}
    assert len({suite.NAME for suite in command.SUITES.values()}) == len(command.SUITES)


def test_problems() -> None:
    """Each shape of a model once in each mode that it belongs to."""
    for suite, table, model in (
        (depthwise_conv_bn_act, shapes.depthwise_shapes, MODEL),
        (mbconv, shapes.mbconv_shapes, MODEL),
        (fused_mbconv, shapes.fused_mbconv_shapes, "efficientnetv2_s@384"),
        (pointwise_conv_bn_act, shapes.pointwise_shapes, MODEL),
        (squeeze_excite, shapes.squeeze_excite_shapes, MODEL),
        (batch_norm_act, shapes.norm_shapes, MODEL),
    ):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser, suite)
        arguments = parser.parse_args(["--models", model, "--batch", "2"])
        arguments.dtypes = [torch.float32]
        problems = list(suite.problems(arguments))
        of_mode = {mode: [p.shape for p in problems if p.mode == mode] for mode in suite.MODES}
        assert all(of_mode.values())
        repeats = 1 if suite is pointwise_conv_bn_act else len(suite.MODES)
        repeats = 2 if suite is batch_norm_act else repeats
        assert len(problems) == repeats * len(table(model))
        assert set().union(*of_mode.values()) == set(table(model))
