"""The EfficientNet family in plain PyTorch, on the layers of ``effnet_kernels``.

>>> import effnet
>>> model = effnet.efficientnet_b0()
"""

from effnet.efficientnet import EfficientNet, MBConv, Stage, efficientnet_b0
from effnet.weights import from_timm_state_dict

__all__ = ["EfficientNet", "MBConv", "Stage", "efficientnet_b0", "from_timm_state_dict"]
