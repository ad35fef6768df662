"""Run by test_isa.py, once for each instruction set: the process has just one."""

from __future__ import annotations

import dataclasses

import torch
from accuracy import FORWARD, GRADIENT, assert_error_rule
from ops import test_fused_mbconv as fused_mbconv
from ops import test_mbconv as mbconv
from ops import test_prepared as prepared
from ops.depthwise_cases import CASES, Case, make_arguments, run

THREADS = (1, 2, 3)
# Several channel blocks, bands, strips and slots, none of them whole.
LARGE = Case(3, 150, 37, 75, kernel=5, stride=2, training=True, pool=True, prologue="silu")


def check_numbers() -> None:
    """Every other shared case against float64, in float32 and in one of the 16-bit dtypes."""
    for i, case in enumerate((*CASES[::2], LARGE)):
        for dtype in (torch.float32, (torch.float16, torch.bfloat16)[i % 2]):
            arguments = make_arguments(case, dtype, "cpu")
            ours, eager = run(case, arguments, "cpu"), run(case, arguments, "eager")
            exact = run(case, arguments, "eager", double=True)
            for name, result in ours.items():
                of_stored = name in ("batch_mean", "batch_var")
                assert_error_rule(
                    f"{name} of {case}",
                    result,
                    eager[name],
                    exact[name],
                    dtype if of_stored else result.dtype,
                    GRADIENT if name.startswith("grad") else FORWARD,
                )


def check_blocks() -> None:
    """Some blocks of each kind, in all dtypes."""
    for block in (mbconv, fused_mbconv):
        for case in block.CASES[:5]:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                block.check(case, dtype, "cpu")


def check_prepared() -> None:
    """Networks of packed weights."""
    for gated in (False, True):
        for block in prepared.BLOCKS:
            prepared.test_mbconv(block, gated)
        prepared.test_fused_mbconv(gated)
    prepared.test_pointwise_pool_linear()


def check_threads() -> None:
    """The same bits at every thread count, and twice at each."""
    for case in (LARGE, dataclasses.replace(LARGE, training=False), Case(5, 40, 9, 8, pool=True)):
        arguments = make_arguments(case, torch.float32, "cpu")
        first = None
        for threads in (*THREADS, *THREADS):
            torch.set_num_threads(threads)
            results = run(case, arguments, "cpu")
            first = results if first is None else first
            for name, result in results.items():
                assert torch.equal(result, first[name]), f"{name} of {case}, {threads} threads"


if __name__ == "__main__":
    check_numbers()
    check_blocks()
    check_prepared()
    check_threads()
    print(torch.ops.effnet_kernels_cpp.cpu_isa())
