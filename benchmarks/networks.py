"""Measures the family beside ResNet, ResNeXt and Inception-ResNet: what a network costs and how
fast it is on this device, all in one process, in turns.

    python benchmarks/networks.py     # writes results/<device>/networks/networks.json

Stock networks are timm's in eager PyTorch, channels-last; ours are the same after ``prepare`` on a
CPU or ``convert`` on a GPU. The accuracies are the papers': nothing is trained here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import torch
import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch
from effnet.complexity import complexity
from family import networks_table, save

import effnet_kernels
from effnet_kernels.bench import environment, models, timing
from effnet_kernels.bench.timing import Contender


class Network(NamedTuple):
    """A row of the table.

    Attributes:
        name: timm's.
        resolution: side of its images, in pixels.
        accuracy: top-1 on ImageNet, in per cent, as published.
        family: it is one of ours, and measured with our kernels, too.
    """

    name: str
    resolution: int
    accuracy: float
    family: bool = False


# Accuracies: arXiv:1905.11946, table 2, and arXiv:2104.00298, table 7 (trained at 384).
NETWORKS = (
    Network("resnet50", 224, 76.0),
    Network("efficientnet_b0", 224, 77.1, True),
    Network("resnet152", 224, 77.8),
    Network("efficientnet_b1", 240, 79.1, True),
    Network("inception_resnet_v2", 299, 80.1),
    Network("resnext101_64x4d", 224, 80.9),
    Network("efficientnet_b3", 300, 81.6, True),
    Network("efficientnet_b4", 380, 82.9, True),
    Network("efficientnetv2_s", 384, 83.9, True),
)


def measure(
    networks: tuple[Network, ...], batch: int, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """Costs and images a second of each network.

    Args:
        networks: which.
        batch: images at a time.
        device: where.
        seconds: of sampling for each network.
    """
    import timm  # after torchvision_ops

    contenders, rows = [], []
    for network in networks:
        stock = timm.create_model(network.name)
        models.calibrate(stock, [torch.randn(2, 3, 128, 128)])
        stock = stock.eval().to(device, memory_format=torch.channels_last)
        cost = complexity(stock, network.resolution)
        rows.append({**network._asdict(), **cost._asdict(), "images_per_second": {}})
        images = torch.randn(batch, 3, network.resolution, network.resolution, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        contenders.append(Contender(f"{network.name}/stock", stock, [images]))
        if network.family:
            ours = timm.create_model(network.name)
            ours.load_state_dict(stock.state_dict())
            ours = ours.eval().to(device, memory_format=torch.channels_last)
            fused = effnet_kernels.convert if device.type == "cuda" else effnet_kernels.prepare
            contenders.append(Contender(f"{network.name}/ours", fused(ours), [images]))
    with torch.no_grad():
        for contender in contenders:
            contender.call(contender.inputs[0])
        times = timing.measure(contenders, device, cold=False, seconds=seconds * len(networks))
    for contender in contenders:
        name, whose = contender.name.split("/")
        row = next(row for row in rows if row["name"] == name)
        row["images_per_second"][whose] = batch / times[contender.name].median
        row.setdefault("seconds", {})[whose] = list(times[contender.name].samples)
    return rows


def plot(report: dict[str, Any], path: Path) -> None:
    """Accuracy by images a second, stock and ours."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for place, whose in enumerate(("stock", "ours")):
        rows = [row for row in report["rows"] if whose in row["images_per_second"]]
        rates = [row["images_per_second"][whose] for row in rows]
        axes.plot(rates, [row["accuracy"] for row in rows], "o", color=f"C{place}", label=whose)
        for row, rate in zip(rows, rates, strict=True):
            axes.annotate(row["name"], (rate, row["accuracy"]), (4, 4), fontsize=7,
                          textcoords="offset points")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(f"images a second, batch {report['batch']}")
    axes.set_ylabel("top-1 on ImageNet, %, as published")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> int:
    """Measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S",
                        help="of sampling for each network (default: 10)")  # fmt: skip
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    wanted = tuple(
        n for n in NETWORKS if arguments.networks is None or n.name in arguments.networks
    )
    if not wanted:
        parser.error(f"--networks: none of {', '.join(n.name for n in NETWORKS)}")
    device = environment.default_device()
    rows = measure(wanted, arguments.batch, device, arguments.seconds)
    report, out = save({"batch": arguments.batch, "rows": rows}, "networks/networks", arguments.out)
    plot(report, out.with_suffix(".png"))
    print(networks_table(report))
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
