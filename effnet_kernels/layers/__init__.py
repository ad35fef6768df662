"""Modules on the ops. The adapters of other libraries' blocks, such as ``layers.timm``, are
imported only beside those libraries.
"""

from effnet_kernels.layers.depthwise_conv_bn_act import (
    DepthwiseConvBnAct,
    run_depthwise_conv_bn_act,
)
from effnet_kernels.layers.fused_mbconv import FusedMBConv
from effnet_kernels.layers.mbconv import MBConv
from effnet_kernels.layers.pointwise_conv_bn_act import PointwiseConvBnAct

__all__ = [
    "DepthwiseConvBnAct",
    "FusedMBConv",
    "MBConv",
    "PointwiseConvBnAct",
    "run_depthwise_conv_bn_act",
]
