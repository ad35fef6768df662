"""The ops: one file each, with the public function, the eager reference, the registered functional
ops with their fakes and derivatives, and the table of the memory traffic.
"""

from effnet_kernels.ops.batch_norm_act import BatchNormActOutput, batch_norm_act
from effnet_kernels.ops.block import ConvBn, SqueezeExcite
from effnet_kernels.ops.depthwise_conv_bn_act import (
    DepthwiseConvBnActOutput,
    depthwise_conv_bn_act,
)
from effnet_kernels.ops.fused_mbconv import fused_mbconv
from effnet_kernels.ops.fused_mbconv_train import FusedMbconvTrainOutput, fused_mbconv_train
from effnet_kernels.ops.mbconv import mbconv
from effnet_kernels.ops.mbconv_train import MbconvTrainOutput, mbconv_train
from effnet_kernels.ops.pointwise_conv_bn_act import (
    PointwiseConvBnActOutput,
    pointwise_conv_bn_act,
)
from effnet_kernels.ops.prologue import Prologue
from effnet_kernels.ops.squeeze_excite import squeeze_excite, squeeze_excite_gate

__all__ = [
    "BatchNormActOutput",
    "ConvBn",
    "DepthwiseConvBnActOutput",
    "FusedMbconvTrainOutput",
    "MbconvTrainOutput",
    "PointwiseConvBnActOutput",
    "Prologue",
    "SqueezeExcite",
    "batch_norm_act",
    "depthwise_conv_bn_act",
    "fused_mbconv",
    "fused_mbconv_train",
    "mbconv",
    "mbconv_train",
    "pointwise_conv_bn_act",
    "squeeze_excite",
    "squeeze_excite_gate",
]
