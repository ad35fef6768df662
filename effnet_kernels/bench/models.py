"""timm's models, stock and converted, beside ``torch.compile`` and other engines: inference and
training steps.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import effnet_kernels
from effnet_kernels.bench import engines, environment, peers, timing, xla
from effnet_kernels.bench.peers import Match
from effnet_kernels.bench.results import BASELINE, Row
from effnet_kernels.bench.timing import Contender

NAME = "models-efficientnet"
MODES = ("inference", "inference-autocast", "training", "training-pure")
"""A forward pass in evaluation mode; forward, cross-entropy and backward in training mode. A dtype
of 16 bits is that of parameters and images in ``inference`` and ``training-pure``, and in the other
two that of autocast over float32 ones; in float32 there are only ``inference`` and ``training``.
"""
PEERS = (
    BASELINE, "eager-nchw", *peers.COMPILED, "compile-unfrozen", *engines.ENGINES, xla.NAME
)  # fmt: skip
"""``compile`` freezes the parameters in inference on a CPU, ``compile-unfrozen`` does not; that one
and those of ``engines`` run in nothing else.
"""
MODELS = (
    "efficientnet_b0@224", "efficientnet_b4@380", "tf_efficientnetv2_s@300", "efficientnetv2_s@384",
)  # fmt: skip
"""What is measured by default. V2-S at its sizes in training and after it, in both paddings."""

_RESIDUAL = 0.3
_SHORT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Problem:
    """One model at one resolution, batch, dtype and mode, of ``MODES``."""

    model: str
    resolution: int
    batch: int
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.model} at {self.resolution} batch {self.batch} {dtype} {self.mode}"

    @property
    def training(self) -> bool:
        """Forward and backward, instead of inference."""
        return self.mode.startswith("training")

    @property
    def autocast(self) -> torch.dtype | None:
        """What autocast is to compute in; None where it is off."""
        pure = self.mode in ("inference", "training-pure")
        return None if pure or self.dtype not in _SHORT else self.dtype

    @property
    def parameters(self) -> torch.dtype:
        """Of the model's parameters and the images."""
        return self.dtype if self.autocast is None else torch.float32


