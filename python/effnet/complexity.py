"""What a network costs: parameters and multiply-adds, counted without computing anything."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effnet_kernels import use_backend


class Complexity(NamedTuple):
    """The two numbers of the papers' tables.

    Attributes:
        parameters: of the network, without buffers.
        multiply_adds: of the convolutions and matrix products for one image, which the papers call
            FLOPs.
    """

    parameters: int
    multiply_adds: int


def complexity(model: nn.Module, resolution: int, in_chans: int = 3) -> Complexity:
    """Counts ``model`` on one image.

    Args:
        model: stays as it is; a copy is traced on the meta device.
        resolution: side of the image, in pixels.
        in_chans: channels of the image.
    """
    traced = copy.deepcopy(model).to("meta").eval()
    images = torch.empty(1, in_chans, resolution, resolution, device="meta")
    counter = FlopCounterMode(display=False)
    # PyTorch's own ops, which the counter knows.
    with use_backend("eager"), torch.no_grad(), counter:
        traced(images)
    parameters = sum(p.numel() for p in model.parameters())
    return Complexity(parameters, counter.get_total_flops() // 2)
