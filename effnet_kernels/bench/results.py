"""What a benchmark writes down: rows, their groups' geometric means, and the JSON around them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effnet_kernels.bench.accuracy import Errors
from effnet_kernels.bench.timing import Timing

BASELINE = "eager"
"""The contender that speed-ups are over: eager PyTorch, channels-last."""


@dataclass
class Row:
    """One contender on one problem.

    Attributes:
        model: the model that the problem comes from.
        case: the problem among the model's, in words.
        batch: images.
        dtype: as in ``float32``.
        mode: what is run, as in ``inference``.
        contender: who.
        count: how often the problem occurs in the model.
        errors: each result's distance from float64.
        excess: the worst result's share of what the error rule allows.
        timings: by ``warm`` and ``cold``.
        speedups: the baseline's median over this one's, likewise; empty where the row is wrong.
        bytes: the least bytes that an implementation of the op reads and writes.
        flops: arithmetic of the convolutions and matrix products.
        peak_memory: bytes held at a time during one call.
        failed: why the contender did not run, or None.
    """

    model: str
    case: str
    batch: int
    dtype: str
    mode: str
    contender: str
    count: int = 1
    errors: dict[str, Errors] = field(default_factory=dict)
    excess: float = math.inf
    timings: dict[str, Timing] = field(default_factory=dict)
    speedups: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    flops: int | None = None
    peak_memory: int | None = None
    failed: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether the contender ran, and its error exceeds the rule."""
        return self.failed is None and not self.excess <= 1

    @property
    def kind(self) -> str | None:
        """The kind of timing to show where there is room for one; None without any."""
        return "warm" if "warm" in self.timings else next(iter(self.timings), None)

    def to_json(
        self, copy_bandwidth: float, least_seconds: float | None, matmul_seconds: float | None
    ) -> dict[str, Any]:
        """The row as JSON's types; numbers that JSON has no word for are null.

        Args:
            copy_bandwidth: see ``Results``.
            least_seconds: see ``Results``.
            matmul_seconds: see ``Results``.
        """
        return {
            "model": self.model,
            "case": self.case,
            "batch": self.batch,
            "dtype": self.dtype,
            "mode": self.mode,
            "contender": self.contender,
            "count": self.count,
            "failed": self.failed,
            "wrong": self.wrong,
            "excess": _number(self.excess),
            "errors": {n: [_number(e.largest), _number(e.norm)] for n, e in self.errors.items()},
            "speedups": {kind: _number(value) for kind, value in self.speedups.items()},
            "bytes": self.bytes,
            "flops": self.flops,
            "peak_memory": self.peak_memory,
            "timings": {
                kind: {
                    "median": _number(timing.median),
                    "quartiles": [_number(q) for q in timing.quartiles],
                    "copy_bandwidth_share": None
                    if self.bytes is None
                    else _number(self.bytes / timing.median / copy_bandwidth),
                    "roofline_share": None
                    if least_seconds is None
                    else _number(least_seconds / timing.median),
                    "matmul_share": None
                    if matmul_seconds is None
                    else _number(matmul_seconds / timing.median),
                    "method": timing.method,
                    "samples": [_number(s) for s in timing.samples],
                }
                for kind, timing in self.timings.items()
            },
        }


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def set_speedups(rows: Sequence[Row]) -> None:
    """Compares the rows of one problem with its baseline; wrong and failed rows get nothing."""
    baseline = next((r for r in rows if r.contender == BASELINE and r.failed is None), None)
    if baseline is None:
        return
    for row in rows:
        if row.failed is None and not row.wrong:
            row.speedups = {
                kind: baseline.timings[kind].median / timing.median
                for kind, timing in row.timings.items()
            }


@dataclass(frozen=True)
class Group:
    """One contender on all of a model's problems of a mode.

    Attributes:
        speedups: geometric means by ``warm`` and ``cold``, each problem as often as it occurs;
            empty where a row is wrong or failed.
        least: the smallest speed-up, likewise.
        wrong: how many problems came out wrong.
        failed: how many did not run.
    """

    model: str
    batch: int
    dtype: str
    mode: str
    contender: str
    problems: int
    wrong: int
    failed: int
    speedups: dict[str, float]
    least: dict[str, float]


