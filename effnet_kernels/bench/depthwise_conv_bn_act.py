"""``ops.depthwise_conv_bn_act`` beside its peers, on the depthwise convolutions of the models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels import backends
from effnet_kernels.bench import environment, peers, shapes, timing
from effnet_kernels.bench.peers import Match
from effnet_kernels.bench.results import BASELINE, Row
from effnet_kernels.bench.shapes import Depthwise
from effnet_kernels.bench.timing import Contender
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act

NAME = "kernels-depthwise_conv_bn_act"
MODES = ("inference", "inference+prologue", "inference+pool", "training")
"""Inference alone, with the BN and activation of the convolution before, with the pool for
squeeze-and-excitation; forward and backward with batch statistics.
"""
PEERS = (BASELINE, "eager-nchw", *peers.COMPILED)

_EPS = 1e-3


@dataclass(frozen=True)
class Problem:
    """One shape, batch, dtype and mode."""

    shape: Depthwise
    batch: int
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape} batch {self.batch} {dtype} {self.mode}"

    @property
    def training(self) -> bool:
        """Forward and backward, instead of inference."""
        return self.mode == "training"

    @property
    def bytes(self) -> int:
        """The op's traffic, as in its docstring: x + y in inference, 3x + 7y forward and back."""
        s = self.shape
        x = self.batch * s.channels * s.size**2 * self.dtype.itemsize
        y = self.batch * s.channels * s.output_size**2 * self.dtype.itemsize
        return 3 * x + 7 * y if self.training else x + y

    @property
    def flops(self) -> int:
        """FLOPs of the convolution, and of its two gradients in training."""
        s = self.shape
        forward = 2 * s.kernel**2 * self.batch * s.channels * s.output_size**2
        return 3 * forward if self.training else forward


