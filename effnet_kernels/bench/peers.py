"""What the suites have in common: compiled peers, and a problem's way from contenders to rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


AUTO = "auto"
"""The contender that demands no backend: what a user gets, each call where it measured fastest."""


def our_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The kernel backends that run on ``device`` in ``dtype`` (Triton's interpreter does not), and
    ``AUTO`` where there are several.
    """
    probe = torch.empty(0, device=device, dtype=dtype)
    names = [
        name
        for name, reason in backends.refusals(probe).items()
        if reason is None and (name != backends.TRITON.name or device.type == "cuda")
    ]
    return [*names, AUTO] if len(names) > 1 else names


def is_ours(contender: str) -> bool:
    """Whether a contender is one of ``our_backends``, with or without a ``+`` and what follows."""
    return contender.split("+")[0] in (*backends.KERNEL_BACKENDS, AUTO)


def demand(contender: str) -> None:
    """Makes one of ``our_backends`` run every call from now on."""
    backends.set_backend(None if contender == AUTO else contender)


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


@dataclass
class Match:
    """Contenders on one problem.

    Attributes:
        problem: what is common to the rows.
        contenders: one of them, ``results.BASELINE``, is the yardstick of error and time.
        named: a call's result as tensors by name.
        exact: the same tensors in float64.
        device: where they run.
        dtype: what one rounding is, which is always allowed.
        training: whether the calls need gradients.
    """

    problem: Row
    contenders: Sequence[Contender]
    named: Callable[[Any], Results]
    exact: Results
    device: torch.device
    dtype: torch.dtype
    training: bool

    def check(self) -> list[Row]:
        """Each contender's row with its error, without times; also compiles what is compiled."""
        with self._calling():
            rows = [self._checked(contender) for contender in self.contenders]
        baseline = (r for r in rows if r.contender == results.BASELINE and r.failed is None)
        yardstick = next(baseline, None)
        for row in rows:
            if row.failed is None and yardstick is not None:
                row.excess = accuracy.excess(row.errors, yardstick.errors, self.dtype)
        return rows

    def run(self, *, kinds: Sequence[str], seconds: float) -> list[Row]:
        """The rows with errors and times.

        Args:
            kinds: ``warm``, ``cold`` or both.
            seconds: of sampling for each kind.
        """
        rows = self.check()
        ran = {row.contender for row in rows if row.failed is None}
        running = [c for c in self.contenders if c.name in ran]
        for kind in kinds if running else ():
            with self._calling():
                measured = timing.measure(
                    running, self.device, cold=kind == "cold", seconds=seconds
                )
            for row in rows:
                if row.contender in measured:
                    row.timings[kind] = measured[row.contender]
        results.set_speedups(rows)
        return rows

    @contextlib.contextmanager
    def _calling(self) -> Iterator[None]:
        with torch.set_grad_enabled(self.training), backends.use_backend(None):
            yield

    def _checked(self, contender: Contender) -> Row:
        row = dataclasses.replace(
            self.problem, contender=contender.name, errors={}, timings={}, speedups={}
        )

        def call() -> Any:
            return contender.call(contender.inputs[0])

        try:
            call()
            tensors = self.named(call())
            row.errors = {n: accuracy.errors(t, self.exact[n]) for n, t in tensors.items()}
            if contender.allocates:
                row.peak_memory = timing.peak_memory(call, self.device)
        except Exception as error:  # a peer's failure is a result, and no reason to lose the rest
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            row.failed = f"{type(error).__name__}: {reason}"[:300]
        return row
