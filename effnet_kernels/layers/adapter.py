"""The link between a stock block's class and the fused one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from effnet_kernels.ops.prepared import PreparedStage


@dataclass(frozen=True)
class Adapter:
    """How blocks of one class are fused.

    Attributes:
        stock: the class that is taken; subclasses of it are not.
        fused: a subclass of ``stock`` with another ``forward`` and the same state.
        refusal: why a block of either class cannot run fused, or None.
        stages: what ``prepare`` packs: the stages that the block's inference consists of, or None
            where it is not made of such.
    """

    stock: type[nn.Module]
    fused: type[nn.Module]
    refusal: Callable[[Any], str | None]
    stages: Callable[[Any], Sequence[PreparedStage] | None] | None = None
