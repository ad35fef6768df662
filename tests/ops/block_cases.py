"""One block as the tests of block ops have it, and the tensors of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effnet_kernels.ops import ConvBn, SqueezeExcite


@dataclass(frozen=True)
class Case:
    """One block: ``channels`` expanded to ``expanded``, then to ``features``; one of the two may be
    0, where the op allows it: no expansion, no projection.
    """

    batch: int
    channels: int
    expanded: int
    features: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int | str | tuple[int, ...] = "same"
    squeezed: int = 0
    residual: bool = False
    activation: str = "silu"
    affine: bool = True
    project_activation: str = "identity"
    layout: str = "channels_last"

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            f"e{self.expanded}",
            f"k{self.features}",
            f"{self.kernel}x{self.kernel}",
            f"stride{self.stride}",
            f"pad{self.padding}",
            self.activation,
        ]
        words += [f"se{self.squeezed}"] if self.squeezed else []
        words += ["residual"] if self.residual else []
        words += [] if self.affine else ["plain"]
        words += [] if self.layout == "channels_last" else [self.layout]
        return "-".join(words).replace(" ", "")


class Draw:
    """The tensors of a call, the same whenever they are drawn in the same order."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        self._case, self._dtype, self._device = case, dtype, device
        self._generator = torch.Generator().manual_seed(0)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def _weight(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype).to(self._device)

    def _vector(self, tensor: Tensor) -> Tensor:
        return tensor.float().to(self._device)

    def image(self) -> Tensor:
        """The block's input."""
        case = self._case
        image = self._weight(self._random(case.batch, case.channels, case.height, case.width))
        if case.layout == "channels_last":
            image = image.contiguous(memory_format=torch.channels_last)
        return image

    def stage(self, k: int, *rest: int, fan: int, activation: str) -> ConvBn:
        """One of k filters, each a sum of ``fan`` products."""
        affine = self._case.affine
        return ConvBn(
            self._weight(self._random(k, *rest) / fan**0.5),
            self._vector(self._random(k) * 0.1),
            self._vector(self._random(k).abs() + 0.5),
            self._vector(self._random(k).abs() + 0.5) if affine else None,
            self._vector(self._random(k) * 0.3) if affine else None,
            1e-3,
            activation,
        )

    def squeeze_excite(self, channels: int) -> SqueezeExcite | None:
        """That of the case, if it has one, with an activation that the op knows."""
        s, activation = self._case.squeezed, self._case.activation
        if not s:
            return None
        return SqueezeExcite(
            self._weight(self._random(s, channels, 1, 1) * 2 / channels**0.5),
            self._weight(self._random(s)),
            self._weight(self._random(channels, s, 1, 1) / s**0.5),
            self._weight(self._random(channels)),
            "silu" if activation in ("identity", "relu6") else activation,
            "hardsigmoid" if activation == "hardswish" else "sigmoid",
        )


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64."""

    def double(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double()
        if isinstance(value, (ConvBn, SqueezeExcite)):
            return type(value)(*(double(v) for v in value))
        return value

    return {name: double(value) for name, value in arguments.items()}
