"""Rows of every width, so that tiles of output columns lie everywhere: inside a row, at either end,
across both, and beyond it.
"""

from __future__ import annotations

import pytest
import torch
from ops.depthwise_cases import Case
from ops.test_depthwise_conv_bn_act import check

CHANNELS = 32  # whole vectors of every instruction set: the tensors are read where they lie


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_every_width(kernel: int, stride: int, training: bool) -> None:
    """Results and gradients keep the error rule at each width and padding."""
    paddings = ("same", (kernel // 2,) * 4, (kernel - 1, 0, 1, kernel - 1))
    for width in range(1, 35):
        padding = paddings[width % 3]
        case = Case(2, CHANNELS, 9, width, kernel, stride, padding, training=training)
        check(case, torch.float32, "cpu")
