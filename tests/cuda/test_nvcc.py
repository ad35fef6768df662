"""What nvcc makes of ``csrc/cuda``: it compiles for every architecture, and no kernel uses more
registers than ``budget.json`` allows or spills them. Fused-MBConv's kernels, which live on tensor
cores, must be made of the instructions that they are written for, and ``occupancy.json`` has how
many of their blocks and warps a multiprocessor holds, on blocks of models.

Some kernels live at their limit of registers, and the compiler leaves values that are needed once a
step in local memory: ``AT_THE_LIMIT`` says which and how many bytes. The depthwise kernels
trade them for another block on a multiprocessor; no loop over taps touches them.

By default for ``USUAL`` alone; with ``--exhaustive`` for all ``ARCHITECTURES``. After a change that
is meant: ``python tests/cuda/test_nvcc.py`` writes ``budget.json`` and ``occupancy.json`` anew, or
those of the sources that it is given.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
OCCUPANCY = Path(__file__).with_name("occupancy.json")
TILES = Path(__file__).with_name("fused_mbconv_tiles.cu")
ARCHITECTURES = ("80", "90a", "100")
USUAL = ("90a",)
# The kernels of float16 are bfloat16's, type apart: one architecture shows that they compile, and
# that only with --exhaustive.
ONE_ARCHITECTURE = {
    "depthwise_conv_bn_act_float16.cu": USUAL,
    "fused_mbconv_float16.cu": USUAL,
    "mbconv_float16.cu": USUAL,
}
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

# Bytes of spill stores, by the start of a kernel's name.
AT_THE_LIMIT = {"depthwise_conv_backward_kernel": 64, "depthwise_conv_kernel": 200}

# The tensor-core instruction of kernels, by the source's and the start of the kernels' names.
FUSED = ("fused_mbconv_kernel", "dense_conv_kernel")
TENSOR_CORES = {
    "fused_mbconv_bfloat16.cu": (FUSED, "HMMA.16816.F32.BF16"),
    "fused_mbconv_float16.cu": (FUSED, "HMMA.16816.F32"),
    "fused_mbconv_float32.cu": (FUSED, "HMMA.1688.F32.TF32"),
}

# (multiprocessors, bytes of shared memory in each) of A100, H200, B200.
DEVICES = {"80": (108, 164 * 1024), "90a": (132, 228 * 1024), "100": (148, 228 * 1024)}

NVCC = shutil.which("nvcc")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
Usage = dict[str, dict[str, int]]


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton brings some of them too."""
    found = shutil.which(name) or (NVCC and shutil.which(name, path=str(Path(NVCC).parent)))
    triton = find_spec("triton")
    if found or triton is None or triton.origin is None:
        return found
    return shutil.which(name, path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))


def short_names(mangled: list[str]) -> list[str]:
    """Without namespaces, return type and parameters: depthwise_conv_kernel<float, 4, 3, 1>."""
    names = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        re.sub(r"effnet::cuda::|^void |\(anonymous namespace\)::", "", name).split("(")[0]
        for name in names
    ]


def tensor_core_instructions(binary: Path) -> dict[str, set[str]]:
    """{kernel: its tensor-core instructions} of an object file, over all architectures in it; of
    none, where there is no disassembler.
    """
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        return {}
    assembly = subprocess.run(
        [cuobjdump, "-sass", str(binary)], check=True, capture_output=True, text=True
    ).stdout
    _, *functions = re.split(r"Function : (\w+)", assembly)
    found: dict[str, set[str]] = {}
    for name, code in zip(short_names(functions[::2]), functions[1::2], strict=True):
        found.setdefault(name, set()).update(re.findall(r"\b\w*MMA\.[\w.]+", code))
    return found


