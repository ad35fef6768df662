"""Results as a table in the terminal (rich) and as a plot (matplotlib): the ``[bench]`` extra."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from effnet_kernels.bench import peers
from effnet_kernels.bench.environment import versions_of
from effnet_kernels.bench.results import BASELINE, Group, Results, Row, groups

_PLOT_COLUMNS = 2


_WIDTH = 132
"""Of the tables, where the output is no terminal."""


class MissingExtraError(ImportError):
    """A library of the ``[bench]`` extra is not installed."""


def extra(module: str) -> Any:
    """Imports a module of the ``[bench]`` extra.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.split(".")[0]
        raise MissingExtraError(
            f"{library} does not import ({error}); pip install 'effnet_kernels[bench]' brings it"
        ) from None


def console() -> Any:
    """A rich console, wide where the output is a file.

    Raises:
        MissingExtraError: rich is not installed.
    """
    made = extra("rich.console").Console()
    return made if made.is_terminal else extra("rich.console").Console(width=_WIDTH)


def seconds(value: float) -> str:
    """A duration with its unit: ``12.3 us``."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}" if value * scale < 1000 else f"{value * scale:.0f}"
    raise AssertionError


def speedup(row: Row, kind: str) -> str:
    """A row's speed-up for a table: WRONG and failed rows have none."""
    if row.failed is not None:
        return "-"
    if row.wrong:
        return "[bold red]WRONG[/]"
    if kind not in row.speedups:
        return "-"
    value = row.speedups[kind]
    colour = "green" if value >= 1.005 else "red" if value < 0.995 else "default"
    return f"[{colour}]{value:.2f}x[/]"


def _error(row: Row) -> str:
    if row.failed is not None:
        return f"[red]{_escape(row.failed[:60])}[/]"
    worst = max((e.largest for e in row.errors.values()), default=float("nan"))
    return f"{worst:.1e}"


def _escape(text: str) -> str:
    return str(extra("rich.markup").escape(text))


def print_rows(results: Results, console: Any) -> None:
    """One table a model, batch, dtype and mode: every contender on every problem.

    The spread is the distance of the quartiles over the median; "of limit" the op's least time by
    the roofline as a share of the time; "of GEMM" the same of the FLOPs of a whole model at the
    measured rate of matrix products; "of rule" the error as a share of what the rule allows.
    """
    table_of = extra("rich.table").Table
    keys = list(dict.fromkeys((r.model, r.batch, r.dtype, r.mode) for r in results.rows))
    for key in keys:
        rows = [r for r in results.rows if (r.model, r.batch, r.dtype, r.mode) == key]
        kinds = list(dict.fromkeys(kind for row in rows for kind in row.timings))
        model, batch, dtype, mode = key
        table = table_of(
            title=f"{model}, batch {batch}, {dtype}, {mode}", title_justify="left",
            box=extra("rich.box").SIMPLE, padding=(0, 1, 0, 0),
        )  # fmt: skip
        table.add_column("case", no_wrap=True)
        table.add_column("contender", no_wrap=True)
        for kind in kinds:
            table.add_column(kind, justify="right", no_wrap=True)
            table.add_column("spread", justify="right", no_wrap=True)
            table.add_column("speed-up", justify="right", no_wrap=True)
        limit = results.matmul_seconds if results.whole_models else results.least_seconds
        limited = limit(rows[0]) is not None
        if limited:
            heading = "of GEMM" if results.whole_models else "of limit"
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("peak MB", justify="right")
        table.add_column("error", justify="right")
        table.add_column("of rule", justify="right")
        case = ""
        for row in rows:
            cells = [row.case if row.case != case else "", row.contender]
            case = row.case
            for kind in kinds:
                timing = row.timings.get(kind)
                if timing is None:
                    cells += ["-", "-", "-"]
                    continue
                low, high = timing.quartiles
                cells += [
                    seconds(timing.median),
                    f"{(high - low) / timing.median:.0%}",
                    speedup(row, kind),
                ]
            if limited:
                last = row.timings.get(kinds[-1]) if kinds else None
                least = limit(row)
                share = "-"
                if last is not None and least is not None:
                    share = f"{least / last.median:.0%}"
                cells.append(share)
            cells.append("-" if row.peak_memory is None else f"{row.peak_memory / 1e6:.1f}")
            cells += [_error(row), "-" if row.failed else f"{row.excess:.2f}"]
            table.add_row(*cells)
        console.print(table)


def print_groups(results: Results, console: Any) -> None:
    """The geometric means over each group's problems, and its smallest speed-up."""
    table = extra("rich.table").Table(
        title=f"Speed-up over {BASELINE} (channels-last), geometric mean and smallest",
        title_justify="left",
        box=extra("rich.box").SIMPLE,
    )
    for column in ("model", "batch", "dtype", "mode", "contender", "problems"):
        table.add_column(column, justify="right" if column in ("batch", "problems") else "left")
    kinds = list(dict.fromkeys(kind for row in results.rows for kind in row.timings))
    for kind in kinds:
        table.add_column(kind, justify="right")
        table.add_column("smallest", justify="right")
    before = None
    for group in groups(results.rows):
        key = (group.model, group.batch, group.dtype, group.mode)
        if before is not None and key != before:
            table.add_section()
        before = key
        cells = [group.model, str(group.batch), group.dtype, group.mode, group.contender]
        cells.append(str(group.problems))
        for kind in kinds:
            cells += _group_cells(group, kind)
        table.add_row(*cells)
    console.print(table)
    described = results.environment
    rates = ", ".join(
        f"{dtype} {rate / 1e12:.3g} TFLOP/s"
        for dtype, rate in results.ceilings["matmul_flops_per_second"].items()
    )
    console.print(
        f"{described['device']}, {described['threads']} CPU threads, {versions_of(described)}; "
        f"copy {results.copy_bandwidth / 1e9:.4g} GB/s; "
        f"matmul {rates}; commit {(described['commit'] or 'unknown')[:12]}"
        f"{' with changes' if described['uncommitted_changes'] else ''}",
        highlight=False,
    )


