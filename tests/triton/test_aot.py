"""The Triton kernels compile for every architecture within their budget of registers.

``python tests/triton/aot.py --write`` measures the budget anew, after a change that is worth it.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import aot
import pytest

# One worker compiles for all of these tests.
pytestmark = pytest.mark.xdist_group("triton_aot")

USUAL = ("sm_90",)


@functools.cache
def _compiled(architectures: tuple[str, ...]) -> dict[str, dict[str, dict[str, Any]]]:
    return aot.in_processes(architectures)


@pytest.fixture(params=aot.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, exhaustive: bool) -> str:
    """Each architecture that is compiled for."""
    name: str = request.param
    if name not in USUAL and not exhaustive:
        pytest.skip("one architecture is enough to see most faults: run with --exhaustive")
    return name


@pytest.fixture
def compiled(architecture: str, exhaustive: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """What each kernel uses, by architecture, of those that are not skipped."""
    return _compiled(aot.ARCHITECTURES if exhaustive else USUAL)


def is_product(kernel: str) -> bool:
    """Whether ``kernel`` multiplies matrices on the tensor cores."""
    return kernel.endswith(
        ("pointwise_conv_kernel", "expand_depthwise_kernel", "fused_mbconv_kernel")
    )


def test_within_budget(architecture: str, compiled: dict[str, Any]) -> None:
    """No kernel takes more registers or shared memory than the budget says."""
    measured = json.loads(aot.BUDGET.read_text())
    if measured["triton"] != aot.triton_version():
        pytest.skip(f"the budget is of Triton {measured['triton']}")
    budget = measured[architecture]
    assert compiled[architecture].keys() == budget.keys()
    for kernel, used in compiled[architecture].items():
        most_of = dict(budget[kernel])
        assert used["products"] == most_of.pop("products", ""), kernel
        for resource, most in most_of.items():
            assert used[resource] <= most, f"{kernel}: {used[resource]} {resource}, budget {most}"


def test_occupancy_and_spills(architecture: str, compiled: dict[str, Any]) -> None:
    """Nothing is spilled, and three programs of four warps fit; two, with 7 x 7 taps' sums, an
    address for every element (of 13 channels) or small images, or one of eight, with a product's.

    Outside the innermost loops, where it costs nothing, a pair of registers may be in memory.
    """
    for kernel, used in compiled[architecture].items():
        assert used["spilled"] <= (8 if used["spills_in_loops"] == 0 else 0), kernel
        sums = "k7" in kernel and "grad_weight" in kernel
        few = sums or is_product(kernel) or " 13x" in kernel or " small" in kernel
        assert aot.occupancy(architecture, used) >= (8 if few else 12) / 64, kernel


def test_activations_load_16_bytes(architecture: str, compiled: dict[str, Any]) -> None:
    """Where channels are a multiple of 8, no 16-bit activation is loaded by less than 16 bytes.

    The weight gradient's tiles have four channels a thread, or two, by design.
    """
    for kernel, used in compiled[architecture].items():
        if "float16 13x" in kernel or "depthwise_conv" not in kernel or "grad_weight" in kernel:
            continue
        if " small" in kernel:  # the filter comes as it lies
            continue
        assert "16" not in used["loads"], kernel
        assert "64" not in used["loads"], kernel
        assert used["loads"]["128"] >= 10, kernel


def test_pixel_kernels_access_16_bytes(architecture: str, compiled: dict[str, Any]) -> None:
    """Where channels are a multiple of 8, the kernels of BN and activation load nothing by less
    than 16 bytes, and store images by as much; sums are a value or two a thread.
    """
    kernels = ("channel_statistics_kernel", "batch_norm_act_kernel", "batch_norm_act_grad")
    found = {
        name: used
        for name, used in compiled[architecture].items()
        if any(f": {kernel}" in name for kernel in kernels) and " 13x" not in name
    }
    assert found
    for name, used in found.items():
        assert used["loads"].keys() == {"128"}, name
        assert "16" not in used["stores"], name
        if "grad_input" in name:
            assert used["stores"].keys() == {"128"}, name


def test_scaling_reads_one_image(architecture: str, compiled: dict[str, Any]) -> None:
    """Where the gradient's kernel only scales, it does not load the input of BN."""
    found = [
        used
        for name, used in compiled[architecture].items()
        if name.startswith("squeeze_excite forward") and "grad_input" in name
    ]
    assert found
    for used in found:
        # and the gate, 8 float32 values a thread at most
        assert used["loads"]["128"] <= used["stores"]["128"] + 2


def test_products_load_16_bytes(architecture: str, compiled: dict[str, Any]) -> None:
    """Where channels are a multiple of 8, products load nothing by less than 32 bits, pixels and
    weights by 16 bytes; vectors of a value a channel come as the accumulators lie.
    """
    found = {k: used["loads"] for k, used in compiled[architecture].items() if is_product(k)}
    assert found
    for kernel, loads in found.items():
        if "x13x" in kernel or " 13x" in kernel or " small" in kernel:
            continue
        assert "16" not in loads, kernel
        assert loads["128"] >= 6, kernel


def test_tensor_cores(architecture: str, compiled: dict[str, Any]) -> None:
    """Products are made by the tensor cores; on sm_90 and sm_100 by instructions that read their
    factors from shared memory while the warps go on, where a tile has the 64 rows of one.
    """
    instruction = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}[architecture]
    found = {k: used for k, used in compiled[architecture].items() if is_product(k)}
    assert found
    for kernel, used in found.items():
        assert used["products"], kernel
        if kernel.startswith("fused"):
            assert used["products"] == instruction, kernel


def test_fused_copies_are_asynchronous(architecture: str, compiled: dict[str, Any]) -> None:
    """What the tensor cores wait for is 16 bytes a copy, and never in a thread's local memory."""
    found = {
        k: used for k, used in compiled[architecture].items() if k.endswith("fused_mbconv_kernel")
    }
    assert found
    for kernel, used in found.items():
        assert used["spills_in_loops"] == 0, kernel
        if "x13x" not in kernel:
            assert used["copies"].keys() == {"128"}, kernel
