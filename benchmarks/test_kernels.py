"""The kernels under pytest-benchmark: pytest benchmarks --benchmark-only -k "mbconv and training".

Each op's suite at its default shapes: EfficientNet-B0's, or V2-S's where B0 has none.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from effnet_kernels import use_backend
from effnet_kernels.bench import command, environment, models, peers

DEVICE = environment.default_device()
DTYPES = [torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32, torch.bfloat16]
BATCH = 128 if DEVICE.type == "cuda" else 8
CONTENDERS = ["eager", "compile", *peers.our_backends(DEVICE, torch.float32)]


def problems() -> list[Any]:
    """Every kernel suite's, with its suite."""
    found = []
    for suite in command.SUITES.values():
        if suite is models:
            continue
        parser = argparse.ArgumentParser()
        suite.add_arguments(parser)
        options = parser.parse_args([])
        options.dtypes, options.batch = DTYPES, [BATCH]
        op = suite.NAME.removeprefix("kernels-")
        found += [
            pytest.param(
                suite, problem, id=f"{op} {problem.shape.model} {problem}".replace(" ", "-")
            )
            for problem in suite.problems(options)
        ]
    return found


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize(("suite", "problem"), problems())
def test_kernels(benchmark: Any, suite: Any, problem: Any, contender: str) -> None:
    """Times one contender, where its numbers are right."""
    benchmark.group = f"{suite.NAME} {problem}"
    match = suite.match(problem, DEVICE, only=[contender])
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
