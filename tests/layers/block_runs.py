"""Runs of a block, stock or converted, and how close they must be."""

from __future__ import annotations

import torch
from accuracy import FORWARD, GRADIENT
from stock_models import assert_norm_error_rule
from torch import Tensor, nn


def run(block: nn.Module, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    block.train(training)
    x = x.detach().requires_grad_()
    torch.manual_seed(7)  # for drop path
    y = block(x)
    names = ["input", *(name for name, _ in block.named_parameters())]
    grads = torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y).cumsum(-1))
    results = {"output": y, **{f"grad {n}": g for n, g in zip(names, grads, strict=True)}}
    with torch.no_grad():
        torch.manual_seed(7)
        results["output without grad"] = block(x)
    return results | dict(block.named_buffers())


def assert_exact_enough(
    ours: dict[str, Tensor], eager: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """The error rule for all of ``exact``; counts are equal."""
    for name, truth in exact.items():
        if not truth.is_floating_point():
            assert torch.equal(ours[name], truth), name
            continue
        factor = GRADIENT if name.startswith("grad") else FORWARD
        assert_norm_error_rule(name, ours[name], eager[name], truth, factor)
