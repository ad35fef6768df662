"""Adapters for timm's blocks (timm 1.0.31). Importing this module imports timm.

Each adapter is a subclass of its stock block with another ``forward``, and a stock block becomes
one by having its class changed: children, parameters, ``state_dict`` and hooks stay where they are.
In inference a block is one op, ``mbconv``. Where a gradient is wanted, or something hangs on a child
that the op would bypass, the depthwise convolution, its BN and its activation run on one op, which
also leaves the sums that squeeze-and-excitation needs, and that on another; the rest is called as
before, but for the expansion's BN and activation, which in inference are the first op's prologue.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, DropPath
from timm.layers import activations as timm_act
from timm.layers import activations_me as timm_act_me
from timm.layers.conv2d_same import Conv2dSame
from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    InvertedResidual,
    SqueezeExcite,
)
from torch import Tensor, nn

from effnet_kernels.layers.adapter import Adapter
from effnet_kernels.layers.depthwise_conv_bn_act import run_depthwise_conv_bn_act
from effnet_kernels.layers.eligibility import (
    call_refusal,
    conv_padding,
    depthwise_conv_refusal,
    module_refusal,
    pointwise_conv_refusal,
)
from effnet_kernels.layers.mbconv import Excite, Stage, run_mbconv
from effnet_kernels.ops import Prologue, squeeze_excite
from effnet_kernels.ops.squeeze_excite import GATES, HIDDEN_ACTIVATIONS

_OP = "depthwise_conv_bn_act"

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    timm_act.Swish: "silu",
    timm_act_me.SwishMe: "silu",
    nn.Hardswish: "hardswish",
    timm_act.HardSwish: "hardswish",
    timm_act_me.HardSwishMe: "hardswish",
    nn.Sigmoid: "sigmoid",
    timm_act.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    timm_act.HardSigmoid: "hardsigmoid",
    timm_act_me.HardSigmoidMe: "hardsigmoid",
}


class FusedInvertedResidual(InvertedResidual):  # type: ignore[misc]
    """``InvertedResidual`` (MBConv) as one op, or with ``conv_dw`` and ``bn2`` as one."""

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        if not _takes(x, self.conv_dw, "bn2", self.bn2):
            output: Tensor = super().forward(x)
            return output
        if not torch.is_grad_enabled() and inference_refusal(self) is None:
            return _run_mbconv(
                self, x, (self.conv_pw, self.bn1), (self.conv_dw, self.bn2), (self.conv_pwl, self.bn3)
            )
        shortcut = x
        if self.conv_s2d is not None:
            x = self.conv_s2d(x)
            x = self.bn_s2d(x)
        x = self.conv_pw(x)
        prologue = None
        if torch.is_grad_enabled() or not _is_affine(self.bn1):
            x = self.bn1(x)
        else:
            prologue = _prologue(self.bn1, x.dtype)
        x = _depthwise_squeeze_excite(self, x, self.bn2, prologue)
        x = self.conv_pwl(x)
        x = self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class FusedDepthwiseSeparableConv(DepthwiseSeparableConv):  # type: ignore[misc]
    """``DepthwiseSeparableConv`` (MBConv without expansion), in the same ways."""

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        if not _takes(x, self.conv_dw, "bn1", self.bn1):
            output: Tensor = super().forward(x)
            return output
        if not torch.is_grad_enabled() and inference_refusal(self) is None:
            return _run_mbconv(self, x, None, (self.conv_dw, self.bn1), (self.conv_pw, self.bn2))
        shortcut = x
        if self.conv_s2d is not None:
            x = self.conv_s2d(x)
            x = self.bn_s2d(x)
        x = _depthwise_squeeze_excite(self, x, self.bn1, None)
        x = self.conv_pw(x)
        x = self.bn2(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


def _takes(x: Tensor, conv: nn.Conv2d, bn_name: str, bn: BatchNormAct2d) -> bool:
    return call_refusal(_OP, x) is None and depthwise_refusal(conv, bn_name, bn) is None


def inference_refusal(block: InvertedResidual | DepthwiseSeparableConv) -> str | None:
    """Why ``block``, whose depthwise stage the caller has checked, is not one op in inference."""
    if type(block) is FusedInvertedResidual or type(block) is InvertedResidual:
        convs = (("conv_pw", block.conv_pw), ("conv_pwl", block.conv_pwl))
        norms = (("bn1", block.bn1), ("bn2", block.bn2), ("bn3", block.bn3))
    else:
        convs = (("conv_pw", block.conv_pw),)
        norms = (("bn1", block.bn1), ("bn2", block.bn2))
    for name, conv in convs:
        reason = pointwise_conv_refusal(name, conv)
        if reason is not None:
            return reason
        if conv.bias is not None:
            return f"{name} has a bias"
    for name, norm in norms:
        reason = _norm_act_refusal(name, norm)
        if reason is not None:
            return reason
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return f"{name} normalises by the statistics of the batch"
    if block.conv_s2d is not None:
        return "it has a space-to-depth convolution"
    for name, module in (("aa", block.aa), ("drop_path", block.drop_path)):
        idle = type(module) is nn.Identity or (type(module) is DropPath and not module.training)
        reason = None if idle else f"is a {type(module).__name__}"
        reason = reason or module_refusal(module)
        if reason is not None:
            return f"{name} {reason}"
    if type(block.se) is nn.Identity:
        reason = module_refusal(block.se)
        return None if reason is None else f"se {reason}"
    return squeeze_excite_refusal(block.se)


_ConvNorm = tuple[nn.Conv2d, BatchNormAct2d]


def _run_mbconv(
    block: InvertedResidual | DepthwiseSeparableConv,
    x: Tensor,
    expand: _ConvNorm | None,
    depthwise: _ConvNorm,
    project: _ConvNorm,
) -> Tensor:
    """A block that ``inference_refusal`` has nothing against."""
    se = block.se
    return run_mbconv(
        x,
        None if expand is None else _stage(*expand),
        _stage(*depthwise),
        None
        if type(se) is nn.Identity
        else Excite(
            se.conv_reduce,
            se.conv_expand,
            _ACTIVATIONS[type(se.act1)],
            _ACTIVATIONS[type(se.gate)],
        ),
        _stage(*project),
        _padding(depthwise[0]),
        residual=block.has_skip,
    )


def _stage(conv: nn.Conv2d, norm: BatchNormAct2d) -> Stage:
    return Stage(conv, norm, _ACTIVATIONS[type(norm.act)])


def _padding(conv: nn.Conv2d) -> str | tuple[int, int]:
    return "same" if type(conv) is Conv2dSame else conv_padding(conv)


def depthwise_refusal(conv: nn.Conv2d, bn_name: str, bn: BatchNormAct2d) -> str | None:
    """Why the op cannot stand in for a block's ``conv_dw`` and the BN after it, or None."""
    if type(conv) is not nn.Conv2d and type(conv) is not Conv2dSame:
        return f"conv_dw is a {type(conv).__name__}, not a Conv2d or Conv2dSame"
    reason = depthwise_conv_refusal("conv_dw", conv) or _norm_act_refusal(bn_name, bn)
    if reason is None and bn.num_features != conv.out_channels:
        return f"{bn_name} has {bn.num_features} channels, conv_dw {conv.out_channels}"
    return reason


