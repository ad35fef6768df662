"""What the suites have in common: compiled peers, and a problem's way from contenders to rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effnet_kernels import backends
from effnet_kernels.bench import accuracy, results, timing
from effnet_kernels.bench.results import Row
from effnet_kernels.bench.timing import Contender

COMPILED = {"compile": "default", "compile-max": "max-autotune-no-cudagraphs"}
"""Modes of ``torch.compile`` by the contender's name. CUDA graphs are the timer's business."""

Results = Mapping[str, Tensor]
"""A call's tensors by name; gradients' names start with ``grad``."""


def our_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernel backends that run on ``device`` in ``dtype`` (Triton's interpreter does not)."""
    probe = torch.empty(0, device=device, dtype=dtype)
    return [
        name
        for name, reason in backends.refusals(probe).items()
        if reason is None and (name != backends.TRITON.name or device.type == "cuda")
    ]


def compiled(function: Callable[..., Any], mode: str, *, freezing: bool) -> Callable[..., Any]:
    """``torch.compile(function)``, with the parameters frozen into the code if ``freezing``.

    The compilation happens in the first call, which freezing needs to be without gradients.
    """
    result = torch.compile(function, mode=mode, dynamic=False)
    first = True

    def call(*arguments: Any) -> Any:
        nonlocal first
        if not first:
            return result(*arguments)
        first = False
        with torch._inductor.config.patch(freezing=freezing):
            return result(*arguments)

    return call


def compare(
    problem: Row,
    contenders: Sequence[Contender],
    named: Callable[[Any], Results],
    exact: Results,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kinds: Sequence[str],
    seconds: float,
) -> list[Row]:
    """Checks the contenders against float64, then times in turns those that run.

    Args:
        problem: what is common to the rows.
        contenders: one of them, ``results.BASELINE``, is the yardstick of error and time.
        named: a call's result as tensors by name.
        exact: the same tensors in float64.
        device: where they run.
        dtype: what one rounding is, which is always allowed.
        kinds: ``warm``, ``cold`` or both.
        seconds: of sampling for each kind.
    """
    rows, running = [], []
    for contender in contenders:
        row = dataclasses.replace(problem, contender=contender.name, errors={}, timings={})
        rows.append(row)
        try:
            contender.call(contender.inputs[0])
            tensors = named(contender.call(contender.inputs[0]))
            row.errors = {name: accuracy.errors(t, exact[name]) for name, t in tensors.items()}
            row.peak_memory = timing.peak_memory(
                lambda contender=contender: contender.call(contender.inputs[0]),  # type: ignore[misc]
                device,
            )
            running.append(contender)
        except Exception as error:  # a peer's failure is a result, and no reason to lose the rest
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            row.failed = f"{type(error).__name__}: {reason}"[:300]
    yardstick = next((r.errors for r in rows if r.contender == results.BASELINE), {})
    for row in rows:
        if row.failed is None:
            row.excess = accuracy.excess(row.errors, yardstick, dtype) if yardstick else 0.0
    for kind in kinds:
        measured = timing.measure(running, device, cold=kind == "cold", seconds=seconds)
        for row in rows:
            if row.contender in measured:
                row.timings[kind] = measured[row.contender]
    results.set_speedups(rows)
    return rows
