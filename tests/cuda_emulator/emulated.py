"""The tests that run inside the emulator's process; test_emulator.py starts it with pytest.

The ops are those of ``effnet_kernels.ops`` as they run on CUDA tensors, registered for CPU tensors.
The launchers see few multiprocessors or many, so that blocks walk through several images or images
are cut into many blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import os
import random

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from ops.block_cases import Case as MbconvCase
from ops.depthwise_cases import CASES, Case, make_arguments, run
from ops.test_batch_norm_act import CASES as BATCH_NORM_ACT_CASES
from ops.test_batch_norm_act import (
    FUNCTION_CASES,
    FunctionCase,
    call_functions,
    check_functions,
    make_function_tensors,
)
from ops.test_batch_norm_act import Case as BatchNormActCase
from ops.test_batch_norm_act import check as check_batch_norm_act
from ops.test_depthwise_conv_bn_act import check
from ops.test_mbconv import CASES as MBCONV_CASES
from ops.test_mbconv import check as check_mbconv
from ops.test_mbconv_train import CASES as MBCONV_TRAIN_CASES
from ops.test_mbconv_train import check as check_mbconv_train
from ops.test_pointwise_conv_bn_act import CASES as POINTWISE_CASES
from ops.test_pointwise_conv_bn_act import Case as PointwiseCase
from ops.test_pointwise_conv_bn_act import check as check_pointwise
from ops.test_pointwise_conv_bn_act import make_arguments as make_pointwise_arguments
from ops.test_pointwise_conv_bn_act import run as run_pointwise
from ops.test_squeeze_excite import CASES as SQUEEZE_EXCITE_CASES
from ops.test_squeeze_excite import Case as SqueezeExciteCase
from ops.test_squeeze_excite import check as check_squeeze_excite
from ops.test_squeeze_excite import make_tensors
from ops.test_squeeze_excite import run as run_squeeze_excite
from ops.test_squeeze_excite import test_gate_is_the_gate as check_gate

from effnet_kernels import backends
from effnet_kernels.activations import Activation
from effnet_kernels.ops import ConvBn, SqueezeExcite, library
from effnet_kernels.ops.block import pointwise as pointwise_of_block
from effnet_kernels.ops.mbconv_cost import fuse_expand

op = importlib.import_module("effnet_kernels.ops.depthwise_conv_bn_act")
batch_norm_act = importlib.import_module("effnet_kernels.ops.batch_norm_act")
fused_mbconv = importlib.import_module("effnet_kernels.ops.fused_mbconv")
mbconv = importlib.import_module("effnet_kernels.ops.mbconv")
mbconv_train = importlib.import_module("effnet_kernels.ops.mbconv_train")
pointwise = importlib.import_module("effnet_kernels.ops.pointwise_conv_bn_act")
squeeze_excite = importlib.import_module("effnet_kernels.ops.squeeze_excite")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

torch.ops.load_library(os.environ["CUDA_EMULATOR_LIBRARY"])
backends._cpp_kernel = lambda name: getattr(torch.ops.effnet_kernels_emulator, name).default
_ON_CPU = torch.library.Library("effnet_kernels", "IMPL")
for _name, _implementation in (
    (op.OP, op._inference), (f"{op.OP}_train", op._train), (f"{op.OP}_backward", op._backward),
    (batch_norm_act.OP, batch_norm_act._forward),
    (f"{batch_norm_act.OP}_backward", batch_norm_act._backward),
    (fused_mbconv.OP, fused_mbconv._inference), (mbconv.OP, mbconv._inference),
    (pointwise.OP, pointwise._inference),
    (mbconv_train.OP, mbconv_train._forward),
    (f"{mbconv_train.OP}_backward", mbconv_train._backward),
    (squeeze_excite.OP, squeeze_excite._forward),
    (f"{squeeze_excite.OP}_backward", squeeze_excite._backward),
    (f"{squeeze_excite.OP}_gate", squeeze_excite._gate),
):  # fmt: skip
    _ON_CPU.impl(
        _name, functools.partial(_implementation, backends.CUDA.name), "CPU", allow_override=True
    )
    # All calls go through the dispatcher, whose implementation that now is.
    library.OPS[_name][backends.CPU.name] = getattr(torch.ops.effnet_kernels, _name).default


@pytest.fixture(params=[1, 132], ids="multiprocessors{}".format)
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many the launchers cut the work for."""
    monkeypatch.setenv("CUDA_EMULATOR_MULTIPROCESSORS", str(request.param))
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case: Case, dtype: torch.dtype) -> None:
    """Results and gradients are at most 2x and 3x eager's own error from float64."""
    check(case, dtype, "cpu")


SHAPES = [
    Case(
        {1: 40, 7: 4, 33: 1}[size[0]],
        channels,
        *size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        training=True,
        pool=True,
        prologue="silu",
    )
    for (kernel, stride, size), channels, padding in zip(
        itertools.product((3, 5, 7), (1, 2), ((1, 1), (7, 7), (33, 17))),
        itertools.cycle((8, 13, 96, 24)),
        itertools.cycle(("same", (2, 1, 0, 2), (1, 1, 1, 1))),
        strict=False,
    )
    if padding == "same" or min(size) + 2 >= kernel
]


@pytest.mark.parametrize(
    ("case", "dtype"), [*zip(SHAPES, itertools.cycle(DTYPES), strict=False)], ids=str
)
def test_shapes(case: Case, dtype: torch.dtype, multiprocessors: int) -> None:
    """Kernel sizes, strides, extents and asymmetric padding."""
    check(case, dtype, "cpu")


