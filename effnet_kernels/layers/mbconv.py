"""MBConv from the modules that hold its parameters: what the adapters of all libraries share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.layers.block import Excite, Stage, update
from effnet_kernels.layers.running_statistics import normalises_by_batch
from effnet_kernels.ops import mbconv, mbconv_train
from effnet_kernels.ops.prepared import PreparedStage, prepare_mbconv


class Block(NamedTuple):
    """The modules of a block.

    Attributes:
        expand: the 1x1 expansion, or None.
        depthwise: the depthwise stage; its convolution's stride is read, its padding is not.
        excite: squeeze-and-excitation, or None.
        project: the 1x1 projection.
        padding: of the depthwise convolution, as the ops take it.
        residual: whether the input is added.
    """

    expand: Stage | None
    depthwise: Stage
    excite: Excite | None
    project: Stage
    padding: int | str | Sequence[int]
    residual: bool

    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        """The BNs, in the order that they run in."""
        expand = () if self.expand is None else (self.expand.norm,)
        return (*expand, self.depthwise.norm, self.project.norm)

    def prepared(self) -> PreparedStage:
        """The block in inference with its weights packed."""
        return prepare_mbconv(
            None if self.expand is None else self.expand.arguments(),
            self.depthwise.arguments(),
            None if self.excite is None else self.excite.arguments(),
            self.project.arguments(),
            self.depthwise.conv.stride[0],
            self.padding,
            residual=self.residual,
        )


def run_mbconv(input: Tensor, block: Block, sample_scale: Callable[[], Tensor | None]) -> Tensor:
    """Runs ``block``, with which ``statistics_refusal`` has no difficulty, on one op, with all that
    its BNs do to their buffers.

    Args:
        input: (N, C, H, W).
        block: the modules.
        sample_scale: draws what drop path multiplies images by, (N,), or gives None.
    """
    squeeze_excite = None if block.excite is None else block.excite.arguments()
    norms = block.norms()
    training = normalises_by_batch(norms[0])
    scale = sample_scale() if block.residual else None
    expand = None if block.expand is None else block.expand.arguments(training)
    depthwise, project = block.depthwise.arguments(training), block.project.arguments(training)
    stride = block.depthwise.conv.stride[0]
    if not training and scale is None and not torch.is_grad_enabled():
        return mbconv(
            input, expand, depthwise, squeeze_excite, project, stride, block.padding,
            residual=block.residual,
        )  # fmt: skip
    output, *statistics = mbconv_train(
        input, expand, depthwise, squeeze_excite, project, stride, block.padding,
        training=training, residual=block.residual, sample_scale=scale,
    )  # fmt: skip
    if training:
        update(norms, statistics)
    return output
