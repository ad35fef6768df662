"""Finds the fastest tiles of the Triton kernels on this GPU, and writes their table.

For every pointwise convolution of the models it times all tiles that fit and keeps the best.
Compiling takes longer than measuring: ``--jobs`` processes do it beforehand, each for its share,
and leave what they compiled in Triton's cache.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from effnet_kernels import backends
from effnet_kernels.bench import environment, kernels, pointwise_conv_bn_act, shapes
from effnet_kernels.triton import tiles

SHARED_BYTES = 200 * 1024
FINALISTS = 4


def candidates(problem: tiles.Problem) -> Iterator[tiles.Tile]:
    """Tiles that fit the registers and shared memory, without much more of them than is used."""
    for pixels, features, warps in itertools.product((64, 128), (16, 32, 64, 128, 256), (4, 8)):
        # Of the accumulators; the tensor cores take 16 rows a warp.
        registers = pixels * features // (32 * warps)
        if registers > 128 or registers < (32 if warps == 8 else 8) or pixels < 16 * warps:
            continue
        if features >= 2 * max(problem.features, 16):
            continue
        for channels in (16, 32, 64, 128):
            wanted = min(problem.channels, 128)
            if not wanted <= 4 * channels or channels >= 2 * max(problem.channels, 16):
                continue
            for stages in (2, 3) if channels >= problem.channels else (3, 4):
                slice_bytes = (pixels + features) * channels * problem.itemsize
                if stages * slice_bytes <= SHARED_BYTES:
                    yield tiles.Tile(pixels, channels, features, warps, stages)


def problems(
    models: list[str], batches: list[int], dtype: torch.dtype
) -> dict[tiles.Problem, pointwise_conv_bn_act.Problem]:
    """What to tune for, with a benchmark's problem that has it."""
    found: dict[tiles.Problem, pointwise_conv_bn_act.Problem] = {}
    for model in models:
        for batch in batches:
            for shape in shapes.pointwise_shapes(model):
                problem = pointwise_conv_bn_act.Problem(shape, batch, dtype, shape.role)
                key = tiles.Problem(
                    batch * shape.size**2, shape.in_channels, shape.out_channels, dtype.itemsize,
                    shape.gate,
                )  # fmt: skip
                found.setdefault(key, problem)
    return found


def _call(problem: pointwise_conv_bn_act.Problem) -> tuple[Any, Any]:
    """Our block's call on Triton, and its inputs."""
    device = torch.device("cuda")
    block = pointwise_conv_bn_act.OurBlock(problem, device)
    block.prepare()
    return kernels.caller(block, backends.TRITON.name), kernels.inputs_of(problem, device)


def compile_share(wanted: dict[Any, Any], share: int, shares: int) -> None:
    """Calls every ``shares``-th tile once, from ``share`` on."""
    number = 0
    for key, problem in wanted.items():
        call, inputs = _call(problem)
        for tile in candidates(key):
            number += 1
            if number % shares == share:
                with tiles.force(tile), torch.no_grad(), contextlib.suppress(OutOfResources):
                    call(inputs)
        torch.cuda.synchronize()


def _seconds(call: Any, inputs: Any, tile: tiles.Tile, calls: int, replays: int) -> float:
    """The median time of a call, by replays of a CUDA graph of ``calls``."""
    with tiles.force(tile), torch.no_grad():
        call(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call(inputs)
    samples: list[float] = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(float(begin.elapsed_time(end)) / 1e3 / calls)
    return statistics.median(samples[1:])


def fastest(key: tiles.Problem, problem: Any) -> tuple[tiles.Tile, float, int]:
    """The tile with the least time, its seconds, and how many were tried: all of them briefly, then
    the best again.
    """
    call, inputs = _call(problem)
    brief = {}
    for tile in candidates(key):
        with contextlib.suppress(OutOfResources):
            brief[tile] = _seconds(call, inputs, tile, 3, 3)
    best = sorted(brief, key=lambda tile: brief[tile])[:FINALISTS]
    long = {tile: _seconds(call, inputs, tile, 20, 8) for tile in best}
    tile = min(long, key=lambda tile: long[tile])
    return tile, long[tile], len(brief)


def run(
    models: list[str], batches: list[int], jobs: int, out: str | None,
    share: tuple[int, int] | None,
) -> int:  # fmt: skip
    """Tunes bfloat16, and updates the table; what it says of other problems stays.

    Args:
        models: keys of ``shapes.MODELS``.
        batches: images at a time.
        jobs: processes that compile.
        out: the table; that of this GPU in the package unless given.
        share: compile only, this share of so many.

    Returns:
        An exit status.
    """
    wanted = problems(models, batches, torch.bfloat16)
    if share is not None:
        compile_share(wanted, *share)
        return 0
    command = [sys.executable, "-m", "effnet_kernels", "tune", "--models", *models]
    command += ["--batch", *map(str, batches), "--share"]
    shares = [subprocess.Popen([*command, str(i), str(jobs)]) for i in range(jobs)]
    if any([share.wait() != 0 for share in shares]):
        print("a compiler failed; see above")
        return 1

    name = tiles.architecture(torch.empty(0, device="cuda"))
    path = Path(out) if out else tiles.FOLDER / f"{name}.json"
    entries: dict[tiles.Problem, dict[str, Any]] = {}
    if path.exists():
        for entry in json.loads(path.read_text())["pointwise_conv_bn_act"]:
            entries[tiles.Problem(**entry["problem"])] = entry
    for key, problem in wanted.items():
        tile, seconds, tried = fastest(key, problem)
        entries[key] = {
            "problem": key._asdict(),
            "tile": tile._asdict(),
            "microseconds": round(seconds * 1e6, 2),
            "tried": tried,
        }
        print(f"{problem}: {tile}, {seconds * 1e6:.1f} us, of {tried}", flush=True)
    table = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: environment.version_of(name) for name in ("torch", "triton")},
        "pointwise_conv_bn_act": [entries[key] for key in sorted(entries)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return 0