def create(name: str) -> nn.Module:
    """timm's model ``name``, with seeded weights and plausible BN statistics.

    Residual branches are as weak as those of a trained model. A fresh one of thirty blocks makes
    anything of a rounding: between eager's own two layouts the error then differs by factors.

    Raises:
        ValueError: timm has no such model.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model: timm has no {name!r}")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    for block in model.modules():
        if getattr(block, "has_skip", False):
            last = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)][
                -1
            ]
            nn.init.constant_(last.weight, _RESIDUAL)
    calibrate(model, [torch.randn(4, 3, 128, 128) for _ in range(2)])
    return model.eval()


def calibrate(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Sets the BN statistics of a model to those of some images.

    A fresh model's are those of no data: its activations shrink layer by layer, to logits of
    nothing but rounding.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the plain average
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for images in batches:
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def flops(model: nn.Module, problem: Problem) -> int:
    """FLOPs of the convolutions and matrix products in one call of a problem.

    In training that is three times those forward, but for the gradient by the images, which nobody
    asks for.

    Args:
        model: a stock model, which stays as it is; nothing is computed, it is traced on the meta
            device.
        problem: says the images' extents and whether there is a backward pass.
    """
    traced = copy.deepcopy(model).to("meta").train(problem.training)
    images = torch.empty(
        problem.batch, 3, problem.resolution, problem.resolution, device="meta"
    ).to(next(traced.parameters()).dtype)
    # PyTorch's own formula takes a grouped convolution's weight gradient for a dense one's.
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with torch.set_grad_enabled(problem.training), counter:
        logits = traced(images)
        if problem.training:
            torch.autograd.grad(logits.sum(), list(traced.parameters()))
    return int(counter.get_total_flops())


def _convolution_backward_flops(
    grad_output: list[int], input: list[int], weight: list[int], bias: Any, stride: Any,
    padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
    output_mask: list[bool], out_shape: Any,
) -> int:  # fmt: skip
    """The shapes' FLOPs: each gradient that is asked for has the forward convolution's."""
    return sum(output_mask[:2]) * conv_flop_count(input, weight, grad_output, transposed)


@dataclass
class Inputs:
    """One set: images, and classes for training."""

    images: Tensor
    classes: Tensor

    def to(self, convert: Callable[[Tensor], Tensor]) -> Inputs:
        """The set with its images converted."""
        return Inputs(convert(self.images), self.classes)


def _caller(
    model: Callable[[Tensor], Tensor], problem: Problem, parameters: Sequence[Tensor],
    backend: str | None,
) -> Callable[[Inputs], tuple[Tensor, ...]]:  # fmt: skip
    autocast = problem.autocast

    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        if backend is not None:
            peers.demand(backend)
        with torch.autocast(inputs.images.device.type, autocast, enabled=autocast is not None):
            logits = model(inputs.images)
        if not problem.training:
            return (logits,)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)),
                               inputs.classes)  # fmt: skip
        return logits, *torch.autograd.grad(loss, parameters)

    return call


def _xla_contender(step: xla.Call, problem: Problem, sets: Sequence[Inputs]) -> Contender:
    def call(inputs: Inputs) -> tuple[Tensor, ...]:
        return step(inputs.images, inputs.classes) if problem.training else step(inputs.images)

    # Classes as JAX has integers, or it would convert them in every call.
    own = [Inputs(inputs.images, inputs.classes.int()) for inputs in sets]
    return Contender(xla.NAME, call, own, allocates=False, capturable=False)


def match(
    problem: Problem,
    device: torch.device,
    *,
    only: Sequence[str] | None = None,
    cold: bool = False,
) -> Match:
    """The contenders on one problem, with random images.

    Args:
        problem: what to run.
        device: where.
        only: contenders: of ``PEERS``, a backend's name, or a backend's name and ``+compile`` or,
            in inference on a CPU, ``+prepared``; all that can run unless given. The baseline is
            always among them. An engine that is not installed, or cannot compute in the problem's
            dtype, is a failed row.
        cold: prepare enough sets of images for cold caches.
    """
    stock = create(problem.model)
    torch.manual_seed(1)
    images = torch.randn(problem.batch, 3, problem.resolution, problem.resolution)
    return match_on(stock, images, problem, device, only=only, cold=cold)


def match_on(
    stock: nn.Module,
    images: Tensor,
    problem: Problem,
    device: torch.device,
    *,
    only: Sequence[str] | None = None,
    cold: bool = False,
) -> Match:
    """``match`` with a model and images of the caller's; both stay as they are."""
    torch._dynamo.reset()
    stock = copy.deepcopy(stock).to(device)
    classes = torch.arange(problem.batch, device=device) % 1000
    base = Inputs(images.to(device, problem.parameters), classes)
    sets = 1
    if cold:
        cache = environment.cache_bytes(device)
        sets = timing.sets_for_cold(base.images.nbytes, cache, 1 << 30)
    nchw = [base, *(base.to(Tensor.clone) for _ in range(sets - 1))]
    channels_last = [
        inputs.to(lambda t: t.contiguous(memory_format=torch.channels_last)) for inputs in nchw
    ]

    def fresh(layout: torch.memory_format = torch.channels_last) -> nn.Module:
        model = copy.deepcopy(stock)
        model.to(dtype=problem.parameters, memory_format=layout)  # type: ignore[call-overload]
        return model.train(problem.training)

    def caller(model: nn.Module, forward: Any = None, backend: str | None = None) -> Any:
        return _caller(forward or model, problem, list(model.parameters()), backend)

    def wanted(name: str) -> bool:
        return only is None or name in only or name == BASELINE

    inference_on_cpu = device.type == "cpu" and not problem.training
    # Under autocast a prepared model runs as a converted one, and an engine has no such thing.
    packs = inference_on_cpu and problem.autocast is None

    def compile_of(model: nn.Module, mode: str) -> Any:
        return peers.compiled(model, mode, freezing=inference_on_cpu)

    contenders = [Contender(BASELINE, caller(fresh()), channels_last)]
    if wanted("eager-nchw"):
        model = fresh(torch.contiguous_format)
        contenders.append(Contender("eager-nchw", caller(model), nchw))
    for name, mode in peers.COMPILED.items():
        if wanted(name) and (device.type == "cuda" or mode == "default"):
            model = fresh()
            call = caller(model, compile_of(model, mode))
            contenders.append(Contender(name, call, channels_last))
    if inference_on_cpu and wanted("compile-unfrozen"):
        model = fresh()
        forward = peers.compiled(model, "default", freezing=False)
        contenders.append(Contender("compile-unfrozen", caller(model, forward), channels_last))
    for name in engines.ENGINES:
        if packs and wanted(name):
            model = fresh(torch.contiguous_format)
            forward = engines.lazy_forward(name, model, problem.dtype)
            # Float32, whatever the engine computes in, but the same numbers that the others get.
            own = [inputs.to(lambda t: t.to(torch.float32, copy=True)) for inputs in nchw]
            contenders.append(Contender(name, caller(model, forward), own, allocates=False))
    if wanted(xla.NAME):
        forward = xla.lazy_call(fresh(torch.contiguous_format), problem.autocast)
        contenders.append(_xla_contender(forward, problem, nchw))
    for backend in peers.our_backends(device, problem.dtype):
        if wanted(backend):
            model = effnet_kernels.convert(fresh())
            contenders.append(Contender(backend, caller(model, None, backend), channels_last))
        if packs and wanted(f"{backend}+prepared"):
            model = effnet_kernels.prepare(fresh())
            name, call = f"{backend}+prepared", caller(model, None, backend)
            # What lies between its stages is memory of its own.
            contenders.append(Contender(name, call, channels_last, allocates=False))
        if wanted(f"{backend}+compile"):
            model = effnet_kernels.convert(fresh())
            call = caller(model, compile_of(model, "default"), backend)
            contenders.append(Contender(f"{backend}+compile", call, channels_last))

    def named(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        # One vector of all gradients, or a scalar parameter's rounding would decide.
        gradients = [t.flatten().double() for t in tensors[1:]]
        return {"logits": tensors[0], **({"grad": torch.cat(gradients)} if gradients else {})}

    exact_model = fresh().double()  # of the rounded parameters
    recompute: Any = getattr(exact_model, "set_grad_checkpointing", None)
    if problem.training and recompute is not None:
        recompute()  # or in float64 a batch that fills a GPU would not fit
    exact_call = _caller(
        exact_model, replace(problem, dtype=torch.float64), list(exact_model.parameters()), None
    )
    with torch.set_grad_enabled(problem.training):
        exact = named(exact_call(base.to(Tensor.double)))
    row = Row(
        problem.model, f"{problem.resolution}x{problem.resolution}", problem.batch,
        str(problem.dtype).removeprefix("torch."), problem.mode, "", flops=flops(stock, problem),
    )  # fmt: skip
    return Match(row, contenders, named, exact, device, problem.dtype, problem.training)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite's own options."""
    parser.add_argument(
        "--models", nargs="+", metavar="NAME[@SIZE]",
        default=list(MODELS),
        help=f"timm's models, each at a resolution (default: {' '.join(MODELS)}; without @SIZE, "
        "the model's own)",
    )  # fmt: skip
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=["inference", "training"], metavar="MODE",
        help=f"of {', '.join(MODES)}; a dtype of 16 bits is the parameters' in inference and "
        "training-pure, autocast's in the others (default: inference training)",
    )  # fmt: skip


def resolved(spelling: str) -> tuple[str, int]:
    """``name@size`` as the name and the size; the model's own size where none is given.

    Raises:
        ValueError: the size is no number, or timm has no such model.
    """
    import timm

    name, _, size = spelling.partition("@")
    if not timm.is_model(name):
        raise ValueError(f"--models: timm has no {name!r}")
    if not size:
        size = str(timm.get_pretrained_cfg(name).to_dict()["input_size"][-1])
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"--models: got size {size!r} of {name}, expected a number of pixels")
    return name, int(size)


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """The problems that the options ask for."""
    for name, size in [resolved(spelling) for spelling in arguments.models]:
        for dtype in arguments.dtypes:
            for mode in arguments.modes:
                if dtype not in _SHORT and mode not in ("inference", "training"):
                    continue
                for batch in arguments.batch:
                    yield Problem(name, size, batch, dtype, mode)
