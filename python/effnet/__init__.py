"""The EfficientNet family in plain PyTorch, on the layers of ``effnet_kernels``.

>>> import effnet
>>> model = effnet.create_model("efficientnet_b0", num_classes=10)

``variants`` has the tables, ``efficientnet`` the network, ``weights`` the names that other
libraries have for its parameters, ``complexity`` what it costs, ``scaling`` how it and the networks
of ``baselines`` grow.
"""

from effnet.baselines import BASELINES, Baseline
from effnet.complexity import Complexity, complexity
from effnet.efficientnet import (
    EfficientNet,
    Features,
    create_model,
    scale_channels,
    scale_stages,
    scaled,
)
from effnet.scaling import CompoundScaling, Scale, search_coefficients, single_axis
from effnet.variants import HEAD_CHANNELS, VARIANTS, Stage, Variant, variant
from effnet.weights import from_timm, from_torchvision, to_timm, to_torchvision

__all__ = [
    "BASELINES",
    "HEAD_CHANNELS",
    "VARIANTS",
    "Baseline",
    "Complexity",
    "CompoundScaling",
    "EfficientNet",
    "Features",
    "Scale",
    "Stage",
    "Variant",
    "complexity",
    "create_model",
    "from_timm",
    "from_torchvision",
    "scale_channels",
    "scale_stages",
    "scaled",
    "search_coefficients",
    "single_axis",
    "to_timm",
    "to_torchvision",
    "variant",
]
