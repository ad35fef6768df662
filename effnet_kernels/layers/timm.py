"""Adapters for timm's blocks (timm 1.0.31). Importing this module imports timm.

Each adapter is a subclass of its stock block with another ``forward``, and a stock block becomes
one by having its class changed: children, parameters, ``state_dict`` and hooks stay where they are.
A block is one op: ``mbconv`` or ``fused_mbconv`` in inference, ``mbconv_train`` or
``fused_mbconv_train`` where gradients or batch statistics are wanted. Where something hangs on a
child that the op would bypass, Fused-MBConv is left to timm. Of MBConv the depthwise convolution,
its BN and its activation then run on one op, which also leaves the sums that squeeze-and-excitation
needs, and that on another; the rest is called as before, but for the expansion's BN and activation,
which in inference are the first op's prologue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import BatchNormAct2d, DropPath, Linear, SelectAdaptivePool2d
from timm.layers import activations as timm_act
from timm.layers import activations_me as timm_act_me
from timm.layers.adaptive_avgmax_pool import FastAdaptiveAvgPool
from timm.layers.conv2d_same import Conv2dSame
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
)
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import Tensor, nn

from effnet_kernels.layers.adapter import Adapter
from effnet_kernels.layers.batch_norm_act import run_batch_norm_act
from effnet_kernels.layers.block import Excite, Stage, drawn_sample_scale, statistics_refusal
from effnet_kernels.layers.depthwise_conv_bn_act import run_depthwise_conv_bn_act
from effnet_kernels.layers.eligibility import (
    ACTIVATIONS,
    call_refusal,
    conv_padding,
    dense_conv_refusal,
    depthwise_conv_refusal,
    module_refusal,
    named_refusal,
    pointwise_conv_refusal,
    squeeze_excite_parts_refusal,
)
from effnet_kernels.layers.fused_mbconv import FusedBlock, run_fused_mbconv
from effnet_kernels.layers.mbconv import Block, run_mbconv
from effnet_kernels.layers.prepared import prepared_network, stages_of
from effnet_kernels.layers.remembered import remembered
from effnet_kernels.layers.running_statistics import normalises_by_batch, updates_together
from effnet_kernels.ops import Prologue, pointwise_conv_bn_act, squeeze_excite
from effnet_kernels.ops.prepared import (
    PreparedStage,
    prepare_average_pool,
    prepare_fused_mbconv,
    prepare_linear,
    prepare_pointwise_conv_bn_act,
)
from effnet_kernels.ops.prologue import affine
from effnet_kernels.ops.squeeze_excite import GATES, HIDDEN_ACTIVATIONS

_OP = "depthwise_conv_bn_act"

_ACTIVATIONS: dict[type[nn.Module], str] = {
    **ACTIVATIONS,
    timm_act.Swish: "silu",
    timm_act_me.SwishMe: "silu",
    timm_act.HardSwish: "hardswish",
    timm_act_me.HardSwishMe: "hardswish",
    timm_act.Sigmoid: "sigmoid",
    timm_act.HardSigmoid: "hardsigmoid",
    timm_act_me.HardSigmoidMe: "hardsigmoid",
}


class FusedInvertedResidual(InvertedResidual):  # type: ignore[misc]
    """``InvertedResidual`` (MBConv) as one op, or with ``conv_dw`` and ``bn2`` as one."""

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        if (network := prepared_network(self, x)) is not None:
            return network(x)
        refused = call_refusal(_OP, x) is not None
        if not refused and (whole := remembered(self, _whole_inverted_residual)) is not None:
            return run_mbconv(x, whole, lambda: _sample_scale(self.drop_path, x))
        if refused or depthwise_refusal(self.conv_dw, "bn2", self.bn2) is not None:
            output: Tensor = super().forward(x)
            return output
        shortcut = x
        if self.conv_s2d is not None:
            x = self.conv_s2d(x)
            x = self.bn_s2d(x)
        x = self.conv_pw(x)
        prologue = None
        if torch.is_grad_enabled() or not _is_affine(self.bn1):
            x = self.bn1(x)
        else:
            prologue = _prologue(self.bn1)
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
        if (network := prepared_network(self, x)) is not None:
            return network(x)
        refused = call_refusal(_OP, x) is not None
        if not refused and (whole := remembered(self, _whole_depthwise_separable)) is not None:
            return run_mbconv(x, whole, lambda: _sample_scale(self.drop_path, x))
        if refused or depthwise_refusal(self.conv_dw, "bn1", self.bn1) is not None:
            output: Tensor = super().forward(x)
            return output
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


class FusedEdgeResidual(EdgeResidual):  # type: ignore[misc]
    """``EdgeResidual`` (Fused-MBConv) as one op."""

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        if (network := prepared_network(self, x)) is not None:
            return network(x)
        refused = call_refusal("fused_mbconv", x) is not None
        if not refused and (whole := remembered(self, _whole_edge_residual)) is not None:
            return run_fused_mbconv(x, whole, lambda: _sample_scale(self.drop_path, x))
        output: Tensor = super().forward(x)
        return output


class FusedConvBnAct(ConvBnAct):  # type: ignore[misc]
    """``ConvBnAct`` as one op; where something hangs on its convolution, or that is of a kind that
    no kernel knows, with its BN, activation, drop path and residual as one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The block of x, (N, C, H, W)."""
        if (network := prepared_network(self, x)) is not None:
            return network(x)
        refused = call_refusal("batch_norm_act", x) is not None
        if not refused and (whole := remembered(self, _whole_conv_bn_act)) is not None:
            return run_fused_mbconv(x, whole, lambda: _sample_scale(self.drop_path, x))
        if refused or conv_bn_act_refusal(self) is not None:
            output: Tensor = super().forward(x)
            return output
        bn, activation = self.bn1, _ACTIVATIONS[type(self.bn1.act)]
        shortcut = x if self.has_skip else None
        scale = _sample_scale(self.drop_path, x) if self.has_skip else None
        if _is_pointwise(self) and not (
            torch.is_grad_enabled() or normalises_by_batch(bn) or self.has_skip
        ):
            return pointwise_conv_bn_act(
                x, self.conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps,
                activation,
            ).output  # fmt: skip
        x = self.conv(x)
        if shortcut is not None and shortcut.dtype != x.dtype:  # under autocast
            return run_batch_norm_act(x, bn, activation, sample_scale=scale) + shortcut
        return run_batch_norm_act(x, bn, activation, residual=shortcut, sample_scale=scale)


class FusedBatchNormAct2d(BatchNormAct2d):  # type: ignore[misc]
    """``BatchNormAct2d``, of a stem or a head, as one op."""

    def forward(self, x: Tensor) -> Tensor:
        """BN and activation of x, (N, C, H, W)."""
        if call_refusal("batch_norm_act", x) is not None or norm_refusal(self) is not None:
            output: Tensor = super().forward(x)
            return output
        return run_batch_norm_act(x, self, _ACTIVATIONS[type(self.act)])


class FusedEfficientNet(EfficientNet):  # type: ignore[misc]
    """``EfficientNet`` whose stem and head, each a convolution, BN and activation, are one op in
    inference, and whose running statistics are updated together in training.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The logits of x, (N, C, H, W)."""
        network = prepared_network(self, x)
        if network is not None and network.pools:
            return network(x)
        output: Tensor = super().forward(x)
        return output

    def forward_features(self, x: Tensor) -> Tensor:
        """The features of x, (N, C, H, W), before the pool."""
        if (network := prepared_network(self, x)) is not None:
            return network.features(x)
        norm = self.bn2
        if (
            torch.is_grad_enabled()
            or call_refusal("pointwise_conv_bn_act", x) is not None
            or head_refusal(self) is not None
            or normalises_by_batch(norm)
        ):
            with updates_together():
                output: Tensor = super().forward_features(x)
            return output
        if stem_refusal(self) is None:
            stem = _stage(self.conv_stem, self.bn1)
            block = FusedBlock(stem, None, None, _padding(stem.conv), residual=False)
            x = run_fused_mbconv(x, block, lambda: None)
        else:
            x = self.bn1(self.conv_stem(x))
        x = self.blocks(x)
        return pointwise_conv_bn_act(
            x, self.conv_head.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias,
            norm.eps, _ACTIVATIONS[type(norm.act)],
        ).output  # fmt: skip


class PreparedMobileNetV3(MobileNetV3):  # type: ignore[misc]
    """``MobileNetV3`` that runs on packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        """The logits of x, (N, C, H, W)."""
        network = prepared_network(self, x)
        if network is not None and network.pools:
            return network(x)
        output: Tensor = super().forward(x)
        return output

    def forward_features(self, x: Tensor) -> Tensor:
        """The features of x, (N, C, H, W), before the pool."""
        if (network := prepared_network(self, x)) is not None:
            return network.features(x)
        output: Tensor = super().forward_features(x)
        return output