def _group_cells(group: Group, kind: str) -> list[str]:
    if group.wrong:
        return [f"[bold red]{group.wrong} WRONG[/]", "-"]
    if group.failed:
        return [f"[red]{group.failed} failed[/]", "-"]
    if kind not in group.speedups:
        return ["-", "-"]
    return [f"{group.speedups[kind]:.2f}x", f"{group.least[kind]:.2f}x"]


def plot(results: Results, path: Path) -> None:
    """Bars, one panel a group: an op's speed-ups over the baseline, a model's images a second.

    Wrong and failed rows are marked, and have no bar.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = extra("matplotlib")
    matplotlib.use("Agg")
    pyplot = extra("matplotlib.pyplot")
    figure = (_plot_rates if results.whole_models else _plot_speedups)(results, pyplot)
    described = results.environment
    kinds = list(dict.fromkeys(kind for row in results.rows for kind in row.timings))
    figure.suptitle(
        f"{described['device']}, torch {described['torch']}"
        + (f", {kinds[-1]} caches" if kinds and not results.whole_models else ""),
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_rates(results: Results, pyplot: Any) -> Any:
    keys = list(dict.fromkeys((r.model, r.case, r.batch, r.dtype, r.mode) for r in results.rows))
    of_key = {
        key: [r for r in results.rows if (r.model, r.case, r.batch, r.dtype, r.mode) == key]
        for key in keys
    }
    columns = min(_PLOT_COLUMNS, len(keys))
    lines = -(-len(keys) // columns)
    bars = max(len(rows) for rows in of_key.values())
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(7.5 * columns, (0.27 * bars + 0.9) * lines + 0.4), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, (key, rows) in zip(panels.flat, of_key.items(), strict=False):
        for place, row in enumerate(rows):
            rate, words = 0.0, "WRONG" if row.wrong else "failed"
            if row.speedups and row.kind is not None:
                rate = row.batch / row.timings[row.kind].median
                words = f"{rate:.3g}, {row.speedups[row.kind]:.2f}x"
            panel.barh(place, rate, 0.75, color="C0" if peers.is_ours(row.contender) else "C7")
            panel.annotate(
                f" {words}", (rate, place), va="center", fontsize=8,
                color="C3" if row.wrong else "black",
            )  # fmt: skip
        panel.set_yticks(range(len(rows)), [row.contender for row in rows], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)  # for the words beside the longest bar
        panel.set_xlim(left=0)
        panel.tick_params(axis="x", labelsize=8)
        model, case, batch, dtype, mode = key
        panel.set_title(f"{model} at {case}, batch {batch}, {dtype}, {mode}", fontsize=9)
        panel.set_xlabel(f"images/s, and the speed-up over {BASELINE}", fontsize=8)
    for panel in list(panels.flat)[len(keys) :]:
        panel.set_visible(False)
    return figure


def _plot_speedups(results: Results, pyplot: Any) -> Any:
    keys = list(dict.fromkeys((r.model, r.batch, r.dtype, r.mode) for r in results.rows))
    contenders = list(
        dict.fromkeys(r.contender for r in results.rows if r.contender != BASELINE)
    )  # fmt: skip
    if not contenders:
        contenders = [BASELINE]
    columns = min(_PLOT_COLUMNS, len(keys))
    lines = -(-len(keys) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(7.5 * columns, 3.4 * lines + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    width = 0.8 / len(contenders)
    for panel, key in zip(panels.flat, keys, strict=False):
        rows = [r for r in results.rows if (r.model, r.batch, r.dtype, r.mode) == key]
        cases = list(dict.fromkeys(r.case for r in rows))
        for place, contender in enumerate(contenders):
            of_contender = {r.case: r for r in rows if r.contender == contender}
            heights, marks = [], []
            for case in cases:
                row = of_contender.get(case)
                kind = next(reversed(row.speedups), None) if row is not None else None
                heights.append(row.speedups[kind] if row is not None and kind else 0.0)
                wrong = row is not None and row.wrong
                missing = row is not None and row.failed is not None
                marks.append("WRONG" if wrong else "failed" if missing else "")
            offsets = [i + (place - (len(contenders) - 1) / 2) * width for i in range(len(cases))]
            panel.bar(offsets, heights, width, label=contender, color=f"C{place}")
            for offset, mark in zip(offsets, marks, strict=True):
                panel.text(offset, 0.02, mark, rotation=90, ha="center", va="bottom", fontsize=6)
        panel.axhline(1.0, color="black", linewidth=0.8)
        panel.set_xticks(range(len(cases)), cases, rotation=35, ha="right", fontsize=7)
        model, batch, dtype, mode = key
        panel.set_title(f"{model}, batch {batch}, {dtype}, {mode}", fontsize=9)
        panel.set_ylabel(f"speed-up over {BASELINE}", fontsize=8)
    for panel in list(panels.flat)[len(keys) :]:
        panel.set_visible(False)
    panels.flat[0].legend(fontsize=7)
    return figure
