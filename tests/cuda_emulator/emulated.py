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
from ops.depthwise_cases import CASES, Case, make_arguments, run
from ops.test_depthwise_conv_bn_act import check
from ops.test_squeeze_excite import CASES as SQUEEZE_EXCITE_CASES
from ops.test_squeeze_excite import Case as SqueezeExciteCase
from ops.test_squeeze_excite import check as check_squeeze_excite
from ops.test_squeeze_excite import make_tensors
from ops.test_squeeze_excite import run as run_squeeze_excite
from ops.test_squeeze_excite import test_gate_is_the_gate as check_gate

from effnet_kernels import backends

op = importlib.import_module("effnet_kernels.ops.depthwise_conv_bn_act")
squeeze_excite = importlib.import_module("effnet_kernels.ops.squeeze_excite")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

torch.ops.load_library(os.environ["CUDA_EMULATOR_LIBRARY"])
backends._cpp_kernel = lambda name: getattr(torch.ops.effnet_kernels_emulator, name).default
_ON_CPU = torch.library.Library("effnet_kernels", "IMPL")
for _name, _implementation in (
    (op.OP, op._inference), (f"{op.OP}_train", op._train), (f"{op.OP}_backward", op._backward),
    (squeeze_excite.OP, squeeze_excite._forward),
    (f"{squeeze_excite.OP}_backward", squeeze_excite._backward),
    (f"{squeeze_excite.OP}_gate", squeeze_excite._gate),
):  # fmt: skip
    _ON_CPU.impl(
        _name, functools.partial(_implementation, backends.CUDA.name), "CPU", allow_override=True
    )


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
