"""Without a GPU the Triton kernels run in Triton's interpreter, asked for before any import."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; more threads than cores wait for each other, spinning.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("EFFNET_KERNELS_BACKEND", None)
os.environ.pop("EFFNET_KERNELS_DISABLE", None)

from collections.abc import Iterator

import pytest
import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch
from devices import device_of

from effnet_kernels import backends


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--exhaustive``: half an hour more on two cores."""
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="compare large models too, and compile for every GPU architecture, not sm_90 alone",
    )


@pytest.fixture(scope="session")
def exhaustive(request: pytest.FixtureRequest) -> bool:
    """Whether what takes long is asked for."""
    return bool(request.config.getoption("--exhaustive"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN, so that an output no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32, which PyTorch allows convolutions unless told otherwise: eager takes it for some
    shapes, and what it then computes is no yardstick.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For whole models on small images, where more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", "triton", "cuda"])
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """Each kernel backend that can run here, by name."""
    name: str = request.param
    device = device_of(name)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} needs an NVIDIA GPU; its kernels run in tests/cuda_emulator")
    missing = backends.KERNEL_BACKENDS[name].missing
    assert missing is None, f"backend {name} is missing: {missing}"
    return name