class Block(nn.Module):
    """The op in PyTorch's own words, as timm's blocks run it."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__()
        shape, channels = problem.shape, problem.shape.channels

        def vector(mean: float, spread: float) -> nn.Parameter:
            values = torch.randn(channels, device=device) * spread + mean
            return nn.Parameter(values, requires_grad=problem.training)

        weight = torch.randn(channels, 1, shape.kernel, shape.kernel, device=device) / shape.kernel
        self.weight = nn.Parameter(weight.to(problem.dtype), requires_grad=problem.training)
        self.bn_weight, self.bn_bias = vector(1, 0.3), vector(0, 0.3)
        self.before_weight, self.before_bias = vector(1, 0.3), vector(0, 0.3)
        self.mean: Tensor
        self.var: Tensor
        self.before_mean: Tensor
        self.before_var: Tensor
        for name in ("", "before_"):
            self.register_buffer(f"{name}mean", torch.randn(channels, device=device) * 0.3)
            self.register_buffer(f"{name}var", torch.rand(channels, device=device) + 0.5)
        self.shape, self.mode = shape, problem.mode

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The activated output, and its sums over height and width in the pool's mode."""
        if self.mode == "inference+prologue":
            x = F.batch_norm(
                x, self.before_mean, self.before_var, self.before_weight, self.before_bias,
                False, 0.0, _EPS,
            )  # fmt: skip
            x = F.silu(x, inplace=True)
        k, stride = self.shape.kernel, self.shape.stride
        y = F.conv2d(x, self.weight, None, stride, k // 2, 1, self.shape.channels)
        training = self.mode == "training"
        mean, var = (None, None) if training else (self.mean, self.var)
        y = F.batch_norm(y, mean, var, self.bn_weight, self.bn_bias, training, 0.0, _EPS)
        y = F.silu(y, inplace=True)
        if self.mode == "inference+pool":
            return y, y.sum((2, 3), dtype=torch.promote_types(y.dtype, torch.float32))
        return (y,)


class OurBlock(Block):
    """The same in one call."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        super().__init__(problem, device)
        self.prologue: Prologue | None = None

    def fold(self) -> None:
        """Makes the BN before the convolution a scale and a shift, as in a loaded model."""
        if self.mode == "inference+prologue":
            scale = self.before_weight * (self.before_var + _EPS).rsqrt()
            shift = self.before_bias - self.before_mean * scale
            self.prologue = Prologue(scale, shift, "silu")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The activated output, and its sums over height and width in the pool's mode."""
        result = depthwise_conv_bn_act(
            x, self.weight, self.mean, self.var, self.bn_weight, self.bn_bias, self.shape.stride,
            self.shape.kernel // 2, training=self.mode == "training", eps=_EPS,
            pool=self.mode == "inference+pool", prologue=self.prologue,
        )  # fmt: skip
        return (result.output,) if result.pooled is None else (result.output, result.pooled)


@dataclass
class Inputs:
    """One set: the image, and the gradient of the output for training."""

    image: Tensor
    grad_output: Tensor | None

    def clone(self) -> Inputs:
        """The same values elsewhere in memory."""
        return self.to(lambda t: t.clone(memory_format=torch.preserve_format))

    def to(self, convert: Callable[[Tensor], Tensor]) -> Inputs:
        """The set with each tensor converted."""
        image = convert(self.image.detach()).requires_grad_(self.image.requires_grad)
        return Inputs(image, None if self.grad_output is None else convert(self.grad_output))


def _inputs(problem: Problem, device: torch.device) -> Inputs:
    shape = problem.shape
    image = torch.randn(problem.batch, shape.channels, shape.size, shape.size, device=device)
    image = image.to(problem.dtype).contiguous(memory_format=torch.channels_last)
    grad = None
    if problem.training:
        image.requires_grad_()
        out = shape.output_size
        grad = torch.randn(problem.batch, shape.channels, out, out, device=device)
        grad = grad.to(problem.dtype).contiguous(memory_format=torch.channels_last)
    return Inputs(image, grad)


def _caller(
    block: Block, backend: str | None, forward: Callable[[Tensor], Any] | None = None
) -> Callable[[Inputs], tuple[Tensor, ...]]:
    run = forward or block
    parameters = (block.weight, block.bn_weight, block.bn_bias)

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        if backend is not None:
            backends.set_backend(backend)
        outputs: tuple[Tensor, ...] = run(inputs.image)
        if inputs.grad_output is None:
            return outputs
        return *outputs, *torch.autograd.grad(
            outputs[0], (inputs.image, *parameters), inputs.grad_output
        )

    return call


def match(
    problem: Problem,
    device: torch.device,
    *,
    only: Sequence[str] | None = None,
    cold: bool = False,
) -> Match:
    """The contenders on one problem.

    Args:
        problem: what to run.
        device: where.
        only: contenders, of ``PEERS`` and the names of backends; all that can run unless given.
            The baseline is always among them.
        cold: prepare enough sets of inputs for cold caches.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    theirs, ours = Block(problem, device), OurBlock(problem, device)
    ours.load_state_dict(theirs.state_dict())
    ours.fold()
    base = _inputs(problem, device)
    sets = 1
    if cold:
        s = problem.shape
        pixels = s.size**2 + s.output_size**2
        sets = timing.sets_for_cold(
            problem.batch * s.channels * pixels * problem.dtype.itemsize,
            environment.cache_bytes(device),
            (16 if device.type == "cuda" else 1) << 30,
        )
    channels_last = [base, *(base.clone() for _ in range(sets - 1))]

    def wanted(name: str) -> bool:
        return only is None or name in only or name == BASELINE

    contenders = [Contender(BASELINE, _caller(theirs, None), channels_last)]
    if wanted("eager-nchw"):
        nchw = [inputs.to(Tensor.contiguous) for inputs in channels_last]
        contenders.append(Contender("eager-nchw", _caller(theirs, None), nchw))
    for name, mode in peers.COMPILED.items():
        if wanted(name) and (device.type == "cuda" or mode == "default"):
            freezing = device.type == "cpu" and not problem.training
            forward = peers.compiled(theirs, mode, freezing=freezing)
            contenders.append(Contender(name, _caller(theirs, None, forward), channels_last))
    for name in peers.our_backends(device, problem.dtype):
        if wanted(name):
            contenders.append(Contender(name, _caller(ours, name), channels_last))

    def named(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if problem.training:
            names = ("output", "grad_input", "grad_weight", "grad_bn_weight", "grad_bn_bias")
            return dict(zip(names, tensors, strict=True))
        return dict(zip(("output", "pooled"), tensors, strict=False))

    exact_block = Block(problem, device)
    exact_block.load_state_dict(theirs.state_dict())
    with torch.set_grad_enabled(problem.training):
        exact = named(_caller(exact_block.double(), None)(base.to(Tensor.double)))
    row = Row(
        problem.shape.model, str(problem.shape), problem.batch,
        str(problem.dtype).removeprefix("torch."), problem.mode, "",
        count=problem.shape.count, bytes=problem.bytes, flops=problem.flops,
    )  # fmt: skip
    return Match(row, contenders, named, exact, device, problem.dtype, problem.training)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument(
        "--models", nargs="+", choices=shapes.MODELS, default=["efficientnet_b0"],
        metavar="MODEL", help=f"whose depthwise convolutions, of {', '.join(shapes.MODELS)} "
        "(default: efficientnet_b0)",
    )  # fmt: skip
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE",
        help=f"of {', '.join(MODES)} (default: all)",
    )  # fmt: skip


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    for model in arguments.models:
        for dtype in arguments.dtypes:
            for mode in arguments.modes:
                for batch in arguments.batch:
                    for shape in shapes.depthwise_shapes(model):
                        yield Problem(shape, batch, dtype, mode)