def head_refusal(model: EfficientNet) -> str | None:
    """Why the op cannot stand in for the head's convolution and BN, or None."""
    conv, norm = model.conv_head, model.bn2
    reason = pointwise_conv_refusal("conv_head", conv)
    if reason is not None:
        return reason
    if conv.bias is not None:
        return "conv_head has a bias"
    return _end_norm_refusal("bn2", norm)


def stem_refusal(model: EfficientNet | MobileNetV3) -> str | None:
    """Why the op cannot stand in for the stem's convolution and BN in inference, or None."""
    conv, norm = model.conv_stem, model.bn1
    reason = _dense_refusal("conv_stem", conv) or _end_norm_refusal("bn1", norm)
    if reason is not None:
        return reason
    return "bn1 normalises by the batch" if normalises_by_batch(norm) else None


def _end_norm_refusal(name: str, norm: BatchNormAct2d) -> str | None:
    """Why ``norm``, converted or not, is not BN and a known activation and nothing else."""
    if type(norm) is not FusedBatchNormAct2d and type(norm) is not BatchNormAct2d:
        return f"{name} is a {type(norm).__name__}, not a BatchNormAct2d"
    return named_refusal(name, norm) or _act_refusal(name, norm)


def _is_pointwise(block: ConvBnAct) -> bool:
    """Whether the convolution of ``block`` is a product with a matrix."""
    return pointwise_conv_refusal("conv", block.conv) is None and block.conv.bias is None


