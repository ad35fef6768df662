"""Cases of the depthwise op, and how each is run: by a backend, by eager, and in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effnet_kernels import use_backend
from effnet_kernels.ops import Prologue, depthwise_conv_bn_act


@dataclass(frozen=True)
class Case:
    """One call of ``depthwise_conv_bn_act``; what is not said is as in EfficientNet."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int | str | tuple[int, ...] = "same"
    activation: str = "silu"
    training: bool = False
    pool: bool = False
    prologue: str | None = None
    affine: bool = True
    layout: str = "channels_last"
    bn_dtype: torch.dtype | None = torch.float32
    """dtype of the BN vectors; None for the input's."""
    mean: float = 0.0
    """Added to the input, so that the statistics' mean is far from zero."""

    def __str__(self) -> str:
        words = [
            f"{self.batch}x{self.channels}x{self.height}x{self.width}",
            f"k{self.kernel}s{self.stride}p{self.padding}",
            self.activation,
            "train" if self.training else "eval",
        ]
        words += ["pool"] if self.pool else []
        words += [f"prologue-{self.prologue}"] if self.prologue else []
        words += [] if self.affine else ["no-affine"]
        words += [] if self.layout == "channels_last" else [self.layout]
        words += [] if self.bn_dtype is torch.float32 else [f"bn-{self.bn_dtype}"]
        words += [f"mean{self.mean:g}"] if self.mean else []
        return "-".join(words).replace(" ", "").replace("torch.", "")


# Every kernel size, stride, odd extent and channel count that the models or a test of them could
# bring, with the options rotated through so that each meets each kind of shape.
CASES = [
    Case(2, 24, 7, 7),
    Case(2, 24, 7, 7, training=True),
    Case(2, 24, 7, 7, kernel=5, pool=True, prologue="silu", training=True),
    Case(1, 8, 33, 17, kernel=5, stride=2),
    Case(1, 8, 33, 17, kernel=5, stride=2, training=True, pool=True, bn_dtype=None),
    Case(1, 13, 33, 17, kernel=3, stride=2, padding=1, prologue="silu"),
    Case(2, 13, 5, 6, kernel=7, stride=1, prologue="hardswish", training=True),
    Case(1, 13, 10, 9, kernel=7, stride=2, padding=3, pool=True, activation="hardswish"),
    Case(3, 96, 1, 1, kernel=3, padding=1, training=True),
    Case(3, 96, 1, 1, kernel=5, padding=2, stride=2, pool=True),
    Case(2, 8, 1, 1, kernel=7, padding=3, training=True, prologue="relu"),
    Case(1, 520, 7, 7, kernel=5, pool=True),
    Case(1, 520, 4, 3, kernel=3, training=True, pool=True, prologue="silu"),
    Case(1, 24, 8, 8, kernel=3, stride=2, padding=(0, 1, 0, 1), training=True),
    Case(1, 24, 8, 8, kernel=5, stride=2, padding=(1, 2, 1, 2), prologue="relu6"),
    Case(2, 24, 6, 11, kernel=3, padding=0, activation="relu", affine=False),
    Case(2, 24, 6, 11, kernel=3, padding=0, activation="relu6", affine=False, training=True),
    Case(2, 8, 6, 5, padding=(2, 0, 1, 2), activation="identity", prologue="identity"),
    Case(2, 8, 6, 5, activation="sigmoid", training=True, prologue="sigmoid"),
    Case(2, 8, 6, 5, activation="hardsigmoid", training=True, prologue="hardsigmoid", pool=True),
    Case(2, 8, 6, 5, activation="hardswish", training=True),
    Case(1, 1, 12, 5, kernel=3, training=True),
    Case(2, 24, 12, 12, layout="contiguous", stride=2, training=True),
    Case(2, 24, 12, 12, layout="strided", kernel=5, pool=True),
    Case(2, 24, 12, 12, training=True, mean=50.0, prologue="identity"),
]


@dataclass(frozen=True)
class Arguments:
    """The tensors of a case."""

    input: Tensor
    weight: Tensor
    running_mean: Tensor
    running_var: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    grad_output: Tensor
    grad_pooled: Tensor


