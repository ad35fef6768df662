"""Finds the fastest tiles of the Triton kernels on this GPU, and writes their table.

For every pointwise convolution and Fused-MBConv block of the models it times all tiles that fit and
keeps the best.
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
from effnet_kernels.bench import (
    environment,
    fused_mbconv,
    kernels,
    pointwise_conv_bn_act,
    shapes,
)
from effnet_kernels.triton import launch, tiles
from effnet_kernels.triton.fused_mbconv import tiles_of
from effnet_kernels.triton.launch import Hardware

SHARED_BYTES = 200 * 1024
FINALISTS = 4

Key = tiles.Problem | tiles.BlockProblem
Problem = pointwise_conv_bn_act.Problem | fused_mbconv.Problem
_BLOCKS: dict[type, Any] = {
    tiles.Problem: pointwise_conv_bn_act.OurBlock,
    tiles.BlockProblem: fused_mbconv.OurBlock,
}


def candidates(problem: Key, hardware: Hardware) -> Iterator[tiles.Tile]:
    """Tiles that fit the registers and shared memory, without much more of them than is used."""
    if isinstance(problem, tiles.BlockProblem):
        yield from tiles_of(problem, hardware)
        return
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


def problems(models: list[str], batches: list[int], dtype: torch.dtype) -> dict[Key, Problem]:
    """What to tune for, with a benchmark's problem that has it."""
    found: dict[Key, Problem] = {}
    size = dtype.itemsize
    for model, batch in itertools.product(models, batches):
        for shape in shapes.pointwise_shapes(model):
            problem = pointwise_conv_bn_act.Problem(shape, batch, dtype, shape.role)
            pixels = batch * shape.size**2
            key = tiles.Problem(pixels, shape.in_channels, shape.out_channels, size, shape.gate)
            found.setdefault(key, problem)
        for block in shapes.fused_mbconv_shapes(model):
            features = block.out_channels if block.expands else 0
            found.setdefault(
                tiles.BlockProblem(
                    batch * block.output_size**2, block.kernel, block.in_channels, block.channels,
                    features, size, precise=False,
                ),
                fused_mbconv.Problem(block, batch, dtype, "inference"),
            )  # fmt: skip
    return found


def _call(key: Key, problem: Problem) -> tuple[Any, Any]:
    """Our block's call on Triton, and its inputs."""
    device = torch.device("cuda")
    block = _BLOCKS[type(key)](problem, device)
    block.prepare()
    return kernels.caller(block, backends.TRITON.name), kernels.inputs_of(problem, device)


def _hardware() -> Hardware:
    return launch.hardware(torch.empty(0, device="cuda"))


def compile_share(wanted: dict[Any, Any], share: int, shares: int) -> None:
    """Calls every ``shares``-th tile once, from ``share`` on."""
    number = 0
    for key, problem in wanted.items():
        call, inputs = _call(key, problem)
        for tile in candidates(key, _hardware()):
            number += 1
            if number % shares == share:
                with (
                    tiles.force(tile, type(key)),
                    torch.no_grad(),
                    contextlib.suppress(OutOfResources),
                ):
                    call(inputs)
        torch.cuda.synchronize()


def _seconds(
    call: Any, inputs: Any, tile: tiles.Tile, kind: type, calls: int, replays: int
) -> float:
    """The median time of a call, by replays of a CUDA graph of ``calls``."""
    with tiles.force(tile, kind), torch.no_grad():
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


def fastest(key: Key, problem: Problem) -> tuple[tiles.Tile, float, int]:
    """The tile with the least time, its seconds, and how many were tried: all of them briefly, then
    the best again.
    """
    call, inputs = _call(key, problem)
    brief, kind = {}, type(key)
    for tile in candidates(key, _hardware()):
        with contextlib.suppress(OutOfResources):
            brief[tile] = _seconds(call, inputs, tile, kind, 3, 3)
    best = sorted(brief, key=lambda tile: brief[tile])[:FINALISTS]
    long = {tile: _seconds(call, inputs, tile, kind, 20, 8) for tile in best}
    tile = min(long, key=lambda tile: long[tile])
    return tile, long[tile], len(brief)


def run(
    models: list[str], batches: list[int], jobs: int, out: str | None,
    share: tuple[int, int] | None,
) -> int:  # fmt: skip
    """Tunes bfloat16, and updates the table; what it says of other problems stays.

    Args:
        models: as ``shapes.model_of`` takes them.
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
    entries: dict[type, dict[Key, dict[str, Any]]] = {kind: {} for kind in _BLOCKS}
    if path.exists():
        before = json.loads(path.read_text())
        for op, kind in tiles.PROBLEMS.items():
            for entry in before.get(op, []):
                entries[kind][kind(**entry["problem"])] = entry
    for key, problem in wanted.items():
        tile, seconds, tried = fastest(key, problem)
        entries[type(key)][key] = {
            "problem": key._asdict(),
            "tile": tile._asdict(),
            "microseconds": round(seconds * 1e6, 2),
            "tried": tried,
        }
        _write(path, entries)  # each time: it may be cut off
        print(f"{problem}: {tile}, {seconds * 1e6:.1f} us, of {tried}", flush=True)
    return 0


def _write(path: Path, entries: dict[type, dict[Key, dict[str, Any]]]) -> None:
    table = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: environment.version_of(name) for name in ("torch", "triton")},
        **{
            op: [entries[kind][key] for key in sorted(entries[kind])]
            for op, kind in tiles.PROBLEMS.items()
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
