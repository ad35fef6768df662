"""The Triton kernels compile for every architecture within their budget of registers.

``python tests/triton/aot.py --write`` measures the budget anew, after a change that is worth it.
"""

from __future__ import annotations

import json
from typing import Any

import aot
import pytest

# One worker compiles for all of these tests.
pytestmark = pytest.mark.xdist_group("triton_aot")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, Any]]]:
    """What each kernel uses, by architecture."""
    return aot.in_processes(aot.ARCHITECTURES)


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_within_budget(architecture: str, compiled: dict[str, Any]) -> None:
    """No kernel takes more registers or shared memory than the budget says."""
    measured = json.loads(aot.BUDGET.read_text())
    if measured["triton"] != aot.triton_version():
        pytest.skip(f"the budget is of Triton {measured['triton']}")
    budget = measured[architecture]
    assert compiled[architecture].keys() == budget.keys()
    for kernel, used in compiled[architecture].items():
        for resource, most in budget[kernel].items():
            assert used[resource] <= most, f"{kernel}: {used[resource]} {resource}, budget {most}"


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_occupancy_and_spills(architecture: str, compiled: dict[str, Any]) -> None:
    """Nothing is spilled, and three programs of four warps fit; two, with 7 x 7 taps' sums."""
    for kernel, used in compiled[architecture].items():
        assert used["spilled"] == 0, kernel
        warps = 8 if "k7" in kernel and "grad_weight" in kernel else 12
        assert aot.occupancy(used) >= warps / 64, kernel


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_activations_load_16_bytes(architecture: str, compiled: dict[str, Any]) -> None:
    """Where channels are a multiple of 8, no 16-bit activation is loaded by less than 16 bytes.

    The weight gradient's tiles have four channels a thread, or two, by design.
    """
    for kernel, used in compiled[architecture].items():
        if "float16 13x" in kernel or "depthwise_conv" not in kernel or "grad_weight" in kernel:
            continue
        assert "16" not in used["loads"], kernel
        assert "64" not in used["loads"], kernel
        assert used["loads"]["128"] >= 10, kernel


@pytest.mark.parametrize("architecture", aot.ARCHITECTURES)
def test_channel_kernels_load_16_bytes(architecture: str, compiled: dict[str, Any]) -> None:
    """The pooling and the scaling of an image load nothing by less than 16 bytes."""
    found = {k: used["loads"] for k, used in compiled[architecture].items() if "channel_" in k}
    assert found
    for kernel, loads in found.items():
        assert loads.keys() == {"128"}, kernel
