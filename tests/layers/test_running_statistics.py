"""Running statistics of many BNs at once against ``nn.BatchNorm2d``'s, one after another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_kernels.layers.running_statistics import (
    Batch,
    update_running_statistics,
    updates_together,
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.01},
    {"momentum": None},
    {"track_running_stats": False},
    {"dtype": torch.bfloat16},
    {"affine": False},
]


def make_norms() -> list[nn.BatchNorm2d]:
    """One of each setting, of different channels; the last in evaluation."""
    norms = [nn.BatchNorm2d(3 + i, **settings) for i, settings in enumerate([*SETTINGS, {}])]
    norms[-1].eval()
    return norms


def images(norm: nn.BatchNorm2d, batch: int = 4) -> Tensor:
    """Something for ``norm`` to normalise."""
    return torch.randn(batch, norm.num_features, 5, 5) * 3 + 1


def batch_of(norm: nn.BatchNorm2d, x: Tensor) -> Batch:
    """The statistics of ``x``."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return Batch(norm, mean, var, x.numel() // x.shape[1])


def assert_buffers_equal(ours: list[nn.BatchNorm2d], stock: list[nn.BatchNorm2d]) -> None:
    """All buffers, the counters exactly."""
    for mine, theirs in zip(ours, stock, strict=True):
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(mine.get_buffer(name), buffer, msg=f"{name} of {theirs}")


@pytest.mark.parametrize("together", [False, True])
def test_as_one_after_another(together: bool) -> None:
    """Three batches of BNs in all modes."""
    ours = make_norms()
    stock = copy.deepcopy(ours)
    for _ in range(3):
        inputs = [images(norm) for norm in ours]
        batches = [batch_of(norm, x) for norm, x in zip(ours, inputs, strict=True)]
        if together:
            with updates_together():
                for batch in batches:
                    update_running_statistics([batch])
        else:
            update_running_statistics(batches)
        for norm, x in zip(stock, inputs, strict=True):
            norm(x.to(norm.weight.dtype if norm.weight is not None else x.dtype))
    assert_buffers_equal(ours, stock)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared(momentum: float | None) -> None:
    """A BN that is there three times has its batches in turn."""
    ours = nn.BatchNorm2d(3, momentum=momentum)
    other = nn.BatchNorm2d(3, momentum=momentum)
    stock = copy.deepcopy([ours, other])
    inputs = [images(ours) for _ in range(3)]
    with updates_together():
        for x in inputs:
            update_running_statistics([batch_of(ours, x), batch_of(other, x)])
    for x in inputs:
        stock[0](x), stock[1](x)
    assert_buffers_equal([ours, other], stock)


def test_put_off_until_the_end() -> None:
    """Of the outermost, and after an error too: what ran has run."""
    norm = nn.BatchNorm2d(3)
    stock = copy.deepcopy(norm)
    x = images(norm)
    with pytest.raises(KeyError), updates_together():
        with updates_together():
            update_running_statistics([batch_of(norm, x)])
        assert norm.num_batches_tracked == 0
        raise KeyError
    stock(x)
    assert_buffers_equal([norm], [stock])
