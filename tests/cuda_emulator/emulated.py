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

import pytest
import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from ops.depthwise_cases import CASES, Case, make_arguments, run
from ops.test_depthwise_conv_bn_act import check

from effnet_kernels import backends

op = importlib.import_module("effnet_kernels.ops.depthwise_conv_bn_act")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

torch.ops.load_library(os.environ["CUDA_EMULATOR_LIBRARY"])
backends._cpp_kernel = lambda name: getattr(torch.ops.effnet_kernels_emulator, name).default
_ON_CPU = torch.library.Library("effnet_kernels", "IMPL")
for _name, _implementation in (
    (op.OP, op._inference), (f"{op.OP}_train", op._train), (f"{op.OP}_backward", op._backward)
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
