"""Draws the README's table, performance.md and the tables of the family's README from the committed
results: ``python benchmarks/readme.py [--check]``.

In the README one line a group of the kernel benchmark (geometric mean of the speed-ups over eager
channels-last, and the smallest) and one a model run, for every device under benchmarks/results; in
performance.md every contender of the whole models. ``--check`` writes nothing and fails where one
of them is not what the results say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import family

from effnet_kernels.bench import peers
from effnet_kernels.bench.environment import versions_of
from effnet_kernels.bench.results import Group, Results, Row, groups, read

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
OURS = ("auto", "cuda", "triton", "cpu", "cpu+prepared")
"""What a user of ours has; not what ``torch.compile`` makes of it."""
PEERS = {
    "`torch.compile`": ("compile", "compile-max", "compile-unfrozen"),
    "XLA": ("xla",),
    "ONNX Runtime": ("onnxruntime",),
    "OpenVINO": ("openvino",),
}
"""The README's columns, each of the fastest of its contenders."""
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


def runs_of_devices(directory: Path) -> list[list[Results]]:
    """The results of each device that has some, from ``<device>/*.json``: of GPUs, then of CPUs,
    each kind's latest first. A problem is in one run of a device, its latest.
    """
    devices = []
    for device in sorted(path for path in directory.iterdir() if path.is_dir()):
        runs = [read(path) for path in sorted(device.glob("*.json"))]
        runs = _without_earlier([run for run in runs if run.benchmark in _WHAT])
        if runs:
            devices.append(runs)

    def order(runs: list[Results]) -> tuple[bool, str]:
        environments = [run.environment for run in runs]
        return environments[0]["device_type"] == "cuda", max(e["date"] for e in environments)

    return sorted(devices, key=order, reverse=True)


def _without_earlier(runs: list[Results]) -> list[Results]:
    """Runs without the problems that a later one has; those that have others, in their order."""
    found: set[tuple[Any, ...]] = set()
    for run in sorted(runs, key=lambda run: run.environment["date"], reverse=True):
        keys = [(run.benchmark, *_key(row), row.case) for row in run.rows]
        run.rows = [row for row, key in zip(run.rows, keys, strict=True) if key not in found]
        found.update(keys)
    return [run for run in runs if run.rows]


def _key(of: Row | Group) -> tuple[str, int, str, str]:
    return of.model, of.batch, of.dtype, of.mode


def cell(found: Iterable[Group]) -> str:
    """The speed-up of the fastest of some contenders; never one for wrong or failed rows."""
    every = list(found)
    if not every:
        return "-"
    kind = "warm" if any("warm" in group.speedups for group in every) else "cold"
    right = [group for group in every if kind in group.speedups]
    if not right:
        return "wrong" if any(group.wrong for group in every) else "failed"
    best = max(right, key=lambda group: group.speedups[kind])
    if best.problems == 1:
        return f"{best.speedups[kind]:.2f}x"
    return f"{best.speedups[kind]:.2f}x ({best.least[kind]:.2f}x)"


def fastest(rows: Iterable[Row]) -> Row | None:
    """Of the rows that are neither wrong nor failed."""
    right = [row for row in rows if row.speedups]
    return min(right, key=_seconds, default=None)


def _seconds(row: Row) -> float:
    assert row.kind is not None
    return row.timings[row.kind].median


def matmul_share(run: Results, row: Row | None) -> str:
    """How much of the rate of matrix products a row has, as a cell."""
    least = None if row is None else run.matmul_seconds(row)
    return "-" if row is None or least is None else f"{least / _seconds(row):.0%}"


def table(
    run: Results, columns: Sequence[Sequence[str]], ours: Sequence[str], share: bool
) -> list[str]:
    """The lines of one benchmark.

    Args:
        run: the benchmark.
        columns: the contenders of each of the peers' columns.
        ours: our backends, with a column each.
        share: whether there is a column for the share of the rate of matrix products.
    """
    found = groups(run.rows)
    lines = []
    for key in dict.fromkeys(map(_key, found)):
        here = [g for g in found if _key(g) == key]
        if not any(g.contender in ours for g in here):
            continue
        model, batch, dtype, mode = key
        cells = [cell(g for g in here if g.contender in names) for names in columns]
        ours_here = [cell(g for g in here if g.contender == name) for name in ours]
        cells += [value if value == "-" else f"**{value}**" for value in ours_here]
        rows = [row for row in run.rows if _key(row) == key]
        if share:
            best = fastest(row for row in rows if row.contender in ours)
            cells.append(matmul_share(run, best) if run.whole_models else "-")
        what = _WHAT[run.benchmark].format(model=model)
        if run.whole_models:
            what += f", at {' and '.join(dict.fromkeys(map(_size, rows)))}"
        lines.append(f"| {what} | {mode}, batch {batch}, {dtype} | {' | '.join(cells)} |")
    return lines


