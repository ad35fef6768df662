"""What the adapters of all libraries and all kinds of blocks share: a block's stages, from the
modules that hold their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from effnet_kernels.activations import activation_code
from effnet_kernels.layers.running_statistics import (
    Batch,
    normalises_by_batch,
    update_running_statistics,
)
from effnet_kernels.ops import ConvBn, SqueezeExcite
from effnet_kernels.ops.block import Statistics
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

    def arguments(self) -> SqueezeExcite:
        """As the ops take it."""
        return SqueezeExcite(
            _tensor(self.reduce, "_parameters", "weight"),
            _tensor(self.reduce, "_parameters", "bias"),
            _tensor(self.expand, "_parameters", "weight"),
            _tensor(self.expand, "_parameters", "bias"),
            self.activation,
            self.gate,
        )


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


class BlockModule(nn.Module):
    """What MBConv and FusedMBConv have in common, both as their docstrings have it: settings,
    squeeze-and-excitation, drop path.

    Raises:
        ValueError: ``activation`` or ``gate`` is not known, or ``drop_path`` is no probability.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int,
        padding: int | str | Sequence[int] | None, drop_path: float, activation: str, gate: str,
    ) -> None:  # fmt: skip
        super().__init__()
        activation_code("activation", activation)
        activation_code("gate", gate)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path: got {drop_path}, expected a probability below 1")
        self.padding = kernel_size // 2 if padding is None else padding
        self.activation, self.gate, self.drop_path = activation, gate, drop_path
        self.residual = stride == 1 and in_channels == out_channels
        self.reduce: nn.Conv2d | None = None
        self.excite: nn.Conv2d | None = None

    def add_squeeze_excite(self, channels: int, squeezed: int) -> None:
        """Squeeze-and-excitation of ``channels``, unless ``squeezed`` is 0."""
        if squeezed:
            self.reduce = nn.Conv2d(channels, squeezed, 1)
            self.excite = nn.Conv2d(squeezed, channels, 1)

    def squeeze_excite(self) -> Excite | None:
        """Its modules, if there are any."""
        if self.reduce is None or self.excite is None:
            return None
        return Excite(self.reduce, self.excite, self.activation, self.gate)

    def sample_scale(self, x: Tensor) -> Tensor | None:
        """What drop path multiplies each image by, (N,), or None."""
        if not self.training or self.drop_path == 0.0:
            return None
        return drawn_sample_scale(x, 1.0 - self.drop_path, rescaled=True)

    def extra_repr(self) -> str:
        """The settings that no child shows."""
        return (
            f"padding={self.padding!r}, activation={self.activation!r}, gate={self.gate!r}, "
            f"drop_path={self.drop_path}"
        )


def update(norms: Sequence[nn.BatchNorm2d], statistics: Sequence[Statistics | None]) -> None:
    """Moves the running statistics of ``norms`` by a batch's, of which None are left out."""
    given = [s for s in statistics if s is not None]
    update_running_statistics(
        [Batch(norm, *batch) for norm, batch in zip(norms, given, strict=True)]
    )
