"""Adapters for torchvision's blocks (torchvision 0.28). Importing this module imports torchvision.

As in ``layers.timm``, a stock block becomes a fused one by having its class changed. Blocks keep
their stages in a ``Sequential``: ``MBConv`` (expand,) depthwise, squeeze-and-excitation, project;
``FusedMBConv`` expand(, project).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.efficientnet import EfficientNet, FusedMBConv, MBConv
from torchvision.ops.misc import Conv2dNormActivation, SqueezeExcitation
from torchvision.ops.stochastic_depth import StochasticDepth

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
    named_refusal,
    pointwise_conv_refusal,
    squeeze_excite_parts_refusal,
)
from effnet_kernels.layers.fused_mbconv import FusedBlock, run_fused_mbconv
from effnet_kernels.layers.mbconv import Block, run_mbconv
from effnet_kernels.layers.prepared import prepared_network, stages_of
from effnet_kernels.layers.remembered import remembered
from effnet_kernels.layers.running_statistics import normalises_by_batch
from effnet_kernels.ops import squeeze_excite
from effnet_kernels.ops.prepared import (
    PreparedStage,
    prepare_average_pool,
    prepare_linear,
    prepare_pointwise_conv_bn_act,
)
from effnet_kernels.ops.squeeze_excite import GATES, HIDDEN_ACTIVATIONS

_OP = "mbconv"


class FusedTorchvisionMBConv(MBConv):  # type: ignore[misc]
    """``MBConv`` as one op, or with its depthwise stage and gate on ops."""

    def forward(self, input: Tensor) -> Tensor:
        """The block of input, (N, C, H, W)."""
        if (network := prepared_network(self, input)) is not None:
            return network(input)
        refused = call_refusal(_OP, input) is not None
        if not refused and (whole := remembered(self, _whole)) is not None:
            return run_mbconv(input, whole, lambda: _sample_scale(self.stochastic_depth, input))
        if refused or refusal(self) is not None:
            output: Tensor = super().forward(input)
            return output
        expand, depthwise, se, project = _children(self)
        stage, excite = _stage(depthwise), _excite(se)
        x = input if expand is None else expand(input)
        x, pooled = run_depthwise_conv_bn_act(x, *stage, conv_padding(stage.conv), pool=True)
        x = squeeze_excite(
            x, se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias, *excite[2:], pooled=pooled
        )
        result: Tensor = project(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result) + input
        return result


class FusedTorchvisionFusedMBConv(FusedMBConv):  # type: ignore[misc]
    """``FusedMBConv`` as one op."""

    def forward(self, input: Tensor) -> Tensor:
        """The block of input, (N, C, H, W)."""
        if (network := prepared_network(self, input)) is not None:
            return network(input)
        refused = call_refusal("fused_mbconv", input) is not None
        if not refused and (whole := remembered(self, _whole_fused)) is not None:
            drop = self.stochastic_depth
            return run_fused_mbconv(input, whole, lambda: _sample_scale(drop, input))
        output: Tensor = super().forward(input)
        return output


class FusedConv2dNormActivation(Conv2dNormActivation):  # type: ignore[misc]
    """``Conv2dNormActivation``, of a stem or a head, with its BN and activation as one op, a stem
    with its convolution.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Convolution, BN and activation of input, (N, C, H, W)."""
        if (network := prepared_network(self, input)) is not None:
            return network(input)
        if call_refusal("batch_norm_act", input) is not None or conv_norm_refusal(self) is not None:
            output: Tensor = super().forward(input)
            return output
        stage = _stage(self)
        if dense_conv_refusal("0", stage.conv) is None:
            block = FusedBlock(stage, None, None, conv_padding(stage.conv), residual=False)
            return run_fused_mbconv(input, block, lambda: None)
        return run_batch_norm_act(stage.conv(input), stage.norm, stage.activation)


class PreparedTorchvisionEfficientNet(EfficientNet):  # type: ignore[misc]
    """``EfficientNet`` that runs on packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        """The logits of x, (N, C, H, W)."""
        network = prepared_network(self, x)
        if network is not None and network.pools:
            return network(x)
        output: Tensor = super().forward(x)
        return output


def conv_norm_refusal(stage: Any) -> str | None:
    """Why the op cannot stand in for what follows the convolution of ``stage``, or None."""
    if len(stage) not in (2, 3) or type(stage[0]) is not nn.Conv2d:
        return "it is not a convolution, norm and activation"
    return _norm_act_refusal("it", stage) or statistics_refusal([stage[1]])