def groups(rows: Iterable[Row]) -> list[Group]:
    """The groups of ``rows``, in order of appearance."""
    members: dict[tuple[str, int, str, str, str], list[Row]] = {}
    for row in rows:
        key = (row.model, row.batch, row.dtype, row.mode, row.contender)
        members.setdefault(key, []).append(row)
    result = []
    for key, of_group in members.items():
        complete = all(row.speedups for row in of_group)
        kinds = of_group[0].speedups if complete else {}
        result.append(
            Group(
                *key,
                problems=sum(row.count for row in of_group),
                wrong=sum(row.count for row in of_group if row.wrong),
                failed=sum(row.count for row in of_group if row.failed is not None),
                speedups={
                    kind: statistics.geometric_mean(
                        [s for row in of_group for s in [row.speedups[kind]] * row.count]
                    )
                    for kind in kinds
                },
                least={kind: min(row.speedups[kind] for row in of_group) for kind in kinds},
            )
        )
    return result


@dataclass
class Results:
    """A benchmark's run.

    Attributes:
        benchmark: the suite's name.
        environment: see ``environment.describe``.
        ceilings: see ``environment.ceilings``.
        settings: how the suite was run.
    """

    benchmark: str
    environment: dict[str, Any]
    ceilings: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def copy_bandwidth(self) -> float:
        """Bytes a second."""
        return float(self.ceilings["copy_bytes_per_second"])

    @property
    def whole_models(self) -> bool:
        """Whether a call is a model on a batch of images, and not one op."""
        return self.benchmark.startswith("models")

    def matmul_seconds(self, row: Row) -> float | None:
        """The measured GEMM limit: a row's FLOPs at the rate of matrix products; None where either
        is not known.

        The rate is float32's where that of the row's dtype is lower, as on CPUs without
        instructions for it: the operands can be converted.
        """
        rates = self.ceilings["matmul_flops_per_second"]
        found = [rates[dtype] for dtype in (row.dtype, "float32") if dtype in rates]
        return None if row.flops is None or not found else row.flops / max(found)

    def least_seconds(self, row: Row) -> float | None:
        """The roofline: the longer of a row's bytes at the copy bandwidth and ``matmul_seconds``;
        None where it has no bytes.
        """
        if row.bytes is None:
            return None
        return max(row.bytes / self.copy_bandwidth, self.matmul_seconds(row) or 0.0)

    def write(self, path: Path) -> None:
        """Writes the JSON, one row a line, making the directory."""
        head = {
            "benchmark": self.benchmark,
            "environment": self.environment,
            "ceilings": self.ceilings,
            "settings": self.settings,
            "groups": [
                {
                    **vars(group),
                    "speedups": {k: _number(v) for k, v in group.speedups.items()},
                    "least": {k: _number(v) for k, v in group.least.items()},
                }
                for group in groups(self.rows)
            ],
        }
        lines = [
            json.dumps(
                row.to_json(self.copy_bandwidth, self.least_seconds(row), self.matmul_seconds(row))
            )
            for row in self.rows
        ]
        text = json.dumps(head, indent=1).removesuffix("\n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{text},\n "rows": [\n' + ",\n".join(lines) + "\n]}\n")


def read(path: Path) -> Results:
    """The results in a file that ``Results.write`` made.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    try:
        document = json.loads(path.read_text())
        rows = []
        for entry in document["rows"]:
            timings = {
                kind: Timing(tuple(t["samples"]), t["method"])
                for kind, t in entry.pop("timings").items()
            }
            errors = {
                name: Errors(*(math.nan if e is None else e for e in pair))
                for name, pair in entry.pop("errors").items()
            }
            del entry["wrong"]
            excess = entry.pop("excess")
            rows.append(
                Row(
                    timings=timings,
                    errors=errors,
                    excess=math.inf if excess is None else excess,
                    **entry,
                )
            )
        return Results(
            document["benchmark"],
            document["environment"],
            document["ceilings"],
            document["settings"],
            rows,
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not the results of a benchmark ({error!r})") from None
