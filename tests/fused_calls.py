"""Sees which ops a piece of code runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the ops called under it, by ``namespace::name``; properties count ours."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts and calls ``func``."""
        self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> int:
        """Forward calls of the depthwise op, alone or in a whole block."""
        return self.whole + self._forward("depthwise_conv_bn_act", "depthwise_conv_bn_act_train")

    @property
    def whole(self) -> int:
        """Forward calls of whole MBConv blocks."""
        return self._forward("mbconv", "mbconv_train")

    @property
    def fused_mbconv(self) -> int:
        """Forward calls of Fused-MBConv blocks."""
        return self._forward("fused_mbconv", "fused_mbconv_train")

    @property
    def normalised(self) -> int:
        """Forward calls of BN + activation by itself."""
        return self._forward("batch_norm_act")

    @property
    def pointwise(self) -> int:
        """Forward calls of the pointwise op by itself."""
        return self._forward("pointwise_conv_bn_act")

    @property
    def gated(self) -> int:
        """Forward calls of squeeze-and-excitation by itself."""
        return self._forward("squeeze_excite")

    def _forward(self, *ops: str) -> int:
        return sum(
            number
            for name, number in self.count.items()
            if name.startswith("effnet_kernels") and name.partition("::")[2] in ops
        )
