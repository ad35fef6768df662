"""Builds ``csrc/cuda`` for the CPU: the same files, g++ and the emulator instead of nvcc and a GPU.

Outputs go to ``build/cuda_emulator`` and are made again when a source or a flag changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda_emulator"
TORCH = Path(torch.__file__).parent

# Unoptimised, with line numbers only: compiling takes longer than the tests of the outcome do.
FLAGS = [
    "-std=c++17", "-O0", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-fvisibility=hidden",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}",
]  # fmt: skip
TORCH_FLAGS = [
    "-DEFFNET_LIBRARY=effnet_kernels_emulator", "-DEFFNET_CUDA_DISPATCH_KEY=CPU", "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-isystem{TORCH / 'include'}",
]  # fmt: skip
COMPILER = os.environ.get("CXX", "g++")
JOBS = 2


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if os.uname().machine != "x86_64":
        return "the emulator's fiber switch is written for x86-64"
    return None if shutil.which(COMPILER) else f"there is no {COMPILER}"


def _compile(source: Path, flags: list[str]) -> Path:
    """The object file of ``source``, named by a digest of all that it is made from."""
    command = [COMPILER, *flags]
    preprocessed = subprocess.run(
        [*command, "-E", "-P", "-x", "c++", str(source)], check=True, capture_output=True
    ).stdout
    digest = hashlib.sha256(" ".join(command).encode() + preprocessed).hexdigest()[:16]
    target = OUTPUT / f"{source.stem}-{digest}.o"
    if not target.exists():
        for old in OUTPUT.glob(f"{source.stem}-*.o"):
            old.unlink()
        partial = target.with_suffix(".partial")
        subprocess.run([*command, "-x", "c++", "-c", str(source), "-o", str(partial)], check=True)
        partial.rename(target)
    return target


def _link(name: str, objects: list[Path], flags: list[str]) -> Path:
    digest = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    target = OUTPUT / f"{digest}-{name}"
    if not target.exists():
        for old in OUTPUT.glob(f"*-{name}"):
            old.unlink()
        command = [COMPILER, "-fsanitize=address,undefined", *map(str, objects), *flags]
        subprocess.run([*command, "-o", str(target)], check=True)
    return target


def build() -> tuple[Path, Path]:
    """(the library of kernels for ``torch.ops.load_library``, the program of faulty kernels)."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    # One process builds, the others wait and find it done.
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> tuple[Path, Path]:
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with_torch = [*kernels, ROOT / "csrc" / "ops.cpp", HERE / "torch_runtime.cpp"]
    plain = [(HERE / "emulator.cpp", [*FLAGS, "-O2"]), (HERE / "faults.cu", FLAGS)]
    with ThreadPoolExecutor(JOBS) as pool:
        torch_objects = list(pool.map(lambda s: _compile(s, FLAGS + TORCH_FLAGS), with_torch))
        # Optimised: tests run its warp operations by the million.
        emulator, faults = pool.map(lambda s: _compile(s[0], s[1]), plain)
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
    # Bsymbolic: torch_runtime.cpp's functions, not libtorch's of the same name.
    library = _link(
        "libkernels.so",
        [*torch_objects, emulator],
        ["-shared", "-Wl,-Bsymbolic", "-Wl,--no-as-needed", *libraries],
    )
    return library, _link("faults", [emulator, faults], [])


def environment() -> dict[str, str]:
    """The environment of a process that loads the library into Python."""

    def runtime(name: str) -> str:
        # Resolved: g++ may answer with a path relative to its own folders.
        path = subprocess.run(
            [COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        return str(Path(path).resolve())

    return {
        **os.environ,
        # libstdc++ too: AddressSanitizer looks for __cxa_throw before Python has loaded it.
        "LD_PRELOAD": " ".join([runtime("libasan.so"), runtime("libstdc++.so")]),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
