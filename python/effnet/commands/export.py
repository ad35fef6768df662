"""``effnet export``: a file for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from effnet.commands.options import add_command, add_model, load_model
from effnet.export import export, export_onnx


def add(commands: Any) -> None:
    """Its options."""
    parser = add_command(
        commands, "export", "a file for other runtimes: .onnx, or .pt2 of torch.export",
        "example: effnet export --model efficientnet_b0 --weights b0.pt --out b0.onnx", run,
    )  # fmt: skip
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx or .pt2")


def run(arguments: argparse.Namespace) -> int:
    """Writes the file."""
    if arguments.out.suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"out: got {str(arguments.out)!r}, expected a name ending in .onnx or .pt2"
        )
    if not arguments.out.parent.is_dir():
        raise ValueError(f"out: there is no folder {str(arguments.out.parent)!r}")
    model, description = load_model(arguments.model, arguments.weights, arguments)
    resolution, in_chans = description.variant.resolution, description.in_chans
    if arguments.out.suffix == ".onnx":
        export_onnx(model, arguments.out, resolution, in_chans)
    else:
        torch.export.save(export(model, resolution, in_chans), arguments.out)
    print(
        f"wrote {arguments.out}, for images of {in_chans} x {resolution} x {resolution}, any batch"
    )
    return 0