def _children(block: Any) -> tuple[Any, Any, Any, Any]:
    """(expand or None, depthwise, squeeze-and-excitation, project)"""
    children = list(block.block)
    return (None, *children) if len(children) == 3 else tuple(children)


def _stage(stage: Any) -> Stage:
    return Stage(stage[0], stage[1], ACTIVATIONS[type(stage[2])] if len(stage) > 2 else "identity")


def _excite(se: SqueezeExcitation) -> Excite:
    return Excite(
        se.fc1, se.fc2, ACTIVATIONS[type(se.activation)], ACTIVATIONS[type(se.scale_activation)]
    )


def _whole(block: MBConv) -> Block | None:
    """``block`` as one op, or None where it is not."""
    if refusal(block) is not None or whole_refusal(block) is not None:
        return None
    expand, depthwise, se, project = _children(block)
    stage = _stage(depthwise)
    return Block(
        None if expand is None else _stage(expand),
        stage,
        _excite(se),
        _stage(project),
        conv_padding(stage.conv),
        block.use_res_connect,
    )


def refusal(block: Any) -> str | None:
    """Why the ops for the depthwise stage and the gate cannot stand in for those of ``block``."""
    if type(block.block) is not nn.Sequential or len(block.block) not in (3, 4):
        return "block is not a Sequential of 3 or 4 stages"
    first = len(block.block) - 3
    _, depthwise, se, _ = _children(block)
    return (
        named_refusal("block", block.block)
        or _stage_refusal(f"block.{first}", depthwise)
        or depthwise_conv_refusal(f"block.{first}.0", depthwise[0])
        or _squeeze_excite_refusal(f"block.{first + 1}", se)
    )


def whole_refusal(block: Any) -> str | None:
    """Why ``block``, with nothing in ``refusal``, is not one op, or None."""
    expand, depthwise, _, project = _children(block)
    stages = [(f"block.{len(block.block) - 1}", project)]
    if expand is not None:
        stages.append(("block.0", expand))
    for name, stage in stages:
        reason = _stage_refusal(name, stage) or pointwise_conv_refusal(f"{name}.0", stage[0])
        if reason is not None:
            return reason
        if stage[0].bias is not None:
            return f"{name}.0 has a bias"
    norms = [stage[1] for stage in (expand, depthwise, project) if stage is not None]
    return _drop_refusal(block.stochastic_depth) or statistics_refusal(norms)


def fused_refusal(block: Any) -> str | None:
    """Why ``FusedMBConv`` ``block`` is not one op, or None."""
    if type(block.block) is not nn.Sequential or len(block.block) not in (1, 2):
        return "block is not a Sequential of 1 or 2 stages"
    stages: list[Any] = list(block.block)
    expand, *project = stages
    reason = (
        named_refusal("block", block.block)
        or _stage_refusal("block.0", expand)
        or dense_conv_refusal("block.0.0", expand[0])
    )
    for stage in project:
        reason = (
            reason
            or _stage_refusal("block.1", stage)
            or pointwise_conv_refusal("block.1.0", stage[0])
            or (None if stage[0].bias is None else "block.1.0 has a bias")
        )
    return (
        reason
        or _drop_refusal(block.stochastic_depth)
        or statistics_refusal([stage[1] for stage in stages])
    )


def _whole_fused(block: FusedMBConv) -> FusedBlock | None:
    """``block`` as one op, or None where it is not."""
    if fused_refusal(block) is not None:
        return None
    expand, *project = map(_stage, block.block)
    padding = conv_padding(expand.conv)
    return FusedBlock(expand, None, project[0] if project else None, padding, block.use_res_connect)


def _drop_refusal(drop: Any) -> str | None:
    """Why ``drop`` is no drop path."""
    if type(drop) is not StochasticDepth or drop.mode != "row":
        return "stochastic_depth does not drop whole images"
    return named_refusal("stochastic_depth", drop)


def _sample_scale(drop: Any, x: Tensor) -> Tensor | None:
    """What ``drop`` multiplies each image by, or None."""
    if not drop.training or drop.p == 0.0:
        return None
    return drawn_sample_scale(x, 1.0 - drop.p, rescaled=True)


