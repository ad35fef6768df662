"""Networks as programs and files of stock ops, which need neither this package nor its kernels."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from effnet_kernels import use_backend


def export(model: nn.Module, resolution: int, in_chans: int = 3) -> ExportedProgram:
    """``torch.export`` of a network in inference, in stock ops, for any batch.

    >>> torch.export.save(export(model, 224), "model.pt2")

    Args:
        model: stays as it is.
        resolution: side of its images, in pixels; fixed in the program.
        in_chans: channels of the images.
    """
    model = copy.deepcopy(model).eval()
    images = torch.randn(2, in_chans, resolution, resolution)
    with use_backend("eager"), torch.no_grad():
        return torch.export.export(
            model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )


def export_onnx(model: nn.Module, path: str | Path, resolution: int, in_chans: int = 3) -> None:
    """Writes a network in inference as an ONNX file of standard ops, for any batch.

    Its input is ``images``, (batch, in_chans, resolution, resolution), its output ``logits``.

    Args:
        model: stays as it is.
        path: of the file.
        resolution: side of its images, in pixels.
        in_chans: channels of the images.

    Raises:
        ImportError: the package onnxscript is not installed.
    """
    import onnxscript  # noqa: F401  the exporter needs it, and says so less clearly

    program = torch.onnx.export(
        export(model, resolution, in_chans), input_names=["images"], output_names=["logits"],
        dynamo=True, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(str(path))