def make_arguments(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Arguments:
    """Random arguments, rounded to the dtypes that the kernels will see."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, c, h, w = case.batch, case.channels, case.height, case.width
    bn_dtype = case.bn_dtype or dtype
    image = (random(n, c, h, w) + case.mean).to(dtype)
    image = image.to(device)
    if case.layout == "channels_last":
        image = image.contiguous(memory_format=torch.channels_last)
    elif case.layout == "strided":
        wide = torch.zeros(n, c, h, 2 * w, dtype=dtype, device=device)
        wide[..., ::2] = image
        image = wide[..., ::2]
    weight = (random(c, 1, case.kernel, case.kernel) / case.kernel).to(dtype).to(device)

    def vector(values: Tensor) -> Tensor:
        return values.to(bn_dtype).to(device)

    prologue = case.prologue is not None
    probe = depthwise_output_shape(case)
    return Arguments(
        input=image,
        weight=weight,
        running_mean=vector(random(c) * 0.3),
        running_var=vector(random(c).abs() + 0.3),
        bn_weight=vector(random(c) * 0.3 + 1) if case.affine else None,
        bn_bias=vector(random(c) * 0.3) if case.affine else None,
        scale=(random(c) * 0.3 + 1).float().to(device) if prologue else None,
        shift=(random(c) * 0.3).float().to(device) if prologue else None,
        grad_output=random(*probe).to(dtype).to(device),
        grad_pooled=random(n, c).float().to(device),
    )


def depthwise_output_shape(case: Case) -> tuple[int, int, int, int]:
    """(N, C, OH, OW), from the definition of the padding."""
    size = []
    for axis, extent in enumerate((case.height, case.width)):
        if case.padding == "same":
            size.append(-(-extent // case.stride))
            continue
        if isinstance(case.padding, int):
            total = 2 * case.padding
        else:
            left, right, top, bottom = case.padding
            total = (top + bottom, left + right)[axis]
        size.append((extent + total - case.kernel) // case.stride + 1)
    return (case.batch, case.channels, size[0], size[1])


def run(
    case: Case, arguments: Arguments, backend: str, *, double: bool = False
) -> dict[str, Tensor]:
    """Every result and gradient of ``case`` under ``backend``, by name; ``double``: in float64."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.detach().double() if double else tensor.detach()
        return tensor.requires_grad_()

    leaves = {
        name: leaf(getattr(arguments, name))
        for name in ("input", "weight", "bn_weight", "bn_bias", "scale", "shift")
    }
    prologue = None
    if case.prologue is not None:
        prologue = Prologue(leaves["scale"], leaves["shift"], case.prologue)
    running = [arguments.running_mean, arguments.running_var]
    if double:
        running = [t.double() for t in running]

    def call():
        return depthwise_conv_bn_act(
            leaves["input"],
            leaves["weight"],
            None if case.training else running[0],
            None if case.training else running[1],
            leaves["bn_weight"],
            leaves["bn_bias"],
            case.stride,
            case.padding,
            training=case.training,
            eps=1e-3,
            activation=case.activation,
            pool=case.pool,
            prologue=prologue,
        )

    with use_backend(backend):
        result = call()
        outputs, cotangents = [result.output], [arguments.grad_output]
        if result.pooled is not None:
            outputs.append(result.pooled)
            cotangents.append(arguments.grad_pooled)
        wanted = {name: t for name, t in leaves.items() if t is not None}
        grads = torch.autograd.grad(
            outputs,
            list(wanted.values()),
            [g.to(o.dtype) for g, o in zip(cotangents, outputs, strict=True)],
        )
        with torch.no_grad():
            inference = call()
    results = {"output": result.output, "output (no grad)": inference.output}
    if case.pool:
        results["pooled"] = result.pooled
        results["pooled (no grad)"] = inference.pooled
    if case.training:
        results["batch_mean"] = result.batch_mean
        results["batch_var"] = result.batch_var
    results.update({f"grad {name}": g for name, g in zip(wanted, grads, strict=True)})
    return results
