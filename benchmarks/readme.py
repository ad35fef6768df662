"""Draws the README's table from the committed results: ``python benchmarks/readme.py [--check]``.

One line a group of the kernel benchmark (geometric mean of the speed-ups over eager channels-last,
and the smallest) and one a model run, for every device under benchmarks/results. ``--check`` writes
nothing and fails where the README is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from effnet_kernels.bench.results import Group, Results, groups, read

ROOT = Path(__file__).parent.parent
OURS = ("auto", "cuda", "triton", "cpu")
_MARKS = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- /results -->)", re.DOTALL)
_WHAT = {
    "kernels-mbconv": "{model}'s MBConv blocks",
    "kernels-fused_mbconv": "{model}'s Fused-MBConv blocks",
    "kernels-depthwise_conv_bn_act": "{model}'s depthwise conv + BN + Swish",
    "kernels-pointwise_conv_bn_act": "{model}'s 1x1 conv + BN",
    "kernels-squeeze_excite": "{model}'s squeeze-and-excitation",
    "kernels-batch_norm_act": "{model}'s BN + Swish",
    "models-efficientnet": "{model} whole, converted",
}


def cell(group: Group | None) -> str:
    """A contender's speed-up; never one for wrong or failed rows."""
    if group is None:
        return "-"
    if group.wrong or group.failed:
        return "wrong" if group.wrong else "failed"
    kind = "warm" if "warm" in group.speedups else next(iter(group.speedups))
    if group.problems == 1:
        return f"{group.speedups[kind]:.2f}x"
    return f"{group.speedups[kind]:.2f}x ({group.least[kind]:.2f}x)"


def table(results: Results, ours: list[str]) -> list[str]:
    """The lines of one benchmark, with a column for each of our backends in ``ours``."""
    found = list(groups(results.rows))
    lines = []
    for key in dict.fromkeys((g.model, g.batch, g.dtype, g.mode) for g in found):
        here = {g.contender: g for g in found if (g.model, g.batch, g.dtype, g.mode) == key}
        if not any(name in here for name in ours):
            continue
        model, batch, dtype, mode = key
        what = _WHAT[results.benchmark].format(model=model)
        cells = [cell(here.get("compile")), *(f"**{cell(here.get(name))}**" for name in ours)]
        lines.append(f"| {what} | {mode}, batch {batch}, {dtype} | {' | '.join(cells)} |")
    return lines


def draw() -> str:
    """The part of the README between the marks."""
    parts = []
    for directory in sorted(p for p in (ROOT / "benchmarks/results").iterdir() if p.is_dir()):
        runs = [read(path) for path in sorted(directory.glob("*.json"))]
        runs = [run for run in runs if run.benchmark in _WHAT]
        contenders = {row.contender for run in runs for row in run.rows}
        ours = [name for name in OURS if name in contenders]
        lines = [line for run in runs for line in table(run, ours)]
        if not lines:
            continue
        described = runs[0].environment
        how = f"{described['threads']} threads"
        if described["device_type"] == "cuda":
            how = "replays of CUDA graphs"
        parts += [
            f"Speed-up over eager PyTorch, channels-last, on {described['device']} "
            f"({how}, torch {described['torch']}): medians of interleaved "
            "runs; over several shapes the geometric mean, and the smallest in brackets; `wrong` "
            "where the error from float64 is above the rule (twice eager's own, three times for "
            "gradients).",
            "",
            f"| what | how | `torch.compile` | {' | '.join(f'ours: {name}' for name in ours)} |",
            "|---|---|---|" + "---|" * len(ours),
            *lines,
            "",
        ]
    return "\n".join(parts)


def main() -> int:
    """Draws or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    drawn = _MARKS.sub(lambda match: match[1] + "\n" + draw() + match[2], text)
    if arguments.check:
        if drawn != text:
            print("README.md is not what benchmarks/results says: python benchmarks/readme.py")
        return int(drawn != text)
    path.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