def occupancy(registers: int, threads: int, shared_bytes: int, device: tuple[int, int]) -> int:
    """Blocks that a multiprocessor holds."""
    warps = threads // 32
    of_warp = (registers * 32 + 255) // 256 * 256
    return min(65536 // of_warp // warps, device[1] // (shared_bytes + 1024), 2048 // threads, 32)


def fused_mbconv_occupancy(usage: Usage) -> dict[str, dict[str, str]]:
    """{block of a model: {architecture: what a multiprocessor holds}}."""
    report: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "tiles"
        emulator = ROOT / "tests" / "cuda_emulator" / "include"
        subprocess.run(
            ["c++", "-std=c++17", f"-I{emulator}", "-x", "c++", str(TILES), "-o", str(program)],
            check=True,
        )
        for arch in (a for a in ARCHITECTURES if a in next(iter(usage.values()))):
            device = DEVICES[arch]
            tiles = subprocess.run(
                [program, *map(str, device)], check=True, capture_output=True, text=True
            ).stdout
            for line in tiles.splitlines():
                block, kernel, threads, shared, grid, rows = line.split(" | ")
                blocks = occupancy(usage[kernel][arch], int(threads), int(shared), device)
                blocks = min(blocks, -(-int(grid) // device[0]))
                report.setdefault(block, {})[arch] = (
                    f"{blocks} of {grid} blocks, {blocks * int(threads) // 32} warps, "
                    f"{shared} bytes of shared memory each, {rows} rows, {kernel}"
                )
    return report


def compile_kernels(source: Path, architectures: tuple[str, ...]) -> tuple[Usage, list[str]]:
    """({kernel: {architecture: registers}}, what is wrong with kernels) of ``source``."""
    assert NVCC is not None
    include = Path(torch.__file__).parent / "include"
    command = [
        NVCC, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=2", "-Xptxas=-v",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA",
        f"-I{include}", f"-I{ROOT / 'csrc'}",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
    ]  # fmt: skip
    instructions: dict[str, set[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.o"
        result = subprocess.run(
            [*command, "-c", str(source), "-o", str(binary)], capture_output=True, text=True
        )
        report = result.stdout + result.stderr
        assert result.returncode == 0, report[-8000:]
        if source.name in TENSOR_CORES:
            instructions = tensor_core_instructions(binary)
    found = [match.groupdict() for match in REPORT.finditer(report)]
    names = short_names([f["name"] for f in found])
    usage: Usage = {}
    faults = []
    for name, match in zip(names, found, strict=True):
        usage.setdefault(name, {})[match["arch"]] = int(match["registers"])
        allowed = max((n for k, n in AT_THE_LIMIT.items() if name.startswith(k)), default=0)
        if int(match["stores"]) > allowed or (int(match["stack"]) and not allowed):
            faults.append(f"{name} on sm_{match['arch']} spills {match['stores']} bytes")
    for name, used in instructions.items():
        kernels, wanted = TENSOR_CORES[source.name]
        if name.startswith(kernels) and used != {wanted}:
            faults.append(f"{name} is made of {sorted(used)}, not of {wanted}")
    return usage, faults


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_register_budget(source: Path, exhaustive: bool) -> None:
    """Registers decide how many threads a multiprocessor holds; spills cost bandwidth."""
    if source.name in ONE_ARCHITECTURE and not exhaustive:
        pytest.skip("the same kernels as bfloat16's: run with --exhaustive")
    wanted = ARCHITECTURES if exhaustive else USUAL
    usage, faults = compile_kernels(source, ONE_ARCHITECTURE.get(source.name, wanted))
    assert not faults, "\n".join(faults)
    budget = json.loads(BUDGET.read_text())[source.name]
    assert usage.keys() == budget.keys()
    over = [
        f"{name} on sm_{arch}: {registers} registers, budget {budget[name][arch]}"
        for name, by_arch in usage.items()
        for arch, registers in by_arch.items()
        if registers > budget[name][arch]
    ]
    assert not over, "\n".join(over)

    if source.name == "fused_mbconv_bfloat16.cu":
        expected = json.loads(OCCUPANCY.read_text())
        found = fused_mbconv_occupancy(usage)
        assert found == {
            block: {arch: by_arch[arch] for arch in found[block]}
            for block, by_arch in expected.items()
        }


def main(names: list[str]) -> None:
    """Writes ``budget.json`` and ``occupancy.json``, of some sources or of all."""
    unknown = set(names) - {source.name for source in SOURCES}
    if unknown:
        sys.exit(f"no such source: {', '.join(sorted(unknown))}")
    budget = json.loads(BUDGET.read_text()) if names else {}
    for source in SOURCES:
        if names and source.name not in names:
            continue
        usage, faults = compile_kernels(source, ONE_ARCHITECTURE.get(source.name, ARCHITECTURES))
        print(source.name, *faults, sep="\n  ")
        budget[source.name] = {name: usage[name] for name in sorted(usage)}
        if source.name == "fused_mbconv_bfloat16.cu":
            OCCUPANCY.write_text(json.dumps(fused_mbconv_occupancy(usage), indent=1) + "\n")
    BUDGET.write_text(json.dumps(dict(sorted(budget.items())), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
