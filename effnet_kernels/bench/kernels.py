"""What the suites of kernels share: problems, the parts of a block, contenders, options.

A suite is a module with a ``Block``, its op in PyTorch's own words, and a subclass of it that is
one call of ours; both are built from a problem and called with an image.
"""

from __future__ import annotations

import argparse
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels import ops
from effnet_kernels.bench import environment, peers, shapes, timing
from effnet_kernels.bench.peers import Match
from effnet_kernels.bench.results import BASELINE, Row
from effnet_kernels.bench.timing import Contender

PEERS = (BASELINE, "eager-nchw", *peers.COMPILED)
EPS = 1e-3


class Shape(Protocol):
    """One of ``shapes``, in words a case of its model's."""

    @property
    def model(self) -> str:
        """Whose it is, as ``shapes.model_of`` takes it."""

    @property
    def count(self) -> int:
        """How often it occurs in the model."""


ShapeT = TypeVar("ShapeT", bound=Shape)


@dataclass(frozen=True)
class Problem(ABC, Generic[ShapeT]):
    """One shape, batch, dtype and mode."""

    shape: ShapeT
    batch: int
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape} batch {self.batch} {dtype} {self.mode}"

    @property
    def training(self) -> bool:
        """Forward and backward, instead of inference."""
        return self.mode.startswith("training")

    @property
    @abstractmethod
    def input(self) -> tuple[int, int]:
        """Channels and size of the image."""

    @property
    @abstractmethod
    def output(self) -> tuple[int, int]:
        """Channels and size of the result."""

    @property
    def residual(self) -> bool:
        """Whether another image is added to the result, besides the one that goes in."""
        return False

    @property
    @abstractmethod
    def bytes(self) -> int:
        """The op's traffic in activations, by the table in its docstring."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """FLOPs of the convolutions and products, and of their two gradients in training."""

    def image_shape(self, of: tuple[int, int]) -> tuple[int, int, int, int]:
        """The batch of images of some channels and size."""
        channels, size = of
        return self.batch, channels, size, size

    def image_bytes(self, of: tuple[int, int]) -> int:
        """Bytes of such a batch."""
        channels, size = of
        return self.batch * channels * size**2 * self.dtype.itemsize


# --------------------------------------------------------------------------------------------------
# Parts of blocks.
# --------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """The four vectors of BN, float32 as in a model of any dtype."""

    def __init__(self, channels: int, device: torch.device, *, learns: bool) -> None:
        super().__init__()

        def vector(mean: float, spread: float) -> nn.Parameter:
            values = torch.randn(channels, device=device) * spread + mean
            return nn.Parameter(values, requires_grad=learns)

        self.weight, self.bias = vector(1, 0.3), vector(0, 0.3)
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("mean", torch.randn(channels, device=device) * 0.3)
        self.register_buffer("var", torch.rand(channels, device=device) + 0.5)

    def forward(self, x: Tensor, by_batch: bool = False) -> Tensor:
        """BN of ``x``, by its own statistics if ``by_batch``."""
        mean, var = (None, None) if by_batch else (self.mean, self.var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, by_batch, 0.0, EPS)


class ConvBn(nn.Module):
    """A convolution without bias, and BN."""

    def __init__(
        self, channels: int, features: int, problem: Problem[Any], device: torch.device,
        kernel: int = 1, stride: int = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kernel, self.stride, self.groups = kernel, stride, groups
        self.weight = _weight((features, channels // groups, kernel, kernel), problem, device)
        self.bn = BatchNorm(features, device, learns=problem.training)

    def forward(self, x: Tensor, by_batch: bool = False) -> Tensor:
        """BN of the convolution of ``x``."""
        x = F.conv2d(x, self.weight, None, self.stride, self.kernel // 2, 1, self.groups)
        y: Tensor = self.bn(x, by_batch)
        return y

    def stage(self, activation: str) -> ops.ConvBn:
        """As our ops of whole blocks take it."""
        bn = self.bn
        return ops.ConvBn(self.weight, bn.mean, bn.var, bn.weight, bn.bias, EPS, activation)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that is this one with its BN, in inference."""
        scale = self.bn.weight * (self.bn.var + EPS).rsqrt()
        weight = self.weight * scale[:, None, None, None]
        bias = self.bn.bias - self.bn.mean * scale
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)


