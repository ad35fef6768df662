"""MBConv from the modules that hold its parameters: what the adapters of all libraries share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.layers.running_statistics import (
    Batch,
    normalises_by_batch,
    update_running_statistics,
)
from effnet_kernels.ops import ConvBn, SqueezeExcite, mbconv, mbconv_train
from effnet_kernels.ops.checks import autocast_dtype


def _tensor(module: nn.Module, kind: str, name: str) -> Any:
    """An attribute of ``module``, looked for first where it mostly is: ``nn.Module.__getattr__``
    takes longer, and a block has twenty of them.
    """
    found = module.__dict__[kind].get(name)
    return getattr(module, name) if found is None else found


class Stage(NamedTuple):
    """A convolution without bias, the BN after it and the name of the activation after that."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    activation: str

    def arguments(self, training: bool = False) -> ConvBn:
        """The stage as the ops take it, normalised by running statistics unless ``training``."""
        conv, norm, activation = self
        return ConvBn(
            _tensor(conv, "_parameters", "weight"),
            None if training else _tensor(norm, "_buffers", "running_mean"),
            None if training else _tensor(norm, "_buffers", "running_var"),
            _tensor(norm, "_parameters", "weight"),
            _tensor(norm, "_parameters", "bias"),
            norm.eps,
            activation,
        )


class Excite(NamedTuple):
    """The two 1x1 convolutions of squeeze-and-excitation and the names of their activations."""

    reduce: nn.Conv2d
    expand: nn.Conv2d
    activation: str
    gate: str


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


def statistics_refusal(norms: Sequence[nn.BatchNorm2d]) -> str | None:
    """Why no op takes BNs in these modes, or None."""
    by_batch = [normalises_by_batch(norm) for norm in norms]
    if len(set(by_batch)) > 1:
        return "some of its BNs normalise by the batch, some by running statistics"
    if not by_batch[0] and any(n.running_mean is None or n.running_var is None for n in norms):
        return "a BN has one running statistic and not the other"
    return None


def drawn_sample_scale(input: Tensor, keep: float, *, rescaled: bool) -> Tensor:
    """What drop path multiplies each image by, (N,), drawn as timm and torchvision draw it.

    Args:
        input: of the block.
        keep: the probability that an image stays.
        rescaled: make up for those that do not.
    """
    dtype = autocast_dtype(input) or input.dtype
    scale = input.new_empty((input.shape[0], 1, 1, 1), dtype=dtype).bernoulli_(keep)
    if keep > 0.0 and rescaled:
        scale.div_(keep)
    return scale.flatten()


def run_mbconv(input: Tensor, block: Block, sample_scale: Callable[[], Tensor | None]) -> Tensor:
    """Runs ``block``, with which ``statistics_refusal`` has no difficulty, on one op, with all that
    its BNs do to their buffers.

    Args:
        input: (N, C, H, W).
        block: the modules.
        sample_scale: draws what drop path multiplies images by, (N,), or gives None.
    """
    excite = block.excite
    squeeze_excite = None
    if excite is not None:
        squeeze_excite = SqueezeExcite(
            _tensor(excite.reduce, "_parameters", "weight"),
            _tensor(excite.reduce, "_parameters", "bias"),
            _tensor(excite.expand, "_parameters", "weight"),
            _tensor(excite.expand, "_parameters", "bias"),
            excite.activation,
            excite.gate,
        )
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
        given = [s for s in statistics if s is not None]
        update_running_statistics(
            [Batch(norm, *batch) for norm, batch in zip(norms, given, strict=True)]
        )
    return output
