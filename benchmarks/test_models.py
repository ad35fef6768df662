"""Whole models under pytest-benchmark: pytest benchmarks --benchmark-only -k "inference and b0"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch

from effnet_kernels import use_backend
from effnet_kernels.bench import environment, models, peers

DEVICE = environment.default_device()
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
BATCHES = (1, 128) if DEVICE.type == "cuda" else (1, 8)
CONTENDERS = ["eager", "compile", *peers.our_backends(DEVICE, DTYPE)]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("mode", models.MODES)
@pytest.mark.parametrize(
    ("model", "size"),
    [models.resolved(spelling) for spelling in models.MODELS],
    ids=["b0", "b4", "v2_s_tf", "v2_s"],
)
def test_efficientnet(
    benchmark: Any, model: str, size: int, mode: str, batch: int, contender: str
) -> None:
    """Times one contender, where its numbers are right."""
    problem = models.Problem(model, size, batch, DTYPE, mode)
    benchmark.group = str(problem)
    match = models.match(problem, DEVICE, only=[contender])
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