def draw(directory: Path) -> str:
    """The part of the README between the marks."""
    parts = []
    for runs in runs_of_devices(directory):
        contenders = {row.contender for run in runs for row in run.rows}
        ours = [name for name in OURS if name in contenders]
        columns = {
            heading: names
            for heading, names in PEERS.items()
            if "compile" in names or contenders.intersection(names)
        }
        share = any(
            run.whole_models and run.matmul_seconds(row) is not None
            for run in runs
            for row in run.rows
        )
        lines = [line for run in runs for line in table(run, [*columns.values()], ours, share)]
        if not lines:
            continue
        described = runs[0].environment
        how = f"{described['threads']} threads"
        if described["device_type"] == "cuda":
            how = "replays of CUDA graphs"
        notes = ""
        if "compile-unfrozen" in contenders:
            notes += "; `torch.compile` is the faster of with and without frozen parameters"
        if described["device_type"] == "cuda" and "xla" in contenders:
            notes += "; XLA's calls with what the GPU waits for of their launches"
        if share:
            notes += (
                "; of GEMM: how much of the rate measured on a large matrix product our best has"
            )
        headings = [*columns, *(f"ours: {name}" for name in ours), *(["of GEMM"] if share else [])]
        parts += [
            f"Speed-up over eager PyTorch, channels-last, on {described['device']} "
            f"({how}, torch {described['torch']}): medians of interleaved "
            "runs; over several shapes the geometric mean, and the smallest in brackets; `wrong` "
            "where the error from float64 is above the rule (twice eager's own, three times for "
            f"gradients){notes}.",
            "",
            f"| what | how | {' | '.join(headings)} |",
            "|---|---|" + "---|" * len(headings),
            *lines,
            "",
        ]
    return "\n".join(parts)


