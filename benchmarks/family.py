"""The tables of python/effnet/README.md, each between a pair of marks; ``readme.py`` draws them."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import effnet
import torch

from effnet_kernels.bench import environment

README = "python/effnet/README.md"
_MARKS = re.compile(r"(<!-- drawn: (\w+) -->\n).*?(<!-- /drawn -->)", re.DOTALL)
Report = dict[str, Any]
"""A JSON file of results."""


def save(found: Report, place: str, out: Path | None) -> tuple[Report, Path]:
    """Writes what was measured, with where that was.

    Args:
        found: the measurements.
        place: ``PARTS``' pattern of them.
        out: the file, results/<device>/<place>.json unless given.

    Returns:
        What is in the file, and the file.
    """
    device = environment.default_device()
    results = Path(__file__).parent / "results"
    out = out or results / environment.device_slug(device) / f"{place}.json"
    report = {"environment": environment.describe(device), **found}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    return report, out


def draw(text: str, directory: Path) -> str:
    """The family's README with its tables as the results in ``directory`` say."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]](directory)}\n\n{match[3]}"

    return _MARKS.sub(part, text)


def variants(_: Path) -> str:
    """What every member is and costs, counted."""
    lines = [
        "| model | resolution | width | depth | blocks | parameters | multiply-adds |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, table in effnet.VARIANTS.items():
        with torch.device("meta"):
            model = effnet.create_model(table)
        cost = effnet.complexity(model, table.resolution)
        blocks = sum(stage.layers for stage in effnet.scaled(table).stages)
        lines.append(
            f"| {name} | {table.resolution} | {table.width:g} | {table.depth:g} | {blocks} | "
            f"{cost.parameters / 1e6:.1f} M | {cost.multiply_adds / 1e9:.2f} G |"
        )
    return "\n".join(lines)


def _of_devices(
    pattern: str,
    about: Callable[[Report], str],
    table: Callable[[Report], str],
    picture: str | None = None,
) -> Callable[[Path], str]:
    """What to draw of a benchmark, for every device that has its results.

    Args:
        pattern: of the results, below the device's folder.
        about: how it was measured, a sentence after the device's.
        table: of the figures.
        picture: what is to be seen in the picture beside the results, if there is one.
    """

    def drawn(directory: Path) -> str:
        parts = []
        for path in sorted(directory.glob(f"*/{pattern}.json")):
            report = json.loads(path.read_text())
            parts += [f"On {_where(report)}: {about(report)}", table(report)]
            if picture is not None:
                place = path.relative_to(directory).with_suffix(".png")
                parts.append(f"![{picture}](../../benchmarks/results/{place})")
        return "\n\n".join(parts) or "Not measured yet."

    return drawn


def _where(report: Report) -> str:
    where = report["environment"]
    return (
        f"{where['device']}, {where['threads']} threads, torch {where['torch']}, "
        f"{where['date'][:10]}"
    )


def networks_table(report: Report) -> str:
    """What ``networks.py`` measured, as Markdown."""
    lines = [
        "| network | top-1, published | parameters | multiply-adds | stock, images/s | "
        "ours, images/s | over ResNet-50 |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    rates = {row["name"]: row["images_per_second"] for row in report["rows"]}
    baseline = rates.get("resnet50", {}).get("stock")
    for row in report["rows"]:
        stock, ours = rates[row["name"]]["stock"], rates[row["name"]].get("ours")
        ratio = f"{(ours or stock) / baseline:.2f}x" if baseline else "-"
        lines.append(
            f"| {row['name']} at {row['resolution']} | {row['accuracy']:.1f} % | "
            f"{row['parameters'] / 1e6:.1f} M | {row['multiply_adds'] / 1e9:.2f} G | {stock:.3g} | "
            f"{'-' if ours is None else f'{ours:.3g}'} | {ratio} |"
        )
    return "\n".join(lines)


def _networks(report: Report) -> str:
    return f"inference, float32, batch {report['batch']}."


def progressive_table(report: Report) -> str:
    """What ``progressive.py`` measured, as Markdown."""
    lines = [
        "| training | resolutions | runs | seconds, median | accuracy, mean with its error |",
        "|---|---|--:|--:|--:|",
    ]
    for name, runs in report["runs"].items():
        seconds = statistics.median(run[0] for run in runs)
        accuracies = [run[1] for run in runs]
        sizes = ", ".join(map(str, report["resolutions"][name]))
        error = "-"
        if len(runs) > 1:
            error = f"{100 * statistics.stdev(accuracies) / len(runs) ** 0.5:.2f}"
        lines.append(
            f"| {name} | {sizes} | {len(runs)} | {seconds:.1f} | "
            f"{100 * statistics.mean(accuracies):.2f} +- {error} % |"
        )
    return "\n".join(lines)


def speedup(report: Report) -> float:
    """Of progressive learning over training at one size: the median of the runs' ratios."""
    runs = report["runs"]
    pairs = zip(runs["one size"], runs["progressive"], strict=True)
    return statistics.median(one[0] / progressive[0] for one, progressive in pairs)


def _progressive(report: Report) -> str:
    return (
        f"a small EfficientNet on scikit-learn's digits, {report['epochs']} epochs; the two in "
        f"turns, seed by seed. Progressive learning is {speedup(report):.2f} times as fast."
    )


def stages_table(report: Report) -> str:
    """What ``stages.py`` measured, as Markdown."""
    names = list(report["stages"])
    heads = [f"{name}: MBConv, ms | Fused, ms | faster" for name in names]
    lines = [f"| stage | {' | '.join(heads)} |", "|---" + "|--:|--:|---" * len(names) + "|"]
    for rows in zip(*report["stages"].values(), strict=True):
        stage = rows[0]["stage"]
        shape = f"{stage['layers']} x {stage['channels']} at {rows[0]['resolution']}"
        cells = []
        for row in rows:
            mbconv, fused = (row[way]["seconds"] * 1e3 for way in ("mbconv", "fused"))
            which = "Fused" if fused < mbconv else "MBConv"
            ratio = max(fused, mbconv) / min(fused, mbconv)
            cells.append(f"{mbconv:.3g} | {fused:.3g} | {which} {ratio:.2f}x")
        lines.append(f"| {shape}, expand {stage['expand']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _stages(report: Report) -> str:
    return (
        f"{report['model']}'s stages at {report['resolution']}, inference, {report['dtype']}, "
        f"batch {report['batch']}, time of an image."
    )


def evolution_table(report: Report) -> str:
    """What ``evolution.py`` found, as Markdown."""
    lines = [
        "| search | tables | first: accuracy | multiply-adds | best: accuracy | multiply-adds | "
        "reward |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, history in report["histories"].items():
        first, best = history[0], max(history, key=lambda individual: individual["reward"])
        costs = [f"{found['cost'] / 1e6:.2f} M" for found in (first, best)]
        lines.append(
            f"| {name} | {len(history)} | {first['accuracy']:.2%} | {costs[0]} | "
            f"{best['accuracy']:.2%} | {costs[1]} | {first['reward']:.3f} to "
            f"{best['reward']:.3f} |"
        )
    return "\n".join(lines)


def _evolution(report: Report) -> str:
    return f"{report['epochs']} epochs a table."


PARTS: dict[str, Callable[[Path], str]] = {
    "variants": variants,
    "networks": _of_devices("networks/networks", _networks, networks_table, "accuracy by speed"),
    "progressive": _of_devices("training/progressive", _progressive, progressive_table),
    "stages": _of_devices("search/stages", _stages, stages_table, "times of the stages"),
    "evolution": _of_devices("search/evolution", _evolution, evolution_table, "rewards and costs"),
}
"""By the names in the marks."""
