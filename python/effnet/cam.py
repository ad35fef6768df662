"""Where a network looks: class activation maps (arXiv:1512.04150), Grad-CAM (arXiv:1610.02391)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet.efficientnet import EfficientNet

METHODS = ("grad", "class")


def activation_map(
    model: EfficientNet, images: Tensor, classes: Tensor | None = None, *, method: str = "grad"
) -> Tensor:
    """How much each place speaks for a class.

    With the features f (C, H, W) and the class's logit y:

        grad    relu(sum over c of mean(dy / df[c]) * f[c])
        class   relu(sum over c of classifier[class, c] * f[c])

    Where a mean and a linear classifier follow the features, as here, the two differ by a factor,
    which normalising takes away.

    Args:
        model: in evaluation mode.
        images: (N, C, H, W), normalised.
        classes: (N,) the classes asked about; the likeliest unless given.
        method: ``grad`` or ``class``.

    Returns:
        (N, H, W) in [0, 1], the largest of each image 1; zeros where nothing speaks for the class.

    Raises:
        ValueError: there is no such method, or the model has no classifier.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if not isinstance(model.classifier, nn.Linear):
        raise ValueError("model: got one without a classifier, expected num_classes above 0")
    with torch.no_grad():
        features = model.forward_features(images).float()
    features.requires_grad_(method == "grad")
    with torch.enable_grad():
        logits = model.classifier(features.mean((2, 3)))
        classes = logits.argmax(1) if classes is None else classes
        if method == "grad":
            chosen = logits.gather(1, classes[:, None]).sum()
            weights = torch.autograd.grad(chosen, features)[0].mean((2, 3))
        else:
            weights = model.classifier.weight[classes]
    heat = (features * weights[:, :, None, None]).sum(1, keepdim=True).relu().detach()
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear")[:, 0]
    return heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)