class SqueezeExcite(nn.Module):
    """The two 1x1 convolutions of squeeze-and-excitation."""

    def __init__(
        self, channels: int, squeezed: int, problem: Problem[Any], device: torch.device
    ) -> None:
        super().__init__()

        def bias(features: int) -> nn.Parameter:
            values = torch.randn(features, device=device) * 0.3
            return nn.Parameter(values.to(problem.dtype), requires_grad=problem.training)

        self.reduce_weight = _weight((squeezed, channels, 1, 1), problem, device)
        self.reduce_bias = bias(squeezed)
        self.expand_weight = _weight((channels, squeezed, 1, 1), problem, device)
        self.expand_bias = bias(channels)

    def forward(self, mean: Tensor) -> Tensor:
        """The gate, (N, C, 1, 1), from the mean of an image."""
        hidden = F.conv2d(mean, self.reduce_weight, self.reduce_bias)
        hidden = F.silu(hidden, inplace=True)
        return F.conv2d(hidden, self.expand_weight, self.expand_bias).sigmoid()


def _weight(shape: tuple[int, ...], problem: Problem[Any], device: torch.device) -> nn.Parameter:
    """Filters that keep the scale of what they are applied to; channels-last, as a model's are."""
    fan_in = shape[1] * shape[2] * shape[3]
    values = torch.randn(shape, device=device) / fan_in**0.5
    values = values.to(problem.dtype, memory_format=torch.channels_last)
    return nn.Parameter(values, requires_grad=problem.training)