def conv_bn_act_refusal(block: ConvBnAct) -> str | None:
    """Why the op cannot stand in for what follows the convolution of ``block``, or None."""
    reason = _norm_act_refusal("bn1", block.bn1) or _idle_refusal(block)
    if reason is not None:
        return reason
    return statistics_refusal([block.bn1])


def norm_refusal(norm: BatchNormAct2d) -> str | None:
    """Why the op cannot stand in for ``norm``, whose own hooks run all the same, or None."""
    return _act_refusal("it", norm) or statistics_refusal([norm])


def edge_residual_refusal(block: EdgeResidual) -> str | None:
    """Why ``block`` is not one op, or None."""
    reason = (
        _dense_refusal("conv_exp", block.conv_exp)
        or _norm_act_refusal("bn1", block.bn1)
        or pointwise_conv_refusal("conv_pwl", block.conv_pwl)
        or _norm_act_refusal("bn2", block.bn2)
        or _idle_refusal(block)
    )
    if reason is not None:
        return reason
    if block.conv_pwl.bias is not None:
        return "conv_pwl has a bias"
    return statistics_refusal([block.bn1, block.bn2]) or _excite_refusal(block.se)


def _dense_refusal(name: str, conv: Any) -> str | None:
    """Why ``conv`` is no dense convolution that the op has."""
    if type(conv) is not nn.Conv2d and type(conv) is not Conv2dSame:
        return f"{name} is a {type(conv).__name__}, not a Conv2d or Conv2dSame"
    return dense_conv_refusal(name, conv)


def _whole_edge_residual(block: EdgeResidual) -> FusedBlock | None:
    """``block`` as one op, or None where it is not."""
    if edge_residual_refusal(block) is not None:
        return None
    expand, project = _stage(block.conv_exp, block.bn1), _stage(block.conv_pwl, block.bn2)
    padding = _padding(expand.conv)
    return FusedBlock(expand, _excite(block.se), project, padding, block.has_skip)


def _whole_conv_bn_act(block: ConvBnAct) -> FusedBlock | None:
    """``block`` as one op, or None where it is not."""
    if conv_bn_act_refusal(block) or _dense_refusal("conv", block.conv):
        return None
    expand = _stage(block.conv, block.bn1)
    return FusedBlock(expand, None, None, _padding(expand.conv), block.has_skip)


def whole_refusal(block: InvertedResidual | DepthwiseSeparableConv) -> str | None:
    """Why ``block``, whose depthwise stage the caller has checked, is not one op, or None."""
    convs: list[tuple[str, Any]] = [("conv_pw", block.conv_pw)]
    norms: list[tuple[str, Any]] = [("bn1", block.bn1), ("bn2", block.bn2)]
    if isinstance(block, InvertedResidual):
        convs.append(("conv_pwl", block.conv_pwl))
        norms.append(("bn3", block.bn3))
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
    reason = statistics_refusal([norm for _, norm in norms])
    if reason is not None:
        return reason
    if block.conv_s2d is not None:
        return "it has a space-to-depth convolution"
    return _idle_refusal(block) or _excite_refusal(block.se)


def _excite_refusal(se: Any) -> str | None:
    """Why ``se`` is neither squeeze-and-excitation that the op has nor nothing."""
    return named_refusal("se", se) if type(se) is nn.Identity else squeeze_excite_refusal(se)


