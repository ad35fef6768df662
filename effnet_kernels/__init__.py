"""Fused kernels for the EfficientNet family as PyTorch ops, for training and inference.

>>> import effnet_kernels, timm
>>> model = effnet_kernels.convert(timm.create_model("efficientnet_b0"))

``effnet_kernels.ops`` holds the ops, ``effnet_kernels.layers`` modules on them, ``convert``,
``prepare``, ``restore`` and ``report`` the drop-in for stock models, ``use_backend`` the choice of
kernels.
"""

from effnet_kernels import layers, ops
from effnet_kernels.backends import set_backend, use_backend
from effnet_kernels.convert import convert, prepare, report, restore

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "convert",
    "layers",
    "ops",
    "prepare",
    "report",
    "restore",
    "set_backend",
    "use_backend",
]
