"""``effnet models``: the family, with what its members cost."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from effnet.commands.options import add_command, positive
from effnet.complexity import complexity
from effnet.description import Description, describe
from effnet.variants import VARIANTS
from effnet_kernels.bench.environment import default_device
from effnet_kernels.bench.timing import Contender, measure


def add(commands: Any) -> None:
    """Its options."""
    parser = add_command(
        commands, "models", "the family, with parameters, multiply-adds and resolution",
        "example: effnet models efficientnetv2_s --measure --batch 8", run,
    )  # fmt: skip
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="of models, or model.json (default: all)"
    )
    parser.add_argument("--measure", action="store_true", help="images a second on this device")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="default: 1")


def run(arguments: argparse.Namespace) -> int:
    """A line each."""
    names = arguments.names or list(VARIANTS)
    described = [describe(name) for name in names]
    device = default_device()
    measured = f"  {'images/s':>9}" if arguments.measure else ""
    print(f"{'model':20}{'parameters':>12}{'multiply-adds':>15}{'resolution':>12}{measured}")
    for name, network in zip(names, described, strict=True):
        resolution = network.variant.resolution
        with torch.device("meta"):
            model = network.build()
        cost = complexity(model, resolution, network.in_chans)
        line = (
            f"{name:20}{cost.parameters / 1e6:>10.1f} M{_multiply_adds(cost.multiply_adds):>15}"
            f"{resolution:>12}"
        )
        if arguments.measure:
            rate = _images_per_second(network, arguments.batch, device)
            line += f"  {rate:>9.3g}"
        print(line, flush=True)
    if arguments.measure:
        replayed = ", replays of a CUDA graph" if device.type == "cuda" else ""
        print(f"batch {arguments.batch}, float32, fresh weights, on {device.type}{replayed}")
    return 0


def _multiply_adds(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e7 else f"{number / 1e6:.2f} M"


def _images_per_second(network: Description, batch: int, device: torch.device) -> float:
    """From the median of about two seconds of calls."""
    model = network.build().eval().to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    side = network.variant.resolution
    images = torch.randn(batch, network.in_chans, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        times = measure([Contender("model", model, [images])], device, cold=False, seconds=2.0)
    return batch / times["model"].median