def _whole_inverted_residual(block: InvertedResidual) -> Block | None:
    """``block`` as one op, or None where it is not."""
    if depthwise_refusal(block.conv_dw, "bn2", block.bn2) or whole_refusal(block):
        return None
    return _whole(
        block,
        _stage(block.conv_pw, block.bn1),
        _stage(block.conv_dw, block.bn2),
        _stage(block.conv_pwl, block.bn3),
    )


def _whole_depthwise_separable(block: DepthwiseSeparableConv) -> Block | None:
    """``block`` as one op, or None where it is not."""
    if depthwise_refusal(block.conv_dw, "bn1", block.bn1) or whole_refusal(block):
        return None
    return _whole(block, None, _stage(block.conv_dw, block.bn1), _stage(block.conv_pw, block.bn2))


def _whole(
    block: InvertedResidual | DepthwiseSeparableConv,
    expand: Stage | None,
    depthwise: Stage,
    project: Stage,
) -> Block:
    padding = _padding(depthwise.conv)
    return Block(expand, depthwise, _excite(block.se), project, padding, block.has_skip)


def _excite(se: Any) -> Excite | None:
    if type(se) is nn.Identity:
        return None
    return Excite(
        se.conv_reduce, se.conv_expand, _ACTIVATIONS[type(se.act1)], _ACTIVATIONS[type(se.gate)]
    )


def _sample_scale(drop_path: Any, x: Tensor) -> Tensor | None:
    """What timm's ``drop_path`` multiplies each image by, or None."""
    if type(drop_path) is nn.Identity or not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    return drawn_sample_scale(x, 1 - drop_path.drop_prob, rescaled=drop_path.scale_by_keep)


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
    return named_refusal(name, norm) or _act_refusal(name, norm)


def _act_refusal(name: str, norm: BatchNormAct2d) -> str | None:
    act, drop = norm.act, norm.drop
    if type(act) not in _ACTIVATIONS:
        return f"{name}.act is a {type(act).__name__}, which no kernel knows"
    if type(drop) is not nn.Identity:
        return f"{name}.drop is a {type(drop).__name__}"
    return named_refusal(f"{name}.act", act) or named_refusal(f"{name}.drop", drop)


def _idle_refusal(block: Any) -> str | None:
    """Why ``block``'s ``aa`` and ``drop_path`` do more than an op that stands in for them."""
    for name, module, known in (
        ("aa", block.aa, (nn.Identity,)),
        ("drop_path", block.drop_path, (nn.Identity, DropPath)),
    ):
        if type(module) not in known:
            return f"{name} is a {type(module).__name__}"
        reason = named_refusal(name, module)
        if reason is not None:
            return reason
    return None


def _is_affine(norm: BatchNormAct2d) -> bool:
    """Whether ``norm`` is an affine map by running statistics, and a known activation."""
    return (
        not norm.training
        and _norm_act_refusal("", norm) is None
        and norm.running_mean is not None
        and norm.running_var is not None
    )


def _prologue(norm: BatchNormAct2d) -> Prologue:
    """``norm`` in inference as the op's prologue.

    Computed at each call: a cache could not see weights changed through ``.data``.
    """
    scale, shift, _ = affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    return Prologue(scale, shift, _ACTIVATIONS[type(norm.act)])


def squeeze_excite_refusal(se: Any) -> str | None:
    """Why the op cannot stand in for a block's ``se``, or None."""
    if type(se) is not SqueezeExcite:
        return f"se is a {type(se).__name__}, not a SqueezeExcite"
    convs = {"se.conv_reduce": se.conv_reduce, "se.conv_expand": se.conv_expand}
    activations = {"se.act1": (se.act1, HIDDEN_ACTIVATIONS), "se.gate": (se.gate, GATES)}
    return squeeze_excite_parts_refusal(convs, activations, _ACTIVATIONS) or named_refusal("se", se)


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


def _stages_by(
    find: Callable[[Any], Block | FusedBlock | None],
) -> Callable[[Any], Sequence[PreparedStage] | None]:
    """What packs the blocks that ``find`` knows as a whole."""

    def stages(block: Any) -> Sequence[PreparedStage] | None:
        whole = find(block)
        if whole is None or normalises_by_batch(whole.norms()[0]):
            return None
        stage = whole.prepared()
        return None if stage is None else [stage]

    return stages