def _stage_refusal(name: str, stage: Any) -> str | None:
    """Why ``stage`` is not a convolution, BN and a known activation and nothing else."""
    if type(stage) is not Conv2dNormActivation or len(stage) not in (2, 3):
        return f"{name} is a {type(stage).__name__}, not a convolution, norm and activation"
    if type(stage[0]) is not nn.Conv2d:
        return f"{name}.0 is a {type(stage[0]).__name__}, not a Conv2d"
    return (
        named_refusal(name, stage)
        or named_refusal(f"{name}.0", stage[0])
        or _norm_act_refusal(name, stage)
    )


def _norm_act_refusal(name: str, stage: Any) -> str | None:
    """Why what follows the convolution of ``stage`` is not BN and a known activation."""
    conv, norm = stage[0], stage[1]
    if type(norm) is not nn.BatchNorm2d:
        return f"{name}.1 is a {type(norm).__name__}, not a BatchNorm2d"
    if norm.num_features != conv.out_channels:
        return f"{name}.1 has {norm.num_features} channels, {name}.0 {conv.out_channels}"
    if len(stage) == 3 and type(stage[2]) not in ACTIVATIONS:
        return f"{name}.2 is a {type(stage[2]).__name__}, which no kernel knows"
    for i, module in enumerate(stage):
        reason = None if i == 0 else named_refusal(f"{name}.{i}", module)
        if reason is not None:
            return reason
    return None


def _squeeze_excite_refusal(name: str, se: Any) -> str | None:
    if type(se) is not SqueezeExcitation:
        return f"{name} is a {type(se).__name__}, not a SqueezeExcitation"
    convs = {f"{name}.{part}": getattr(se, part) for part in ("fc1", "fc2")}
    activations = {
        f"{name}.activation": (se.activation, HIDDEN_ACTIVATIONS),
        f"{name}.scale_activation": (se.scale_activation, GATES),
    }
    reason = squeeze_excite_parts_refusal(convs, activations, ACTIVATIONS)
    if reason is not None:
        return reason
    return named_refusal(f"{name}.avgpool", se.avgpool) or named_refusal(name, se)


def _block_stages(block: Any) -> Sequence[PreparedStage] | None:
    """``block`` with its weights packed, or None where it is not one op."""
    whole = _whole(block) if isinstance(block, MBConv) else _whole_fused(block)
    if whole is None or normalises_by_batch(whole.norms()[0]):
        return None
    stage = whole.prepared()
    return None if stage is None else [stage]


def _conv_norm_stages(module: Any) -> Sequence[PreparedStage] | None:
    """A stem's or a head's convolution with its BN and activation, or None."""
    if conv_norm_refusal(module) is not None or normalises_by_batch(module[1]):
        return None
    stage = _stage(module)
    if dense_conv_refusal("0", stage.conv) is None:
        block = FusedBlock(stage, None, None, conv_padding(stage.conv), residual=False)
        whole = block.prepared()
        return None if whole is None else [whole]
    if pointwise_conv_refusal("0", stage.conv) is None and stage.conv.bias is None:
        return [prepare_pointwise_conv_bn_act(stage.arguments())]
    return None


def _network_stages(model: EfficientNet) -> Sequence[PreparedStage] | None:
    """``model`` up to its logits, or None where a part is not the usual or not prepared."""
    if type(model.features) is not nn.Sequential or type(model.classifier) is not nn.Sequential:
        return None
    modules: list[nn.Module] = []
    for child in model.features:
        modules += child if type(child) is nn.Sequential else [child]
    stages: list[PreparedStage] = []
    for module in modules:
        found = stages_of(module)
        if found is None:
            return None
        stages += found
    pool, classifier = model.avgpool, list(model.classifier)
    if (
        type(pool) is not nn.AdaptiveAvgPool2d
        or pool.output_size not in (1, (1, 1))
        or [type(part) for part in classifier] != [nn.Dropout, nn.Linear]
    ):
        return None
    linear = prepare_linear(classifier[1].weight, classifier[1].bias)  # type: ignore[arg-type]
    return [*stages, prepare_average_pool(linear.in_channels, linear.dtype), linear]


ADAPTERS: tuple[Adapter, ...] = (
    Adapter(MBConv, FusedTorchvisionMBConv, refusal, _block_stages),
    Adapter(FusedMBConv, FusedTorchvisionFusedMBConv, fused_refusal, _block_stages),
    Adapter(Conv2dNormActivation, FusedConv2dNormActivation, conv_norm_refusal, _conv_norm_stages),
)
NETWORKS: tuple[Adapter, ...] = (
    Adapter(EfficientNet, PreparedTorchvisionEfficientNet, lambda model: None, _network_stages),
)
"""Models of which nothing but their parts is fused until they are prepared."""