def _norm_act_refusal(name: str, norm: BatchNormAct2d) -> str | None:
    """Why ``norm`` is not BN and a known activation and nothing else."""
    if type(norm) is not BatchNormAct2d:
        return f"{name} is a {type(norm).__name__}, not a BatchNormAct2d"
    act, drop = norm.act, norm.drop
    if type(act) not in _ACTIVATIONS:
        return f"{name}.act is a {type(act).__name__}, which no kernel knows"
    if type(drop) is not nn.Identity:
        return f"{name}.drop is a {type(drop).__name__}"
    for part, module in (("", norm), (".act", act), (".drop", drop)):
        reason = module_refusal(module)
        if reason is not None:
            return f"{name}{part} {reason}"
    return None


def _is_affine(norm: BatchNormAct2d) -> bool:
    """Whether ``norm`` is an affine map by running statistics, and a known activation."""
    return (
        not norm.training
        and _norm_act_refusal("", norm) is None
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def _prologue(norm: BatchNormAct2d, dtype: torch.dtype) -> Prologue:
    """``norm`` in inference as the op's prologue.

    Computed at each call: a cache could not see weights changed through ``.data``.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = norm.running_mean, norm.running_var
    weight, bias = norm.weight, norm.bias
    scale = (var.to(accumulator) + norm.eps).rsqrt_()
    if weight is not None:
        scale = scale.mul_(weight)
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return Prologue(scale, shift.to(accumulator), _ACTIVATIONS[type(norm.act)])


def squeeze_excite_refusal(se: nn.Module) -> str | None:
    """Why the op cannot stand in for a block's ``se``, or None."""
    if type(se) is not SqueezeExcite:
        return f"se is a {type(se).__name__}, not a SqueezeExcite"
    convs: tuple[tuple[str, Any], ...] = (
        ("conv_reduce", se.conv_reduce),
        ("conv_expand", se.conv_expand),
    )
    for name, conv in convs:
        reason = pointwise_conv_refusal(f"se.{name}", conv)
        if reason is not None:
            return reason
    activations: tuple[tuple[str, Any, tuple[str, ...]], ...] = (
        ("act1", se.act1, HIDDEN_ACTIVATIONS),
        ("gate", se.gate, GATES),
    )
    for name, activation, known in activations:
        if _ACTIVATIONS.get(type(activation), "") not in known:
            return f"se.{name} is a {type(activation).__name__}, which no kernel knows"
        reason = module_refusal(activation)
        if reason is not None:
            return f"se.{name} {reason}"
    reason = module_refusal(se)
    return None if reason is None else f"se {reason}"


def _depthwise_squeeze_excite(
    block: InvertedResidual | DepthwiseSeparableConv,
    x: Tensor,
    bn: BatchNormAct2d,
    prologue: Prologue | None,
) -> Tensor:
    """From a block's ``conv_dw`` to its ``se``, with ``bn`` in between."""
    conv, se = block.conv_dw, block.se
    # Between the sums and their use nothing may change the tensor.
    fused = (
        squeeze_excite_refusal(se) is None
        and type(block.aa) is nn.Identity
        and module_refusal(block.aa) is None
    )
    x, pooled = run_depthwise_conv_bn_act(
        x, conv, bn, _ACTIVATIONS[type(bn.act)], _padding(conv), pool=fused, prologue=prologue
    )
    if not fused:
        x = block.aa(x)
        x = se(x)
        return x
    reduce, expand = se.conv_reduce, se.conv_expand
    return squeeze_excite(
        x, reduce.weight, reduce.bias, expand.weight, expand.bias,
        _ACTIVATIONS[type(se.act1)], _ACTIVATIONS[type(se.gate)], pooled=pooled,
    )  # fmt: skip


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        InvertedResidual,
        FusedInvertedResidual,
        lambda block: depthwise_refusal(block.conv_dw, "bn2", block.bn2),
    ),
    Adapter(
        DepthwiseSeparableConv,
        FusedDepthwiseSeparableConv,
        lambda block: depthwise_refusal(block.conv_dw, "bn1", block.bn1),
    ),
)