def _conv_bn_act_stages(block: ConvBnAct) -> Sequence[PreparedStage] | None:
    """``block`` with its weights packed, or None where it is not one op."""
    if not _is_pointwise(block):
        return _stages_by(_whole_conv_bn_act)(block)
    if conv_bn_act_refusal(block) or normalises_by_batch(block.bn1) or block.has_skip:
        return None
    return [prepare_pointwise_conv_bn_act(_stage(block.conv, block.bn1).arguments())]


def _features_stages(model: EfficientNet | MobileNetV3) -> list[PreparedStage] | None:
    """The stem and the blocks of ``model``, which are prepared, or None."""
    if stem_refusal(model) is not None or type(model.blocks) is not nn.Sequential:
        return None
    stem = _stage(model.conv_stem, model.bn1)
    stages = [
        prepare_fused_mbconv(stem.arguments(), None, stem.conv.stride[0], _padding(stem.conv))
    ]
    for group in model.blocks:
        if type(group) is not nn.Sequential:
            return None
        for block in group:
            found = stages_of(block)
            if found is None:
                return None
            stages += found
    return stages


def _efficientnet_stages(model: EfficientNet) -> Sequence[PreparedStage] | None:
    """``model`` up to its logits; up to its features where the rest is not the usual."""
    stages = _features_stages(model)
    if stages is None or head_refusal(model) is not None or normalises_by_batch(model.bn2):
        return None
    head = _stage(model.conv_head, model.bn2).arguments()
    stages.append(prepare_pointwise_conv_bn_act(head))
    pool, classifier = model.global_pool, _classifier_stages(model.classifier)
    if classifier is None or not _averages(pool) or not _flattens(pool):
        return stages
    return [*stages, prepare_average_pool(head.weight.shape[0], head.weight.dtype), *classifier]


def _mobilenetv3_stages(model: MobileNetV3) -> Sequence[PreparedStage] | None:
    """As ``_efficientnet_stages``; the convolution of the head comes after the pool."""
    stages = _features_stages(model)
    conv, classifier = model.conv_head, _classifier_stages(model.classifier)
    usual = (
        _averages(model.global_pool)
        and pointwise_conv_refusal("conv_head", conv) is None
        and type(model.norm_head) is nn.Identity
        and type(model.act2) in _ACTIVATIONS
        and type(model.flatten) is nn.Flatten
    )
    if stages is None or classifier is None or not usual:
        return stages
    head = prepare_linear(conv.weight, conv.bias, _ACTIVATIONS[type(model.act2)])
    return [*stages, prepare_average_pool(head.in_channels, head.dtype), head, *classifier]


def _classifier_stages(classifier: nn.Module) -> list[PreparedStage] | None:
    """What ``classifier`` does to vectors, or None where that is not known."""
    if type(classifier) is nn.Identity:
        return []
    if type(classifier) in (nn.Linear, Linear):
        return [prepare_linear(classifier.weight, classifier.bias)]  # type: ignore[arg-type]
    return None


def _averages(pool: Any) -> bool:
    """Whether ``pool`` is the mean of all pixels."""
    if type(pool) is not SelectAdaptivePool2d:
        return False
    mean = pool.pool
    return type(mean) is FastAdaptiveAvgPool or (
        type(mean) is nn.AdaptiveAvgPool2d and mean.output_size in (1, (1, 1))
    )


def _flattens(pool: Any) -> bool:
    """Whether ``pool``, which averages, gives vectors."""
    return getattr(pool.pool, "flatten", False) is True or type(pool.flatten) is nn.Flatten


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        InvertedResidual,
        FusedInvertedResidual,
        lambda block: depthwise_refusal(block.conv_dw, "bn2", block.bn2),
        _stages_by(_whole_inverted_residual),
    ),
    Adapter(
        DepthwiseSeparableConv,
        FusedDepthwiseSeparableConv,
        lambda block: depthwise_refusal(block.conv_dw, "bn1", block.bn1),
        _stages_by(_whole_depthwise_separable),
    ),
    Adapter(
        EdgeResidual,
        FusedEdgeResidual,
        edge_residual_refusal,
        _stages_by(_whole_edge_residual),
    ),
    Adapter(ConvBnAct, FusedConvBnAct, conv_bn_act_refusal, _conv_bn_act_stages),
    Adapter(BatchNormAct2d, FusedBatchNormAct2d, norm_refusal),
    Adapter(EfficientNet, FusedEfficientNet, head_refusal, _efficientnet_stages),
)
NETWORKS: tuple[Adapter, ...] = (
    Adapter(MobileNetV3, PreparedMobileNetV3, stem_refusal, _mobilenetv3_stages),
)
"""Models of which nothing but their blocks is fused until they are prepared."""
