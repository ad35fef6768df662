"""``effnet search``: MBConv or Fused-MBConv for each stage, as measured on this device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from effnet.commands.options import MODEL, add_command, positive, positive_number
from effnet.description import describe, write_description
from effnet.efficientnet import scaled
from effnet.plots import plot_stages
from effnet.search import choose, measure


# fmt: off
def add(commands: Any) -> None:
    """Its options."""
    parser = add_command(
        commands, "search", "MBConv or Fused-MBConv for each stage, as measured on this device",
        "examples:\n"
        "  effnet search --model efficientnetv2_s --batch 8 --plot stages.png\n"
        "  effnet search --most-parameters 20 --out mine.json  and then\n"
        "  effnet train --model mine.json ...",
        run,
    )
    option = parser.add_argument
    option("--model", default="efficientnetv2_s", metavar="NAME",
           help=f"whose table is varied; {MODEL} (default: efficientnetv2_s)")
    option("--resolution", type=positive, metavar="PIXELS", help="default: the model's own")
    option("--batch", type=positive, default=1, metavar="N", help="default: 1")
    option("--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
           help="default: float32")
    option("--most-parameters", type=positive_number, metavar="MILLIONS",
           help="of all stages: the fastest table that has no more")
    option("--most-milliseconds", type=positive_number, metavar="MS",
           help="of an image in all stages: the smallest table so fast")
    option("--seconds", type=positive_number, default=1.0, metavar="S",
           help="of sampling for each stage (default: 1)")
    option("--plot", type=Path, metavar="FILE", help="such as stages.png")
    option("--out", type=Path, metavar="FILE", help="such as mine.json: the model, for --model")
# fmt: on


def run(arguments: argparse.Namespace) -> int:
    """A line a stage."""
    described = describe(arguments.model)
    table = scaled(described.variant)
    if arguments.resolution is not None:
        table = table._replace(resolution=arguments.resolution, train_resolution=None)
    dtype = getattr(torch, arguments.dtype)
    measured = measure(table, batch=arguments.batch, dtype=dtype, seconds=arguments.seconds)
    millions, milliseconds = arguments.most_parameters, arguments.most_milliseconds
    chosen = choose(
        measured,
        most_seconds=None if milliseconds is None else milliseconds / 1e3,
        most_parameters=None if millions is None else round(millions * 1e6),
    )
    print(f"{'stage':28}{'MBConv':>22}{'Fused-MBConv':>22}{'faster':>8}  chosen")
    for costs, stage in zip(measured, chosen, strict=True):
        cells = (
            f"{cost.seconds * 1e3:8.3f} ms {cost.parameters / 1e6:7.2f} M"
            for cost in (costs.mbconv, costs.fused)
        )
        ratio = costs.mbconv.seconds / costs.fused.seconds
        shape = f"{stage.layers} x {stage.channels} at {costs.resolution}, expand {stage.expand}"
        first, second = cells
        way = "fused" if stage.fused else "mbconv"
        print(f"{shape:28}{first:>22}{second:>22}{ratio:>7.2f}x  {way}")
    if arguments.out is not None:
        write_description(arguments.out, described._replace(variant=table._replace(stages=chosen)))
        print(f"wrote {arguments.out}")
    if arguments.plot is not None:
        plot_stages({arguments.model: measured}, arguments.plot)
        print(f"wrote {arguments.plot}")
    return 0
