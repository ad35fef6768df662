"""What nvcc makes of ``csrc/cuda``: it compiles for every architecture, and no kernel uses more
registers than ``budget.json`` allows or spills them.

Some kernels live at their limit of registers, and the compiler leaves values that are needed once a
step in local memory: ``AT_THE_LIMIT`` says which and how many bytes. In the tensor-core kernels no
loop over pixels or taps touches them. The depthwise forward kernels of 5 x 5 and 7 x 7 taps, and
all in training, trade them for a third block on a multiprocessor: at most 64 bytes in inference on
sm_90.

By default for ``USUAL`` alone; with ``--exhaustive`` for all ``ARCHITECTURES``. After a change that
is meant: ``python tests/cuda/test_nvcc.py`` writes ``budget.json`` anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BUDGET = Path(__file__).with_name("budget.json")
ARCHITECTURES = ("80", "90a", "100")
USUAL = ("90a",)
# The kernels of float16 are bfloat16's, type apart: one architecture shows that they compile, and
# that only with --exhaustive.
ONE_ARCHITECTURE = {"depthwise_conv_bn_act_float16.cu": USUAL, "mbconv_float16.cu": USUAL}
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

# Bytes of spill stores, by the start of a kernel's name.
AT_THE_LIMIT = {"depthwise_conv_mma_": 64, "depthwise_conv_kernel": 200}

NVCC = shutil.which("nvcc")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
Usage = dict[str, dict[str, int]]


def compile_kernels(source: Path, architectures: tuple[str, ...]) -> tuple[Usage, list[str]]:
    """({kernel: {architecture: registers}}, kernels that spill too much) of ``source``."""
    assert NVCC is not None
    include = Path(torch.__file__).parent / "include"
    command = [
        NVCC, "-O3", "-std=c++17", "--expt-relaxed-constexpr", "--threads=2", "-Xptxas=-v",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA",
        f"-I{include}", f"-I{ROOT / 'csrc'}",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [*command, "-c", str(source), "-o", f"{folder}/kernels.o"],
            capture_output=True,
            text=True,
        )
    report = result.stdout + result.stderr
    assert result.returncode == 0, report[-8000:]
    found = [match.groupdict() for match in REPORT.finditer(report)]
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(f["name"] for f in found),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    usage: Usage = {}
    spilled = []
    for mangled, match in zip(names, found, strict=True):
        # Without namespaces, return type and parameters: depthwise_conv_kernel<float, 4, 3, 1>.
        name = re.sub(r"effnet::cuda::|^void |\(anonymous namespace\)::", "", mangled)
        name = name.split("(")[0]
        usage.setdefault(name, {})[match["arch"]] = int(match["registers"])
        allowed = max((n for k, n in AT_THE_LIMIT.items() if name.startswith(k)), default=0)
        if int(match["stores"]) > allowed or (int(match["stack"]) and not allowed):
            spilled.append(f"{name} on sm_{match['arch']}: {match['stores']} bytes")
    return usage, spilled


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_register_budget(source: Path, exhaustive: bool) -> None:
    """Registers decide how many threads a multiprocessor holds; spills cost bandwidth."""
    if source.name in ONE_ARCHITECTURE and not exhaustive:
        pytest.skip("the same kernels as bfloat16's: run with --exhaustive")
    wanted = ARCHITECTURES if exhaustive else USUAL
    usage, spilled = compile_kernels(source, ONE_ARCHITECTURE.get(source.name, wanted))
    assert not spilled, f"spills: {spilled}"
    budget = json.loads(BUDGET.read_text())[source.name]
    assert usage.keys() == budget.keys()
    over = [
        f"{name} on sm_{arch}: {registers} registers, budget {budget[name][arch]}"
        for name, by_arch in usage.items()
        for arch, registers in by_arch.items()
        if registers > budget[name][arch]
    ]
    assert not over, "\n".join(over)


def main() -> None:
    """Writes ``budget.json``."""
    budget = {}
    for source in SOURCES:
        usage, spilled = compile_kernels(source, ONE_ARCHITECTURE.get(source.name, ARCHITECTURES))
        print(source.name, *spilled, sep="\n  ")
        budget[source.name] = {name: usage[name] for name in sorted(usage)}
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")


if __name__ == "__main__":
    main()