@pytest.mark.parametrize("case", CASES[2:6], ids=str)
def test_small_shared_memory(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices with 100 KB of shared memory run the kernels that fit them."""
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_BYTES", str(100 * 1024))
    check(case, torch.bfloat16, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_and_mixed(dtype: torch.dtype) -> None:
    """Tensors that begin between two 16-byte boundaries; BN vectors of different dtypes."""
    case = Case(2, 24, 9, 6, kernel=5, prologue="silu", pool=True)
    arguments = make_arguments(case, dtype, "cpu")
    aligned = arguments.input
    storage = torch.empty(aligned.numel() + 1, dtype=dtype)
    image = storage[1:].view(2, 9, 6, 24).permute(0, 3, 1, 2)
    image.copy_(aligned)
    assert image.is_contiguous(memory_format=torch.channels_last) and image.data_ptr() % 16
    assert arguments.bn_bias is not None
    arguments = dataclasses.replace(
        arguments,
        input=image,
        running_mean=arguments.running_mean.to(dtype),
        bn_bias=arguments.bn_bias.to(dtype),
    )
    ours = run(case, arguments, "cpu")
    # Eager batch_norm takes vectors of one dtype only; these have the same values.
    eager = run(
        case,
        dataclasses.replace(
            arguments,
            running_mean=arguments.running_mean.float(),
            bn_bias=arguments.bn_bias.float(),
        ),
        "eager",
    )
    exact = run(case, arguments, "eager", double=True)
    for name, result in ours.items():
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_error_rule(name, result, eager[name], exact[name], result.dtype, factor)


def test_deterministic(multiprocessors: int) -> None:
    """The same bits, whatever the order of blocks and threads."""
    case = Case(5, 40, 13, 11, kernel=5, training=True, pool=True, prologue="silu")
    arguments = make_arguments(case, torch.bfloat16, "cpu")
    first, second = (run(case, arguments, "cpu") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_training_without_output() -> None:
    """Where the activation is another kernel's: the same convolution and statistics."""
    case = Case(3, 24, 9, 7, training=True, padding=1)
    arguments = make_arguments(case, torch.bfloat16, "cpu")
    results = []
    for whole in (True, False):
        conv, output = (torch.full_like(arguments.input, torch.nan) for _ in range(2))
        mean, var = (torch.full((24,), torch.nan) for _ in range(2))
        with torch.no_grad():
            torch.ops.effnet_kernels_emulator.depthwise_conv_bn_act_train_out(
                arguments.input, arguments.weight, arguments.bn_weight, arguments.bn_bias, 1e-5,
                1, 1, 1, 3, None, None, 0, True, conv, mean, var, output if whole else None, None,
            )  # fmt: skip
        assert torch.isfinite(output).all() == whole
        results.append((conv, mean, var))
    for expected, result in zip(*results, strict=True):
        assert torch.isfinite(result).all() and torch.equal(result, expected)


def test_large_mean() -> None:
    """Batch statistics keep their digits when the mean is a thousand standard deviations."""
    case = Case(3, 8, 12, 9, training=True, padding=0, activation="identity", mean=1000.0)
    arguments = make_arguments(case, torch.float32, "cpu")
    arguments = dataclasses.replace(arguments, weight=arguments.weight.abs())
    ours, exact = run(case, arguments, "cpu"), run(case, arguments, "eager", double=True)
    torch.testing.assert_close(ours["batch_var"].double(), exact["batch_var"], rtol=1e-4, atol=0)


def test_float64_is_refused() -> None:
    """An error, not a wrong result."""
    case = Case(1, 8, 6, 6)
    arguments = make_arguments(case, torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        run(case, arguments, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SQUEEZE_EXCITE_CASES, ids=str)
def test_squeeze_excite_error_rule(case: SqueezeExciteCase, dtype: torch.dtype) -> None:
    """As for the depthwise op."""
    check_squeeze_excite(case, dtype, "cpu")


_draw = random.Random(0).choice
# Every channel count with every squeezed one, the options drawn.
SQUEEZE_EXCITE_SHAPES = [
    SqueezeExciteCase(
        _draw((1, 3)),
        channels,
        squeezed,
        *_draw(((1, 1), (7, 7), (9, 5))),
        activation=_draw(("relu", "silu", "hardswish")),
        gate=_draw(("sigmoid", "hardsigmoid")),
        pooled=_draw((False, True)),
        biases=_draw((False, True)),
        weight_dtype=_draw((None, torch.float32)),
    )
    for channels, squeezed in itertools.product((8, 13, 24, 96, 1152), (1, 4, 6, 48))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SQUEEZE_EXCITE_SHAPES, ids=str)
def test_squeeze_excite_shapes(
    case: SqueezeExciteCase, dtype: torch.dtype, multiprocessors: int
) -> None:
    """Extents that allow 16-byte loads in one matrix, in both or in none."""
    check_squeeze_excite(case, dtype, "cpu")


@pytest.mark.parametrize(
    "case",
    [
        SqueezeExciteCase(130, 40, 20, 2, 1),  # more images than a block stages together
        SqueezeExciteCase(2, 2072, 40, 2, 2),  # columns in several turns of a block's lanes
        SqueezeExciteCase(1, 24, 600, 3, 3),  # more squeezed values than threads
        SqueezeExciteCase(1, 8, 13000, 1, 1),  # and more shared memory than 48 KB
    ],
    ids=str,
)
def test_squeeze_excite_beyond_a_block(case: SqueezeExciteCase) -> None:
    """Extents that a block takes in several turns."""
    check_squeeze_excite(case, torch.float32, "cpu")


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and strides, beginning between two 16-byte boundaries."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    result = storage[1:].as_strided(tensor.shape, tensor.stride())
    assert result.data_ptr() % 16
    return result.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze_excite_unaligned(dtype: torch.dtype) -> None:
    """Tensors that begin between two 16-byte boundaries give what aligned ones give."""
    case = SqueezeExciteCase(2, 24, 8, 5, 4, pooled=True)
    tensors = make_tensors(case, dtype, "cpu")
    gradient, image, pooled, *weights = (
        tensors[name]
        for name in (
            "grad_output", "input", "pooled",
            "reduce_weight", "reduce_bias", "expand_weight", "expand_bias",
        )
    )  # fmt: skip
    results = []
    for move in (lambda t: t, shifted):
        output, _, hidden, gate = squeeze_excite._forward(
            backends.CUDA.name, move(image), move(pooled), *map(move, weights), 3, 5
        )
        grads = squeeze_excite._backward(
            backends.CUDA.name, move(gradient), move(image), move(pooled), True, move(hidden),
            move(gate), move(weights[0]), move(weights[2]), 3, 5,
        )  # fmt: skip
        results.append((output, gate, *grads))
    for aligned, unaligned in zip(*results, strict=True):
        torch.testing.assert_close(unaligned, aligned)


def test_squeeze_excite_deterministic(multiprocessors: int) -> None:
    """The same bits, whatever the order of blocks and threads."""
    case = SqueezeExciteCase(5, 40, 10, 13, 11)
    tensors = make_tensors(case, torch.bfloat16, "cpu")
    first, second = (run_squeeze_excite(case, tensors, "cpu") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_squeeze_excite_gate() -> None:
    """The gate alone is the one that the image is scaled by."""
    check_gate("cpu")


def test_squeeze_excite_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, not wrong results: float64; hidden values beyond the shared memory."""
    case = SqueezeExciteCase(1, 8, 2, 6, 6)
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        run_squeeze_excite(case, make_tensors(case, torch.float64, "cpu"), "cpu")
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_BYTES", str(100 * 1024))
    case = SqueezeExciteCase(1, 1, 25345, 1, 1)
    with pytest.raises(RuntimeError, match=r"reduce_weight.size\(0\) must be at most 25344"):
        run_squeeze_excite(case, make_tensors(case, torch.float32, "cpu"), "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", POINTWISE_CASES, ids=str)
def test_pointwise_error_rule(
    case: PointwiseCase, dtype: torch.dtype, multiprocessors: int
) -> None:
    """As for the depthwise op; few multiprocessors are given the large tiles."""
    check_pointwise(case, dtype, "cpu")


WIDE_CASES = [
    PointwiseCase(1, 16, 96, 17, 19),
    PointwiseCase(2, 24, 144, 17, 19, "relu6"),
    PointwiseCase(3, 40, 240, 11, 13, "hardswish", affine=False),
    PointwiseCase(1, 96, 136, 16, 16, "sigmoid"),
    PointwiseCase(3, 80, 480, 14, 14),
    PointwiseCase(1, 72, 80, 31, 33, "identity"),
    PointwiseCase(2, 8, 16, 16, 16),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
@pytest.mark.parametrize("shared", [100, 228])
def test_pointwise_expand(
    case: PointwiseCase, dtype: torch.dtype, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From few channels to many, with rows enough for the kernel that keeps its weights."""
    monkeypatch.setenv("CUDA_EMULATOR_MULTIPROCESSORS", "1")
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_BYTES", str(shared * 1024))
    check_pointwise(case, dtype, "cpu")


_draw = random.Random(1).choice
# Chunks of channels with tiles of features, ragged ones among them, the options drawn.
POINTWISE_SHAPES = [
    PointwiseCase(
        _draw((1, 2, 3)),
        channels,
        features,
        *_draw(((1, 1), (7, 7), (13, 11), (1, 129))),
        activation=_draw(("identity", "relu6", "silu", "hardswish")),
        prologue=_draw((None, "identity", "silu", "hardswish")),
        gate=_draw((False, True)),
        residual=_draw((False, True)),
        pool=_draw((False, True)),
    )
    for channels, features in itertools.product((1, 8, 31, 64, 72, 136, 200), (3, 8, 24, 80, 130))
]


@pytest.mark.parametrize(
    ("case", "dtype"), [*zip(POINTWISE_SHAPES, itertools.cycle(DTYPES), strict=False)], ids=str
)
def test_pointwise_shapes(case: PointwiseCase, dtype: torch.dtype, multiprocessors: int) -> None:
    """One chunk of channels, as many as there are stages, and more; tiles that are not full."""
    check_pointwise(case, dtype, "cpu")


# Few pixels, whose channels the warps of a block split: whole images and parts of several in a
# tile, a single pixel an image, fewer steps than warps, no number of steps that all have alike,
# features of several tiles and less than one.
FEW_PIXELS = [
    PointwiseCase(1, 672, 40, 7, 7, "identity", gate=True, residual=True),
    PointwiseCase(3, 360, 24, 5, 3, "identity", gate=True, residual=True, pool=True),
    PointwiseCase(20, 136, 72, 1, 1, gate=True),
    PointwiseCase(3, 96, 16, 23, 29, "relu6", gate=True, residual=True),
    PointwiseCase(2, 16, 200, 9, 9, "hardswish", residual=True, pool=True),
    PointwiseCase(1, 8, 8, 1, 1, residual=True),
    PointwiseCase(3, 117, 35, 5, 4, "identity", gate=True, residual=True, pool=True),
    PointwiseCase(1, 40, 21, 11, 13, gate=True),
    PointwiseCase(4, 1200, 24, 2, 2, gate=True, residual=True),  # gates beyond a block's memory
]


@pytest.mark.parametrize("multiprocessors", [8, 40, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW_PIXELS, ids=str)
def test_pointwise_few_pixels(
    case: PointwiseCase, dtype: torch.dtype, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More multiprocessors, and fewer warps share channels or fewer features are in a tile."""
    monkeypatch.setenv("CUDA_EMULATOR_MULTIPROCESSORS", str(multiprocessors))
    check_pointwise(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_small_shared_memory(
    dtype: torch.dtype, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices with 100 KB of shared memory run it with fewer stages."""
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_BYTES", str(100 * 1024))
    case = PointwiseCase(2, 240, 96, 9, 9, prologue="silu", gate=True, residual=True, pool=True)
    check_pointwise(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["input", "weight", "gate", "residual"])
@pytest.mark.parametrize("prologue", [None, "silu"])
def test_pointwise_unaligned(name: str, prologue: str | None, dtype: torch.dtype) -> None:
    """A tensor that begins between two 16-byte boundaries changes no bit."""
    case = PointwiseCase(2, 72, 40, 9, 6, prologue=prologue, gate=True, residual=True, pool=True)
    arguments = make_pointwise_arguments(case, dtype, "cpu")
    arguments["weight"] = arguments["weight"].flatten(1)
    aligned = run_pointwise(arguments, "cpu")
    unaligned = run_pointwise({**arguments, name: shifted(arguments[name])}, "cpu")
    for result, expected in zip(unaligned.values(), aligned.values(), strict=True):
        assert torch.equal(result, expected)


def test_pointwise_deterministic(multiprocessors: int) -> None:
    """The same bits, whatever the order of blocks and threads."""
    case = PointwiseCase(2, 72, 80, 15, 19, gate=True, residual=True, pool=True)
    arguments = make_pointwise_arguments(case, torch.bfloat16, "cpu")
    first, second = (run_pointwise(arguments, "cpu") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_pointwise_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands are rounded to TF32 where that is allowed, and are exact where it is not."""
    case = PointwiseCase(2, 136, 80, 9, 9)
    arguments = make_pointwise_arguments(case, torch.float32, "cpu")
    expected = run_pointwise(arguments, "eager")["output"]
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(pointwise, "allows_tf32", lambda _, allowed=allowed: allowed)
        result = run_pointwise(arguments, "cpu")["output"]
        errors.append((result - expected).abs().max().item() / expected.abs().max().item())
    assert errors[0] < 1e-6 and 1e-5 < errors[1] < 1e-3


def test_pointwise_float64_is_refused() -> None:
    """An error, not a wrong result."""
    arguments = make_pointwise_arguments(POINTWISE_CASES[0], torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        run_pointwise(arguments, "cpu")


@dataclasses.dataclass(frozen=True)
class ExpandCase:
    """One call of the first half of MBConv; ``pads``: top, left, bottom, right."""

    batch: int
    channels: int
    expanded: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    expand_activation: str = "silu"
    activation: str = "silu"
    pool: bool = True

    def __str__(self) -> str:
        return (
            f"{self.batch}x{self.channels}x{self.height}x{self.width}-e{self.expanded}"
            f"-{self.kernel}x{self.kernel}-stride{self.stride}-pads{'.'.join(map(str, self.pads))}"
            f"-{self.expand_activation}-{self.activation}{'-pool' if self.pool else ''}"
        )


def make_expand_arguments(case: ExpandCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The call's tensors by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    c, e, k = case.channels, case.expanded, case.kernel
    tensors = {
        "input": random(case.batch, c, case.height, case.width)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last),
        "expand_weight": (random(e, c) / c**0.5).to(dtype),
        "weight": (random(e, 1, k, k) / k).to(dtype),
    }
    for prefix in ("expand_", ""):
        tensors |= {
            f"{prefix}mean": (random(e) * 0.1).float(),
            f"{prefix}var": (random(e).abs() + 0.5).float(),
            f"{prefix}bn_weight": (random(e).abs() + 0.5).float(),
            f"{prefix}bn_bias": (random(e) * 0.3).float(),
        }
    return tensors


def run_expand(
    case: ExpandCase, tensors: dict[str, torch.Tensor], allow_tf32: bool = False
) -> dict[str, torch.Tensor]:
    """The kernel's results by name, in tensors that were NaN before."""
    t, (top, left, bottom, right) = tensors, case.pads
    size = [
        (extent + before + after - case.kernel) // case.stride + 1
        for extent, before, after in ((case.height, top, bottom), (case.width, left, right))
    ]
    output = torch.full((case.batch, case.expanded, *size), torch.nan, dtype=t["input"].dtype)
    output = output.contiguous(memory_format=torch.channels_last)
    pooled = torch.full((case.batch, case.expanded), torch.nan) if case.pool else None
    torch.ops.effnet_kernels_emulator.expand_depthwise_out(
        t["input"], t["expand_weight"], t["expand_mean"], t["expand_var"], t["expand_bn_weight"],
        t["expand_bn_bias"], 1e-3, int(Activation[case.expand_activation]),
        t["weight"], t["mean"], t["var"], t["bn_weight"], t["bn_bias"], 1e-5,
        case.stride, top, left, int(Activation[case.activation]), allow_tf32, output, pooled,
    )  # fmt: skip
    return {"output": output} if pooled is None else {"output": output, "pooled": pooled}


def expand_reference(case: ExpandCase, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in PyTorch's own ops."""
    t = tensors
    x = pointwise.reference(
        t["input"], t["expand_weight"], t["expand_mean"], t["expand_var"], t["expand_bn_weight"],
        t["expand_bn_bias"], 1e-3, case.expand_activation, prologue=None, gate=None,
        residual=None, pool=False,
    ).output  # fmt: skip
    y = op.reference(
        x, t["weight"], t["mean"], t["var"], t["bn_weight"], t["bn_bias"], case.stride, case.pads,
        False, 1e-5, case.activation, pool=case.pool, prologue=None,
    )  # fmt: skip
    return {"output": y.output, "pooled": y.pooled} if case.pool else {"output": y.output}


def check_expand(case: ExpandCase, dtype: torch.dtype) -> None:
    """Results are at most 2x eager's own error from float64."""
    tensors = make_expand_arguments(case, dtype)
    ours, eager = run_expand(case, tensors), expand_reference(case, tensors)
    exact = expand_reference(case, {name: tensor.double() for name, tensor in tensors.items()})
    for name, result in ours.items():
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], result.dtype, FORWARD
        )


_draw = random.Random(2).choice
EXPAND_CASES = [
    ExpandCase(
        1 if size[0] > 14 else _draw((1, 3, 5)),
        channels,
        expanded,
        *size,
        kernel,
        stride,
        pads,
        expand_activation=_draw(("silu", "relu6", "hardswish", "identity")),
        activation=_draw(("silu", "relu", "sigmoid")),
        pool=_draw((True, True, False)),
    )
    for (kernel, stride, size), (channels, expanded), pads in zip(
        itertools.product((3, 5, 7), (1, 2), ((7, 7), (14, 14), (33, 17), (3, 2), (1, 5))),
        itertools.cycle(((8, 48), (13, 29), (72, 96), (16, 64), (3, 7), (200, 40), (24, 130))),
        itertools.cycle(((2, 3, 2, 2), (3, 2, 3, 3), (2, 2, 2, 3))),
        strict=False,
    )
    for pads in [tuple(min(pad, kernel - 1) for pad in pads)]
    if min(size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3]) >= kernel
]


@pytest.mark.parametrize(
    ("case", "dtype"), [*zip(EXPAND_CASES, itertools.cycle(DTYPES), strict=False)], ids=str
)
def test_expand_depthwise(case: ExpandCase, dtype: torch.dtype) -> None:
    """Kernel sizes, strides, extents, asymmetric padding; whole vectors of channels and others."""
    check_expand(case, dtype)


@pytest.mark.parametrize("shared", [100, 228], ids="{}KB".format)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (ExpandCase(1, 24, 80, 33, 29, 5, 1, (2, 2, 2, 2)), torch.bfloat16),
        (ExpandCase(1, 24, 40, 41, 37, 5, 2, (1, 1, 2, 2)), torch.float32),
        (ExpandCase(6, 8, 16, 4, 4), torch.float16),
        (ExpandCase(2, 136, 48, 10, 10, 7, 1, (3, 3, 3, 3)), torch.bfloat16),
    ],
    ids=str,
)
def test_expand_depthwise_tiles(
    case: ExpandCase,
    dtype: torch.dtype,
    shared: int,
    multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large tiles and small ones, of several images, as the device suggests them."""
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_BYTES", str(shared * 1024))
    check_expand(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["input", "expand_weight", "weight"])
def test_expand_depthwise_unaligned(name: str, dtype: torch.dtype) -> None:
    """A tensor that begins between two 16-byte boundaries changes no bit."""
    case = ExpandCase(2, 24, 40, 9, 7)
    tensors = make_expand_arguments(case, dtype)
    aligned = run_expand(case, tensors)
    unaligned = run_expand(case, {**tensors, name: shifted(tensors[name])})
    for result, expected in zip(unaligned.values(), aligned.values(), strict=True):
        assert torch.equal(result, expected)


def test_expand_depthwise_deterministic(multiprocessors: int) -> None:
    """The same bits, whatever the order of blocks and threads."""
    case = ExpandCase(2, 24, 80, 21, 19)
    tensors = make_expand_arguments(case, torch.bfloat16)
    first, second = (run_expand(case, tensors) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_expand_depthwise_tf32() -> None:
    """Operands are rounded to TF32 where that is allowed, and are exact where it is not."""
    case = ExpandCase(1, 136, 40, 7, 7)
    tensors = make_expand_arguments(case, torch.float32)
    expected = expand_reference(case, tensors)["output"]
    errors = [
        (run_expand(case, tensors, allowed)["output"] - expected).abs().max().item()
        / expected.abs().max().item()
        for allowed in (False, True)
    ]
    assert errors[0] < 2e-6 and 2e-5 < errors[1] < 2e-3


def test_expand_depthwise_float64_is_refused() -> None:
    """An error, not a wrong result."""
    case = ExpandCase(1, 8, 16, 5, 5, pool=False)
    tensors = make_expand_arguments(case, torch.float64)
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        run_expand(case, {name: tensor.double() for name, tensor in tensors.items()})


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MBCONV_CASES, ids=str)
def test_mbconv_error_rule(case: MbconvCase, dtype: torch.dtype, fused: bool) -> None:
    """The block as a whole, with the expansion in the depthwise convolution's launch or before."""
    with fuse_expand(fused):
        check_mbconv(case, dtype, "cpu")


@dataclasses.dataclass(frozen=True)
class FusedCase:
    """One call of the Fused-MBConv kernel; ``features`` 0: no second product."""

    batch: int
    channels: int
    middle: int
    features: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    residual: bool = False
    pool: bool = False
    expand_activation: str = "silu"
    activation: str = "identity"

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            f"m{self.middle}",
            f"k{self.features}",
            f"{self.kernel}x{self.kernel}",
            f"stride{self.stride}",
            f"pads{'.'.join(map(str, self.pads))}",
            self.expand_activation,
            self.activation,
        ]
        words += ["residual"] if self.residual else []
        words += ["pool"] if self.pool else []
        return "-".join(words)

    @property
    def size(self) -> tuple[int, int]:
        """(OH, OW)."""
        top, left, bottom, right = self.pads
        return (
            (self.height + top + bottom - self.kernel) // self.stride + 1,
            (self.width + left + right - self.kernel) // self.stride + 1,
        )


def make_fused_arguments(case: FusedCase, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The call's tensors by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def image(*shape: int) -> torch.Tensor:
        return random(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    c, m, features, k = case.channels, case.middle, case.features, case.kernel
    tensors = {
        "input": image(case.batch, c, case.height, case.width),
        "expand_weight": image(m, c, k, k) / (c**0.5 * k),
    }
    if features:
        tensors["project_weight"] = (random(features, m) / m**0.5).to(dtype)
    if case.residual:
        tensors["residual"] = image(case.batch, features or m, *case.size)
    for prefix, channels in (("expand", m), ("project", features)):
        if channels:
            tensors |= {
                f"{prefix}_mean": (random(channels) * 0.1).float(),
                f"{prefix}_var": (random(channels).abs() + 0.5).float(),
                f"{prefix}_bn_weight": (random(channels).abs() + 0.5).float(),
                f"{prefix}_bn_bias": (random(channels) * 0.3).float(),
            }
    return tensors


def run_fused(
    case: FusedCase, tensors: dict[str, torch.Tensor], allow_tf32: bool = False
) -> dict[str, torch.Tensor]:
    """The kernel's results by name, in tensors that were NaN before."""
    channels = case.features or case.middle
    output = torch.full((case.batch, channels, *case.size), torch.nan, dtype=tensors["input"].dtype)
    output = output.contiguous(memory_format=torch.channels_last)
    pooled = torch.full((case.batch, case.middle), torch.nan) if case.pool else None

    def bn(prefix: str) -> list[torch.Tensor | None]:
        names = ("mean", "var", "bn_weight", "bn_bias")
        return [tensors.get(f"{prefix}_{name}") for name in names]

    torch.ops.effnet_kernels_emulator.fused_mbconv_out(
        tensors["input"], tensors["expand_weight"], *bn("expand"), 1e-3,
        int(Activation[case.expand_activation]), case.stride, *case.pads[:2],
        tensors.get("project_weight"), *bn("project"), 1e-5, int(Activation[case.activation]),
        tensors.get("residual"), allow_tf32, output, pooled,
    )  # fmt: skip
    return {"output": output} if pooled is None else {"output": output, "pooled": pooled}


def fused_reference(case: FusedCase, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same in PyTorch's own ops."""

    def conv_bn(weight: str, prefix: str, eps: float, activation: str) -> ConvBn:
        names = ("mean", "var", "bn_weight", "bn_bias")
        return ConvBn(
            tensors[weight], *(tensors[f"{prefix}_{name}"] for name in names), eps, activation
        )

    z = fused_mbconv.reference(
        tensors["input"], conv_bn("expand_weight", "expand", 1e-3, case.expand_activation),
        None, None, case.stride, case.pads, residual=False,
    )  # fmt: skip
    y = z
    if case.features:
        y = pointwise_of_block(z, conv_bn("project_weight", "project", 1e-5, case.activation))
    if case.residual:
        y = y + tensors["residual"]
    if not case.pool:
        return {"output": y}
    return {"output": y, "pooled": z.to(torch.promote_types(z.dtype, torch.float32)).sum((2, 3))}


def check_fused(case: FusedCase, dtype: torch.dtype) -> None:
    """Results are at most 2x eager's own error from float64."""
    tensors = make_fused_arguments(case, dtype)
    ours, eager = run_fused(case, tensors), fused_reference(case, tensors)
    exact = fused_reference(case, {name: tensor.double() for name, tensor in tensors.items()})
    for name, result in ours.items():
        assert_error_rule(
            f"{name} of {case}", result, eager[name], exact[name], result.dtype, FORWARD
        )


_draw = random.Random(4).choice
# Kernel sizes, strides and padding with whole vectors of channels and others, one group of middle
# channels and several, and output channels of each number of fragments.
FUSED_CASES = [
    FusedCase(
        1 if size[0] > 9 else _draw((1, 2)),
        *channels,
        *size,
        kernel,
        stride,
        pads,
        residual=_draw((True, False)),
        pool=channels[2] == 0 and _draw((True, True, False)),
        expand_activation=_draw(("silu", "relu", "relu6", "hardswish", "identity", "sigmoid")),
        activation=_draw(("identity", "identity", "silu")),
    )
    for (kernel, stride, size), channels, pads in zip(
        itertools.product((3, 5, 7), (1, 2), ((9, 11), (21, 18), (5, 3), (2, 20))),
        itertools.cycle(
            ((24, 96, 24), (16, 200, 40), (13, 29, 11), (24, 24, 0), (8, 72, 90), (5, 130, 0))
        ),
        itertools.cycle(((1, 1, 1, 1), (0, 1, 2, 1), (2, 1, 3, 0))),
        strict=False,
    )
    for pads in [tuple(min(pad, kernel - 1) for pad in pads)]
    if min(size[0] + pads[0] + pads[2], size[1] + pads[1] + pads[3]) >= kernel
]


@pytest.mark.parametrize(
    ("case", "dtype"), [*zip(FUSED_CASES, itertools.cycle(DTYPES), strict=False)], ids=str
)
def test_fused_mbconv_shapes(case: FusedCase, dtype: torch.dtype, multiprocessors: int) -> None:
    """Tiles for throughput and for few pixels; see FUSED_CASES."""
    check_fused(case, dtype)


@pytest.mark.parametrize("shared", [60, 228], ids="{}KB".format)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        # The input's channels in slices, where there is little shared memory.
        (FusedCase(1, 1032, 72, 16, 4, 4, residual=True), torch.bfloat16),
        (FusedCase(1, 1043, 24, 9, 5, 4), torch.float16),
        (FusedCase(1, 264, 40, 0, 5, 7, pool=True), torch.float32),
        # Several images, the last tile with fewer.
        (FusedCase(11, 8, 24, 8, 4, 4, residual=True), torch.bfloat16),
        (FusedCase(5, 16, 40, 0, 5, 3, stride=2, residual=True), torch.float16),
        # Output channels in parts; constants of middle channels in turn.
        (FusedCase(1, 16, 72, 200, 9, 7), torch.float16),
        (FusedCase(1, 3, 1100, 20, 4, 3), torch.bfloat16),
        (FusedCase(1, 3, 1100, 0, 4, 3, pool=True), torch.float32),
    ],
    ids=str,
)
def test_fused_mbconv_tiles(
    case: FusedCase,
    dtype: torch.dtype,
    shared: int,
    multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What does not fit a block at once, as the device has room for it."""
    monkeypatch.setenv("CUDA_EMULATOR_SHARED_BYTES", str(shared * 1024))
    check_fused(case, dtype)


# The dense convolution alone. Stems: rows of an image of 2, 4, 8 and 16 times some bytes, windows
# that begin with odd elements and with even ones, one to four parts of the output channels. Then
# vectors of channels, an odd number of them and others, at one tap and at two in a step.
DENSE_CASES = [
    FusedCase(1, 3, 32, 0, 17, 19, stride=2),
    FusedCase(3, 3, 24, 0, 17, 18, stride=2, pads=(0, 0, 1, 1)),
    FusedCase(3, 3, 40, 0, 18, 20, stride=2, expand_activation="hardswish"),
    FusedCase(1, 3, 48, 0, 16, 16, stride=2, pads=(0, 0, 1, 1), residual=True),
    FusedCase(2, 3, 72, 0, 33, 64, stride=2, expand_activation="relu6"),
    FusedCase(1, 3, 104, 0, 9, 8, stride=2, pads=(2, 2, 0, 1), residual=True),
    FusedCase(1, 3, 13, 0, 9, 8, stride=2),
    FusedCase(1, 3, 32, 0, 9, 8),
    FusedCase(5, 3, 32, 0, 3, 4, stride=2),
    FusedCase(2, 1, 32, 0, 17, 19, stride=2),
    FusedCase(1, 1, 16, 0, 19, 16, 5, 2, (2, 2, 2, 2)),
    FusedCase(1, 2, 24, 0, 11, 10, residual=True),
    FusedCase(2, 4, 24, 0, 9, 8, stride=2),
    FusedCase(2, 5, 40, 0, 9, 8, stride=2),
    FusedCase(3, 24, 24, 0, 17, 19, residual=True),
    FusedCase(1, 24, 48, 0, 9, 12, stride=2, pads=(0, 0, 1, 1)),
    FusedCase(2, 16, 16, 0, 30, 5, residual=True, pads=(2, 0, 0, 2)),
    FusedCase(2, 8, 24, 0, 11, 10, expand_activation="relu"),
    FusedCase(1, 32, 32, 0, 9, 11, residual=True),
    FusedCase(1, 32, 16, 0, 12, 7, stride=2),
    FusedCase(1, 40, 16, 0, 9, 7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
def test_fused_mbconv_dense(case: FusedCase, dtype: torch.dtype, multiprocessors: int) -> None:
    """A block that walks over all tiles, and blocks of a tile each."""
    check_fused(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", [DENSE_CASES[0], DENSE_CASES[14]], ids=str)
@pytest.mark.parametrize("name", ["input", "expand_weight", "residual"])
def test_fused_mbconv_dense_unaligned(name: str, case: FusedCase, dtype: torch.dtype) -> None:
    """A tensor that begins between two 16-byte boundaries is copied otherwise, or is another
    kernel's.
    """
    tensors = make_fused_arguments(case, dtype)
    if name in tensors:
        aligned = run_fused(case, tensors)["output"]
        unaligned = run_fused(case, {**tensors, name: shifted(tensors[name])})["output"]
        torch.testing.assert_close(unaligned, aligned)


@pytest.mark.parametrize("case", [DENSE_CASES[0], DENSE_CASES[3]], ids=str)
def test_fused_mbconv_dense_not_finite(case: FusedCase) -> None:
    """What is not finite stays in its windows, which words of two elements may reach out of."""
    tensors = make_fused_arguments(case, torch.bfloat16)
    clean = run_fused(case, tensors)["output"]
    for row, column in ((0, 0), (3, 4), (4, 3), (case.height - 1, case.width - 1)):
        image = tensors["input"].clone()
        image[0, :, row, column] = float("nan")
        output = run_fused(case, {**tensors, "input": image})["output"]
        rows, columns = (
            torch.tensor([0 <= at + pad - 2 * i < 3 for i in range(size)])
            for at, pad, size in zip((row, column), case.pads[:2], case.size, strict=True)
        )
        inside = rows[:, None] & columns
        assert output[0, :, inside].isnan().all()
        assert torch.equal(output[..., ~inside], clean[..., ~inside])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["input", "expand_weight", "project_weight", "residual"])
def test_fused_mbconv_unaligned(name: str, dtype: torch.dtype) -> None:
    """A tensor that begins between two 16-byte boundaries changes no bit."""
    case = FusedCase(2, 24, 40, 24, 7, 5, residual=True)
    tensors = make_fused_arguments(case, dtype)
    aligned = run_fused(case, tensors)["output"]
    unaligned = run_fused(case, {**tensors, name: shifted(tensors[name])})["output"]
    assert torch.equal(unaligned, aligned)


@pytest.mark.parametrize("features", [24, 0])
def test_fused_mbconv_deterministic(features: int, multiprocessors: int) -> None:
    """The same bits, whatever the order of blocks and threads."""
    case = FusedCase(2, 16, 200, features, 13, 11, pool=features == 0)
    tensors = make_fused_arguments(case, torch.bfloat16)
    first, second = (run_fused(case, tensors) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("features", [40, 0])
def test_fused_mbconv_tf32(features: int) -> None:
    """Operands are rounded to TF32 where that is allowed, and are exact where it is not."""
    case = FusedCase(1, 40, 72, features, 7, 7)
    tensors = make_fused_arguments(case, torch.float32)
    expected = fused_reference(case, tensors)["output"]
    errors = [
        (run_fused(case, tensors, allowed)["output"] - expected).abs().max().item()
        / expected.abs().max().item()
        for allowed in (False, True)
    ]
    assert errors[0] < 2e-6 and 2e-5 < errors[1] < 2e-3


def test_fused_mbconv_float64_is_refused() -> None:
    """An error, not a wrong result."""
    case = FusedCase(1, 8, 16, 8, 5, 5)
    tensors = make_fused_arguments(case, torch.float64)
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        run_fused(case, {name: tensor.double() for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("squeezed", [6, 0])
@pytest.mark.parametrize(("features", "stride"), [(16, 1), (40, 2)])
def test_fused_mbconv(features: int, stride: int, squeezed: int, dtype: torch.dtype) -> None:
    """The block as a whole, with squeeze-and-excitation and without."""
    tensors = make_fused_arguments(FusedCase(2, 16, 72, features, 11, 9), dtype)
    generator = torch.Generator().manual_seed(1)

    def block(dtype: torch.dtype | None, backend: str) -> torch.Tensor:
        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if dtype is None else tensor.to(dtype)

        def conv(prefix: str, activation: str) -> ConvBn:
            names = ("weight", "mean", "var", "bn_weight", "bn_bias")
            return ConvBn(*(cast(tensors[f"{prefix}_{n}"]) for n in names), 1e-3, activation)

        excite = SqueezeExcite(*map(cast, weights), "silu", "sigmoid") if squeezed else None
        with backends.use_backend(backend), torch.no_grad():
            return fused_mbconv.fused_mbconv(
                cast(tensors["input"]), conv("expand", "silu"), excite,
                conv("project", "identity"), stride, "same", residual=stride == 1,
            )  # fmt: skip

    shapes = ((squeezed, 72), (squeezed,), (72, squeezed), (72,))
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    assert_error_rule(
        "output", block(None, "cpu"), block(None, "eager"), block(torch.float64, "eager"), dtype,
        FORWARD,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BATCH_NORM_ACT_CASES, ids=str)
def test_batch_norm_act_error_rule(case: BatchNormActCase, dtype: torch.dtype) -> None:
    """As for the depthwise op."""
    check_batch_norm_act(case, dtype, "cpu")


_draw = random.Random(3).choice
# Every activation on whole vectors and on single channels, the options drawn; then extents that a
# thread, a block's lanes or its rows take in several turns.
BATCH_NORM_ACT_SHAPES = [
    *FUNCTION_CASES,
    *(
        FunctionCase(
            _draw((1, 3)),
            channels,
            *_draw(((1, 5), (7, 7), (9, 5))),
            activation.name,
            batch_stats=_draw((False, True)),
            gate=_draw((False, True)),
            residual=_draw((False, True)),
            pool=_draw((False, True)),
            affine=_draw((False, True)),
        )
        for activation, channels in itertools.product(Activation, (16, 5))
    ),
    FunctionCase(2, 8, 23, 29, gate=True, pool=True),
    FunctionCase(2, 3, 23, 29, gate=True, residual=True),
    FunctionCase(2, 520, 3, 3, gate=True, residual=True, pool=True),
    FunctionCase(40, 24, 2, 1, gate=True),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*zip(BATCH_NORM_ACT_SHAPES, itertools.cycle(DTYPES), strict=False)],
    ids=str,
)
def test_batch_norm_act_functions(
    case: FunctionCase, dtype: torch.dtype, multiprocessors: int
) -> None:
    """Each function by itself, in one block and in many."""
    check_functions(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["input", "grad_output", "gate", "grad_pooled", "residual"])
def test_batch_norm_act_unaligned(name: str, dtype: torch.dtype) -> None:
    """A tensor that begins between two 16-byte boundaries: single elements for vectors."""
    case = FunctionCase(2, 16, 5, 3, gate=True, residual=True, pool=True)
    tensors = make_function_tensors(case, dtype, "cpu")
    aligned = call_functions(case, tensors, "cpu")
    unaligned = call_functions(case, {**tensors, name: shifted(tensors[name])}, "cpu")
    for result, expected in zip(unaligned.values(), aligned.values(), strict=True):
        # The order of sums is another's.
        torch.testing.assert_close(result, expected, rtol=0, atol=0.02)


def test_batch_norm_act_deterministic(multiprocessors: int) -> None:
    """The same bits, whatever the order of blocks and threads."""
    case = FunctionCase(3, 24, 13, 11, gate=True, residual=True, pool=True)
    tensors = make_function_tensors(case, torch.bfloat16, "cpu")
    first, second = (call_functions(case, tensors, "cpu") for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("channels", [16, 3])
def test_batch_norm_act_statistics(channels: int, multiprocessors: int) -> None:
    """Values far from zero, first pixels far from the others, and constants keep their digits."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, 64, 48, generator=generator) + 1000.0
    image[:, 0, 0] = 0.0  # more than a thread's first rows
    image[:, 1] = 7.0
    image[:, 2] = 0.0
    image[:, 2, 0, 0] = 1000.0
    image = image.contiguous(memory_format=torch.channels_last)
    mean, var = torch.full((2, channels), torch.nan)
    torch.ops.effnet_kernels_emulator.channel_statistics_out(image, mean, var)
    exact_var, exact_mean = torch.var_mean(image.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


def test_batch_norm_act_float64_is_refused() -> None:
    """An error, not a wrong result."""
    case = FunctionCase(1, 8, 3, 3)
    tensors = make_function_tensors(case, torch.float32, "cpu")
    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    with pytest.raises(RuntimeError, match="float64 is not supported on CUDA"):
        call_functions(case, double, "cpu")


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    # The widest takes longer than all others, and shows no more.
    [
        (case, dtype)
        for case, dtype in zip(MBCONV_TRAIN_CASES, itertools.cycle(DTYPES), strict=False)
        if case.expanded < 100
    ],
    ids=str,
)
def test_mbconv_train(case: MbconvCase, dtype: torch.dtype, training: bool) -> None:
    """The block with gradients: its kernels are those of the ops above, its products PyTorch's."""
    check_mbconv_train(case, dtype, "cpu", training=training, scaled=training)
