"""The ops: one file each, with the public function, the eager reference, the registered functional
ops with their fakes and derivatives, and the table of the memory traffic.
"""

from effnet_kernels.ops.depthwise_conv_bn_act import (
    DepthwiseConvBnActOutput,
    Prologue,
    depthwise_conv_bn_act,
)

__all__ = ["DepthwiseConvBnActOutput", "Prologue", "depthwise_conv_bn_act"]