_HEAD = """\
# Whole models

Drawn from `results/*/*.json` by `python benchmarks/readme.py`. Each problem's contenders took turns
in one process with equal numbers of threads; times are medians of calls. On a CPU a turn begins
when the threads of the contender before have gone to sleep, and 30 ms of untimed calls later it is
timed: ONNX Runtime's look out for its next call for a while, on the other's processors.

- **error**: the largest from the float64 model, over the largest value; of logits, in training of
  logits and gradients.
- **of GEMM**: the FLOPs of the convolutions and matrix products over the time, as a share of the
  rate measured on a large matrix product in the same run, in the problem's dtype or float32,
  whichever is faster. A convolution that Winograd's transforms shorten counts in full, so ours can
  have more than all of it. `-` where the run did not count them.
- **our best** is the fastest of {ours}.
- **best peer** is the fastest of what else ran beside it, as listed, and is neither wrong nor
  failed. **ratio** is its time over our best's: above 1 ours is faster. **goal** is what we mean
  the ratio to be on two cores, or on an H200.
- **memory** is our best's peak over the best peer's, of what PyTorch's allocator holds beyond what
  it held before the call; `-` where one has memory of its own.
- `wrong`: the error is above the rule, twice that of `eager` (three times for gradients); such a
  row has no time. `failed`: the contender did not run, for the reason given.

`eager` is stock PyTorch, channels-last; `eager-nchw` the same in the other layout. `compile` is
`torch.compile`, which in inference on a CPU freezes the parameters; `compile-unfrozen` does not.
`compile-max` is its `max-autotune`. On a GPU a CUDA graph of each contender's calls is timed, but
for `xla`: JAX's compilation of the stock model's operators, whose calls are timed with what of
their launches the GPU has to wait for. Its parameters are arguments, so that it folds no BN.
`onnxruntime` and `openvino` run the stock model's ONNX file. The others are ours: `cpu`, `cuda` and
`triton` are the converted model on one backend, `auto` on the fastest for each call; `cpu+prepared`
has BN folded and the weights packed beforehand; `+compile` is `torch.compile` of a converted model.

In 16 bits `inference` and `training-pure` have parameters and images of that dtype, `training` and
`inference-autocast` float32 ones and autocast.

## What keeps a CPU from more

What profiles of a model alone say, on two cores that others share; the figures are counts.

- **The processors.** In quiet minutes the second thread makes B0 nearly twice as fast, in busy ones
  hardly faster at all. Threads that wait for memory get more out of shared execution units than
  threads that multiply, so a peer loses less by it.
- **Sums of few channels.** Products of 16 to 40 channels have a lower rate than those of 80 and
  more. They are most of the first blocks, with the largest tensors, where a tile's sums hardly
  begin before they are activated and stored.
- **SiLU** is a part of B0's time that no fusion saves. ONNX Runtime and OpenVINO pay it, too;
  hard-swish is a fraction of it.
- **Weights at batch 1.** Each is read once an image, B0's 21 MB and B4's 76 MB from memory if
  anything else has been in the shared cache. Blocks of 7 x 7 pixels read 2 to 3 MB for 50 MFLOP.
- **One image on two cores.** What a thread reads of a block the other one half wrote, but for the
  first blocks, whose halves of an image stay with a thread. Two threads are at work nearly all
  of B0's time, but together take longer than one does alone.
- **bfloat16** halves the bytes and not the arithmetic: where a product of bfloat16 pairs is slower
  than the two of float32 that it takes the place of, as on Intel's cores with matrix units, ours
  are of float32. The matrix units (AMX) themselves are not used.
- **The look at what may have changed**, at each call of a prepared model, is Python's.
- **Training** leaves the matrix products and dense convolutions to PyTorch: V2-S's step is mostly
  those, and `torch.compile` has the same ones. Of B0's at batch 1 the largest parts are
  the depthwise gradients, which a second thread does not halve, the products, and Python's own.

## What keeps an H200 from more

Profiles are in `results/nvidia-h200/profiles`: by PyTorch's profiler in order of the launches,
and by `ncu`. The tables' runs are of commit 0d80c95, in B0's inference with all expansions on
Triton; their machine knew of it as changes to ec1cf57.

- **B0 at batch 256** was measured on either backend alone, 4.8 ms in CUDA C++ and 3.9 ms in
  Triton, and not as `auto` now chooses from them (before the stem went to CUDA: 3.6 ms). Of the
  faster kernel of each layer the times add up to 3.3 ms: a prediction, 2.6 times as fast as
  `torch.compile` was in `earlier/models-03df544.json`.
- **Depthwise convolutions** reach 80 % of the copy bandwidth at best (3x3, stride 2), 54 to 70 %
  with 3x3 and stride 1 on large images, 28 to 45 % with 5x5: 25 multiply-adds an output outside
  the tensor cores take as long as the bytes. Issue slots are 40 to 60 % full, with 7 to 15 of 64
  warps on a multiprocessor: registers are what there are too few of.
- **1x1 convolutions** with an SE gate are Triton's, and take about twice as long as their bytes.
  Those from few channels to many keep their weights and take 1.4 to 2.3 times as long as theirs.
- **Batch 1**: 68 launches, of which expand + depthwise take 9 us each, the gate 6, project 4;
  nothing in them is near a limit but latencies, one after another.
- **Training** of B0: BN's passes are a third of it (4.2 of 11.9 ms), the depthwise gradients a
  fifth.
- Not yet measured: torch.compile's max-autotune, B4, other batches, V2-S's training beside peers,
  depthwise training but for B0's two largest shapes. The race checker found nothing in our
  kernels as far as it came; cuDNN's it complains of.
"""


_GPU_GOALS = {
    ("inference", "bfloat16"): {"efficientnet_b0": 2.5},
    ("training", "bfloat16"): {"efficientnet_b0": 1.5, "efficientnetv2_s": 1.5},
}
"""Of the ratio to the best peer on a GPU, at batches that fill it."""
_FILLING_BATCH = 64
_GOALS = {
    ("inference", "float32"): {
        "efficientnet_b0": 1.4,
        "efficientnet_b4": 1.3,
        "tf_efficientnetv2_s": 1.0,
        "mobilenetv3_large_100": 1.2,
    },
    ("inference", "bfloat16"): {
        "efficientnet_b0": 1.4,
        "efficientnet_b4": 1.3,
        "tf_efficientnetv2_s": 1.1,
        "mobilenetv3_large_100": 1.2,
    },
    ("training", "float32"): {
        "efficientnet_b0": 1.5,
        "efficientnet_b4": 1.3,
        "tf_efficientnetv2_s": 1.1,
        "mobilenetv3_large_100": 1.2,
    },
}
"""Of the ratio to the best peer on a CPU."""


def _goal(run: Results, row: Row) -> str:
    """What the ratio should be, as a cell."""
    goals = _GOALS
    if run.environment["device_type"] == "cuda":
        goals = _GPU_GOALS if row.batch >= _FILLING_BATCH else {}
    goal = goals.get((row.mode, row.dtype), {}).get(row.model)
    return "-" if goal is None else f"{goal:.1f}"


