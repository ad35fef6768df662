"""Lets timm, and so torchvision, be imported where torchvision's library does not load.

The wheel on PyPI is a CUDA build. Beside a CPU build of torch its ops are missing, which its import
tolerates but for the two that it gives fakes by name. No model here calls them. Importing this
module declares them.
"""

from __future__ import annotations

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
"""Kept: what a library declares goes with it."""

if torch.version.cuda is None:
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):
            _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