class Block(nn.Module):
    """An op; a subclass holds its parameters and calls it."""

    def prepare(self) -> None:
        """Computes what a model that has been loaded holds beside its parameters."""

    def forward(self, image: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
        """The result, and its sums over height and width where the mode has them."""
        raise NotImplementedError


# --------------------------------------------------------------------------------------------------
# Contenders on a problem.
# --------------------------------------------------------------------------------------------------


@dataclass
class Inputs:
    """One set: the image, what is added to the result, and the result's gradient for training."""

    image: Tensor
    residual: Tensor | None
    grad_output: Tensor | None

    def clone(self) -> Inputs:
        """The same values elsewhere in memory."""
        return self.to(lambda t: t.clone(memory_format=torch.preserve_format))

    def to(self, convert: Callable[[Tensor], Tensor]) -> Inputs:
        """The set with each tensor converted."""
        image = convert(self.image.detach()).requires_grad_(self.image.requires_grad)
        residual, grad = (
            None if t is None else convert(t) for t in (self.residual, self.grad_output)
        )
        return Inputs(image, residual, grad)


def inputs_of(problem: Problem[Any], device: torch.device) -> Inputs:
    """Random ones, channels-last."""

    def random(of: tuple[int, int]) -> Tensor:
        values = torch.randn(problem.image_shape(of), device=device).to(problem.dtype)
        return values.contiguous(memory_format=torch.channels_last)

    return Inputs(
        random(problem.input).requires_grad_(problem.training),
        random(problem.output) if problem.residual else None,
        random(problem.output) if problem.training else None,
    )


def _learned(block: Block) -> dict[str, nn.Parameter]:
    return {name: p for name, p in block.named_parameters() if p.requires_grad}


def caller(
    block: Block, backend: str | None, forward: Callable[..., Any] | None = None
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """A call of ``block``, on ``backend`` if one is given. Where the inputs have a gradient of the
    result, those of the image and the parameters are among its own.
    """
    run = forward or block
    parameters = tuple(_learned(block).values())

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        if backend is not None:
            peers.demand(backend)
        outputs: tuple[Tensor, ...] = run(inputs.image, inputs.residual)
        if inputs.grad_output is None:
            return outputs
        return *outputs, *torch.autograd.grad(
            outputs[0], (inputs.image, *parameters), inputs.grad_output
        )

    return call


ProblemT = TypeVar("ProblemT", bound=Problem[Any])


def match(
    problem: ProblemT,
    device: torch.device,
    stock: Callable[[ProblemT, torch.device], Block],
    fused: Callable[[ProblemT, torch.device], Block],
    *,
    others: Mapping[str, Callable[[ProblemT, torch.device], Block]] | None = None,
    only: Sequence[str] | None = None,
    cold: bool = False,
) -> Match:
    """The contenders on one problem.

    Args:
        problem: what to run.
        device: where.
        stock: the op in PyTorch's own words.
        fused: the op in one call, with the same parameters and buffers.
        others: peers for inference by name, likewise.
        only: contenders, of ``PEERS``, ``others`` and the names of backends; all that can run
            unless given. The baseline is always among them.
        cold: prepare enough sets of inputs for cold caches.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    theirs, ours = stock(problem, device), fused(problem, device)
    ours.load_state_dict(theirs.state_dict())
    in_double = copy.deepcopy(theirs).double()
    for block in (theirs, ours, in_double):
        block.prepare()
    base = inputs_of(problem, device)
    sets = 1
    if cold:
        sets = timing.sets_for_cold(
            problem.image_bytes(problem.input)
            + problem.image_bytes(problem.output) * (1 + problem.residual),
            environment.cache_bytes(device),
            (16 if device.type == "cuda" else 1) << 30,
        )
    channels_last = [base, *(base.clone() for _ in range(sets - 1))]

    def wanted(name: str) -> bool:
        return only is None or name in only or name == BASELINE

    contenders = [Contender(BASELINE, caller(theirs, None), channels_last)]
    if wanted("eager-nchw"):
        nchw = [inputs.to(Tensor.contiguous) for inputs in channels_last]
        block = copy.deepcopy(theirs).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        contenders.append(Contender("eager-nchw", caller(block, None), nchw))
    for name, mode in peers.COMPILED.items():
        if wanted(name) and (device.type == "cuda" or mode == "default"):
            freezing = device.type == "cpu" and not problem.training
            forward = peers.compiled(theirs, mode, freezing=freezing)
            contenders.append(Contender(name, caller(theirs, None, forward), channels_last))
    for name, other in (others or {}).items():
        if wanted(name) and not problem.training:
            block = other(problem, device)
            block.load_state_dict(theirs.state_dict())
            block.prepare()
            contenders.append(Contender(name, caller(block, None), channels_last))
    for name in peers.our_backends(device, problem.dtype):
        if wanted(name):
            contenders.append(Contender(name, caller(ours, name), channels_last))

    gradients = [f"grad_{name.replace('.', '_')}" for name in ("input", *_learned(theirs))]

    def named(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if problem.training:
            return dict(zip(("output", *gradients), tensors, strict=True))
        return dict(zip(("output", "pooled"), tensors, strict=False))

    with torch.set_grad_enabled(problem.training):
        exact = named(caller(in_double, None)(base.to(Tensor.double)))
    row = Row(
        problem.shape.model, str(problem.shape), problem.batch,
        str(problem.dtype).removeprefix("torch."), problem.mode, "",
        count=problem.shape.count, bytes=problem.bytes, flops=problem.flops,
    )  # fmt: skip
    return Match(row, contenders, named, exact, device, problem.dtype, problem.training)


# --------------------------------------------------------------------------------------------------
# Options.
# --------------------------------------------------------------------------------------------------


def add_arguments(
    parser: argparse.ArgumentParser,
    what: str,
    modes: Sequence[str],
    models: Sequence[str] = ("efficientnet_b0",),
) -> None:
    """The options of a suite that measures ``what`` in ``modes``, of ``models`` unless told."""
    parser.add_argument(
        "--models", nargs="+", type=_model, default=list(models), metavar="NAME[@SIZE]",
        help=f"whose {what}, of {', '.join(shapes.MODELS)}, at the model's own size or another "
        f"(default: {' '.join(models)})",
    )  # fmt: skip
    parser.add_argument(
        "--modes", nargs="+", choices=modes, default=list(modes), metavar="MODE",
        help=f"of {', '.join(modes)} (default: all)",
    )  # fmt: skip


def _model(name: str) -> str:
    try:
        shapes.model_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("name: ")) from None
    return name


def problems(
    arguments: argparse.Namespace,
    problem: Callable[[ShapeT, int, torch.dtype, str], ProblemT],
    shapes_of: Callable[[str, str], Sequence[ShapeT]],
) -> Iterator[ProblemT]:
    """The problems that the options ask for; ``shapes_of`` a model and a mode."""
    for model in arguments.models:
        for dtype in arguments.dtypes:
            for mode in arguments.modes:
                for batch in arguments.batch:
                    for shape in shapes_of(model, mode):
                        yield problem(shape, batch, dtype, mode)
