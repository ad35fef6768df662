"""The kernels under pytest-benchmark: pytest benchmarks --benchmark-only -k "b0 and training"."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effnet_kernels import use_backend
from effnet_kernels.bench import command, depthwise_conv_bn_act, peers, shapes
from effnet_kernels.bench.depthwise_conv_bn_act import MODES, Problem

DEVICE = command.default_device()
DTYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
BATCH = 128 if DEVICE.type == "cuda" else 8
CONTENDERS = ["eager", "compile", *peers.our_backends(DEVICE, torch.float32)]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "shape",
    shapes.depthwise_shapes("efficientnet_b0"),
    ids=lambda shape: f"b0-{shape}".replace(" ", "-"),
)
def test_depthwise_conv_bn_act(
    benchmark: Any, shape: shapes.Depthwise, dtype: torch.dtype, mode: str, contender: str
) -> None:
    """Times one contender, where its numbers are right."""
    problem = Problem(shape, BATCH, dtype, mode)
    benchmark.group = str(problem)
    match = depthwise_conv_bn_act.match(problem, DEVICE, only=[contender])
    row = next(row for row in match.check() if row.contender == contender)
    assert row.failed is None, row.failed
    assert not row.wrong, f"error {row.excess:.2f} times what the rule allows"
    runner = next(c for c in match.contenders if c.name == contender)

    def call() -> None:
        runner.call(runner.inputs[0])
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(problem.training), use_backend(None):
        benchmark(call)
