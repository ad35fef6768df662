"""Measures every stage of EfficientNetV2-S as MBConv and as Fused-MBConv, with this package's
kernels and with PyTorch's own ops: what V2's choice between them rests on.

    python benchmarks/stages.py     # writes results/<device>/search/stages.json and .png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import effnet
import torch
from effnet import search
from effnet.plots import plot_stages
from family import save, stages_table

from effnet_kernels import use_backend
from effnet_kernels.bench import environment

BACKENDS = {"effnet_kernels": None, "PyTorch": "eager"}


def main() -> int:
    """Measures, writes and prints."""
    device = environment.default_device()
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="efficientnetv2_s", metavar="NAME")
    parser.add_argument("--resolution", type=int, metavar="PIXELS", help="default: its own")
    parser.add_argument("--batch", type=int, default=64 if on_gpu else 1, metavar="N")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32", metavar="NAME")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S",
                        help="of sampling for each stage (default: 4)")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    table = effnet.variant(arguments.model)
    table = table._replace(resolution=arguments.resolution or table.resolution)
    measured = {}
    for name, backend in BACKENDS.items():
        with use_backend(backend):
            measured[name] = search.measure(
                table, batch=arguments.batch, device=device,
                dtype=getattr(torch, arguments.dtype), seconds=arguments.seconds,
            )  # fmt: skip
    found = {
        "model": arguments.model,
        "resolution": table.resolution,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "stages": {
            name: [
                {
                    "stage": costs.stage._asdict(),
                    "resolution": costs.resolution,
                    "mbconv": costs.mbconv._asdict(),
                    "fused": costs.fused._asdict(),
                }
                for costs in stages
            ]
            for name, stages in measured.items()
        },
    }
    report, out = save(found, "search/stages", arguments.out)
    plot_stages(measured, out.with_suffix(".png"))
    print(stages_table(report))
    print(f"wrote {out} and {out.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
