"""Where a measurement was made: versions, device, commit; and the device's two ceilings."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import effnet_kernels


def default_device() -> torch.device:
    """The GPU where PyTorch sees one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions_of(description: Mapping[str, Any]) -> str:
    """The libraries that were there, by a ``describe``, in words."""
    names = ("torch", "triton", "onnxruntime", "openvino", "jax")
    found = ((name, description.get(name)) for name in names)
    return ", ".join(f"{name} {version}" for name, version in found if version is not None)


def cpu_model() -> str:
    """The processor's name."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def cpu_isa() -> str:
    """The widest instruction set that the C++ kernels use here (PyTorch's own, without them)."""
    operator = getattr(torch.ops.effnet_kernels_cpp, "cpu_isa", None)
    if operator is not None:
        return str(operator())
    return f"{torch.backends.cpu.get_cpu_capability()} (PyTorch's)"


def libraries() -> dict[str, str]:
    """The compiled libraries of the package, each with the time it was built."""
    files = sorted(Path(effnet_kernels.__file__).parent.glob("*.so"))
    return {
        file.name: datetime.fromtimestamp(file.stat().st_mtime, timezone.utc).isoformat(
            timespec="seconds"
        )
        for file in files
    }


def device_name(device: torch.device) -> str:
    """The name of the GPU or processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def device_slug(device: torch.device) -> str:
    """The device as a directory's name: ``nvidia-h200``, ``intel-xeon-processor-2-cores``."""
    name = device_name(device)
    if device.type != "cuda":
        name = re.sub(r"\((R|TM)\)", "", name) + f" {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cache_bytes(device: torch.device) -> int:
    """The size of the last level of cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes) or 32 << 20


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _command() -> str:
    """The command line without the place of its results."""
    arguments = sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return " ".join([Path(sys.argv[0]).name, *arguments])


def describe(device: torch.device) -> dict[str, Any]:
    """Everything a reader of the numbers needs to know of the machine and the code."""
    # A copy of the tree that comes without its history names the commit it is of.
    commit = os.environ.get("EFFNET_KERNELS_COMMIT") or _git("rev-parse", "HEAD")
    changed = None
    if "EFFNET_KERNELS_COMMIT" not in os.environ:
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "csrc", "effnet_kernels"
        )
    description: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "cpu": cpu_model(),
        "cpu_isa": cpu_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "effnet_kernels": effnet_kernels.__version__,
        "commit": commit,
        "uncommitted_changes": None if changed is None else bool(changed),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "timm": version_of("timm"),
        "onnx": version_of("onnx"),
        "onnxruntime": version_of("onnxruntime"),
        "openvino": version_of("openvino"),
        "jax": version_of("jax"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _command(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        description |= {
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": {
                "conv": torch.backends.cudnn.allow_tf32,
                "matmul": torch.backends.cuda.matmul.allow_tf32,
            },
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return description


def _least_seconds(
    call: Callable[[], Any], device: torch.device, repeats: int, lasting: float = 0.0
) -> float:
    """The shortest of ``repeats`` calls, or of as many as take ``lasting`` seconds."""

    def sample() -> float:
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    for _ in range(2):
        sample()
    samples: list[float] = []
    enough = time.perf_counter() + lasting
    while len(samples) < repeats or time.perf_counter() < enough:
        samples.append(sample())
    return min(samples)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, counted together."""
    size = (4 << 30) if device.type == "cuda" else (512 << 20)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    return 2 * size / _least_seconds(lambda: target.copy_(source), device, 5)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a square matrix product of random numbers: a large one, unless that takes
    long, as bfloat16 does on a CPU without instructions for it. TF32 where convolutions use it.
    """
    with _tf32_of_convolutions():
        return _matmul_rate(device, dtype)


@contextlib.contextmanager
def _tf32_of_convolutions() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    largest = 8192 if device.type == "cuda" else 2048
    size = 512
    while True:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        product = functools.partial(torch.matmul, left, right)
        if size == largest or _least_seconds(product, device, 1) > 0.2:
            # On processors that others share a rate can be halved for a second.
            lasting = 0.0 if device.type == "cuda" else 2.0
            return 2 * size**3 / _least_seconds(product, device, 5, lasting)
        size *= 2


def ceilings(device: torch.device, dtypes: list[torch.dtype]) -> dict[str, Any]:
    """The copy bandwidth, and the matrix rate in each of ``dtypes`` and in float32."""
    return {
        "copy_bytes_per_second": copy_bandwidth(device),
        "matmul_flops_per_second": {
            str(dtype).removeprefix("torch."): matmul_rate(device, dtype)
            for dtype in dict.fromkeys((*dtypes, torch.float32))
        },
    }
