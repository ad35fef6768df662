"""EfficientNet, V1 (arXiv:1905.11946) and V2 (arXiv:2104.00298): the network of a table.

A network is a stem, stages of MBConv or Fused-MBConv blocks, a head and a classifier:

    image -> stem (3x3, stride 2) -> stages -> head (1x1) -> mean -> dropout -> classifier

The blocks are ``effnet_kernels.layers``' modules, each one op of the library.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effnet.variants import HEAD_CHANNELS, Stage, Variant, variant
from effnet_kernels.layers import FusedMBConv, MBConv, PointwiseConvBnAct


def scale_channels(channels: int, width: float, least: float = 0.9) -> int:
    """``channels * width`` to the nearest multiple of 8, at least 8, at least ``least`` of it."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= least * scaled else rounded + 8


def scale_stages(
    stages: Sequence[Stage], width: float, depth: float, least: float = 0.9
) -> tuple[Stage, ...]:
    """The table with channels times ``width`` and layers times ``depth``, rounded up."""
    return tuple(
        stage._replace(
            channels=scale_channels(stage.channels, width, least),
            layers=math.ceil(stage.layers * depth),
        )
        for stage in stages
    )


def scaled(table: Variant) -> Variant:
    """The variant with its multipliers applied: those of the result are 1."""
    return table._replace(
        stages=scale_stages(table.stages, table.width, table.depth, table.least),
        stem=scale_channels(table.stem, table.width, table.least),
        head=scale_channels(table.head, table.width, table.least),
        width=1.0,
        depth=1.0,
    )


def stage_blocks(
    stage: Stage, in_channels: int, drop_paths: Iterable[float] = (), **settings: Any
) -> list[nn.Module]:
    """The blocks of a stage.

    Args:
        stage: of the table.
        in_channels: of the first block; the others have the stage's.
        drop_paths: the blocks' rates of stochastic depth, as far as they go; then 0.
        settings: the others of ``FusedMBConv`` and ``MBConv``.
    """
    blocks: list[nn.Module] = []
    rates = itertools.chain(drop_paths, itertools.repeat(0.0))
    for layer in range(stage.layers):
        block: Any = FusedMBConv if stage.fused else MBConv
        blocks.append(
            block(
                in_channels, stage.channels, stage.expand, stage.kernel_size,
                stage.stride if layer == 0 else 1, squeezed=round(in_channels * stage.squeeze),
                drop_path=next(rates), **settings,
            )
        )  # fmt: skip
        in_channels = stage.channels
    return blocks