def _memory(ours: Row | None, theirs: Row | None) -> str:
    """Our peak memory over the peer's, as a cell."""
    if ours is None or theirs is None or not (ours.peak_memory and theirs.peak_memory):
        return "-"
    return f"{ours.peak_memory / theirs.peak_memory:.2f}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(row: Row) -> str:
    """Of a whole model's images."""
    return row.case.split("x")[0]


def _problem(row: Row) -> tuple[str, str]:
    return f"{row.model} at {_size(row)}", f"{row.mode}, batch {row.batch}, {row.dtype}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _details(run: Results, row: Row) -> list[str]:
    if row.failed is not None:
        # The reason may hold what Markdown takes for the end of a cell.
        reason = row.failed.replace("|", "\\|")
        return [row.contender, "failed", "-", "-", "-", reason]
    error = f"{max(e.largest for e in row.errors.values()):.1e}"
    if row.wrong:
        return [row.contender, "wrong", "-", "-", "-", error]
    seconds = _seconds(row)
    return [
        row.contender,
        _figure(seconds * 1e3),
        _figure(row.batch / seconds),
        f"{row.speedups[row.kind or '']:.2f}x",
        matmul_share(run, row),
        error,
    ]


def performance(directory: Path) -> str:
    """performance.md: of every device's whole models a summary, and then all contenders."""
    parts = [_HEAD.format(ours=", ".join(f"`{name}`" for name in OURS))]
    for every in runs_of_devices(directory):
        runs = [run for run in every if run.whole_models]
        if not runs:
            continue
        summary = [
            _line(["model", "how", "our best", "ms", "images/s", "best peer", "ms", "images/s",
                   "ratio", "goal", "memory", "of GEMM"]),
            "|---|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
        ]  # fmt: skip
        details = [
            _line(["model", "how", "contender", "ms", "images/s", "over eager", "of GEMM",
                   "error"]),
            "|---|---|---|--:|--:|--:|--:|---|",
        ]  # fmt: skip
        for run in runs:
            for problem in dict.fromkeys(_problem(row) for row in run.rows):
                rows = [row for row in run.rows if _problem(row) == problem]
                details += [_line([*problem, *_details(run, row)]) for row in rows]
                ours = fastest(row for row in rows if row.contender in OURS)
                theirs = fastest(row for row in rows if not peers.is_ours(row.contender))
                cells = [*problem]
                for best in (ours, theirs):
                    if best is None:
                        cells += ["-", "-", "-"]
                        continue
                    seconds = _seconds(best)
                    cells += [best.contender, _figure(seconds * 1e3), _figure(best.batch / seconds)]
                ratio = "-"
                if ours is not None and theirs is not None:
                    ratio = f"{_seconds(theirs) / _seconds(ours):.2f}"
                summary.append(
                    _line([*cells, ratio, _goal(run, rows[0]), _memory(ours, theirs),
                           matmul_share(run, ours)])
                )  # fmt: skip
        parts += [f"## {runs[0].environment['device']}", ""]
        parts += [f"- {_described(run)}" for run in runs]
        parts += ["", *summary, "", *details, ""]
    return "\n".join(parts)


def _described(run: Results) -> str:
    """Where and when, as a line."""
    environment = run.environment
    rates = ", ".join(
        f"{dtype} {rate / 1e12:.3g}"
        for dtype, rate in run.ceilings["matmul_flops_per_second"].items()
    )
    models = ", ".join(dict.fromkeys(row.model for row in run.rows))
    return (
        f"{models}: {environment['threads']} threads, {versions_of(environment)}; "
        f"matrix products {rates} TFLOP/s, copy {run.copy_bandwidth / 1e9:.3g} GB/s; "
        f"{environment['date'][:10]}, commit {(environment['commit'] or 'unknown')[:12]}"
        f"{' with changes' if environment['uncommitted_changes'] else ''}"
    )


def main() -> int:
    """Draws or checks; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    readme = (ROOT / "README.md").read_text()
    drawn = {
        "README.md": _MARKS.sub(lambda match: match[1] + "\n" + draw(RESULTS) + match[2], readme),
        "benchmarks/performance.md": performance(RESULTS),
        family.README: family.draw((ROOT / family.README).read_text(), RESULTS),
    }
    stale = False
    for name, text in drawn.items():
        path = ROOT / name
        if arguments.check and (not path.exists() or path.read_text() != text):
            print(f"{name} is not what benchmarks/results says: python benchmarks/readme.py")
            stale = True
        elif not arguments.check:
            path.write_text(text)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