class EfficientNet(nn.Module):
    """The network of a table of stages.

    Args:
        stages: the table, as wide and deep as the network is to be.
        num_classes: outputs of the classifier; 0 for the pooled features instead.
        in_chans: channels of the images.
        stem_channels: of the stem.
        head_channels: of the head.
        stem_stride: 2; 1 suits small images.
        drop_rate: of dropout before the classifier.
        drop_path_rate: of stochastic depth in the last block; it grows linearly from 0.
        padding: of the convolutions: None for as much on either side, or "same" as TensorFlow pads.
        eps: BN's; TensorFlow's weights want 1e-3.
        momentum: BN's.

    Shapes:
        (N, in_chans, H, W) to (N, num_classes), or (N, head_channels). Any H and W; channels-last
        is faster.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        stem_channels: int = 32,
        head_channels: int = HEAD_CHANNELS,
        stem_stride: int = 2,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.2,
        padding: str | None = None,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        common: dict[str, Any] = {"padding": padding, "eps": eps, "momentum": momentum}
        # A dense convolution with BN and activation: a Fused-MBConv that does not expand.
        self.stem = FusedMBConv(
            in_chans, stem_channels, expand_ratio=1, stride=stem_stride, **common
        )
        total = sum(stage.layers for stage in stages)
        rates = iter([drop_path_rate * i / total for i in range(total)])
        channels = stem_channels
        self.stages = nn.ModuleList()
        for stage in stages:
            self.stages.append(nn.Sequential(*stage_blocks(stage, channels, rates, **common)))
            channels = stage.channels
        self.head = PointwiseConvBnAct(channels, head_channels, eps=eps, momentum=momentum)
        self.drop_rate = drop_rate
        self.checkpointing = False
        """Recompute each block in backward instead of keeping what it computed."""
        self.classifier = nn.Linear(head_channels, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map of images x, (N, head_channels, OH, OW), before pooling."""
        x = self.stem(x)
        for stage in self.stages:
            for block in stage.children():
                if self.checkpointing and torch.is_grad_enabled():
                    x = _recomputed(block, x)
                else:
                    x = block(x)
        features: Tensor = self.head(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """The logits of images x."""
        pooled = self.forward_features(x).mean((2, 3))
        logits: Tensor = self.classifier(F.dropout(pooled, self.drop_rate, self.training))
        return logits


class Features(nn.Module):
    """A network's feature maps, the last one of each resolution: what detection and segmentation
    build on.

    Args:
        model: the network; its head and classifier are left out.

    Attributes:
        channels: of each map.
        reductions: an image's side over the map's, of each.

    Shapes:
        (N, in_chans, H, W) to a list of (N, channels[i], H / reductions[i], W / reductions[i]),
        rounded up.
    """

    def __init__(self, model: EfficientNet) -> None:
        super().__init__()
        self.stem, self.stages = model.stem, model.stages
        strides = [_stride(stage) for stage in model.stages]
        # The stage after which the resolution falls, and the last.
        self._last = [i + 1 == len(strides) or strides[i + 1] > 1 for i in range(len(strides))]
        self.channels: list[int] = []
        self.reductions: list[int] = []
        reduction = model.stem.expand_conv.stride[0]
        for stage, stride, last in zip(model.stages, strides, self._last, strict=True):
            reduction *= stride
            if last:
                self.channels.append(_out_channels(stage))
                self.reductions.append(reduction)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The feature maps of images x, from the finest to the coarsest."""
        maps = []
        x = self.stem(x)
        for stage, last in zip(self.stages, self._last, strict=True):
            x = stage(x)
            if last:
                maps.append(x)
        return maps


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """The block of x, of which backward recomputes what it needs."""

    @contextlib.contextmanager
    def once() -> Iterator[None]:
        # The second run sees the same batch; running statistics have moved by it already.
        before = [buffer.clone() for buffer in block.buffers()]
        yield
        for buffer, value in zip(block.buffers(), before, strict=True):
            buffer.copy_(value)

    output: Tensor = checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), once())
    )
    return output


def _stride(stage: Any) -> int:
    block = stage[0]
    conv = block.expand_conv if isinstance(block, FusedMBConv) else block.depthwise_conv
    return int(conv.stride[0])


def _out_channels(stage: Any) -> int:
    block = stage[-1]
    conv = block.expand_conv if block.project_conv is None else block.project_conv
    return int(conv.out_channels)


def _initialise(module: nn.Module) -> None:
    """Weights as in the authors' code: normal by fan-out, the classifier uniform by its outputs."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)


@overload
def create_model(
    name: str | Variant, num_classes: int = 1000, in_chans: int = 3, *,
    drop_rate: float | None = None, drop_path_rate: float = 0.2,
    features_only: Literal[False] = False, **settings: Any,
) -> EfficientNet: ...  # fmt: skip


@overload
def create_model(
    name: str | Variant, num_classes: int = 1000, in_chans: int = 3, *,
    drop_rate: float | None = None, drop_path_rate: float = 0.2,
    features_only: Literal[True], **settings: Any,
) -> Features: ...  # fmt: skip


def create_model(
    name: str | Variant,
    num_classes: int = 1000,
    in_chans: int = 3,
    *,
    drop_rate: float | None = None,
    drop_path_rate: float = 0.2,
    features_only: bool = False,
    **settings: Any,
) -> EfficientNet | Features:
    """A member of the family, with fresh weights.

    >>> create_model("efficientnet_b0", num_classes=10)
    >>> create_model("efficientnetv2_s", padding="same", eps=1e-3)  # TensorFlow's

    Args:
        name: of ``effnet.variants.VARIANTS``, or a table of one's own.
        num_classes: outputs of the classifier; 0 for the pooled features.
        in_chans: channels of the images.
        drop_rate: of dropout before the classifier; the variant's own unless given.
        drop_path_rate: of stochastic depth.
        features_only: return ``Features``, the maps of each resolution.
        settings: the others of ``EfficientNet``.

    Raises:
        ValueError: there is no such model.
    """
    table = scaled(variant(name) if isinstance(name, str) else name)
    model = EfficientNet(
        table.stages,
        num_classes,
        in_chans,
        stem_channels=table.stem,
        head_channels=table.head,
        drop_rate=table.drop_rate if drop_rate is None else drop_rate,
        drop_path_rate=drop_path_rate,
        **{"stem_stride": table.stem_stride, **settings},
    )
    return Features(model) if features_only else model
