"""The command line of the suites: their common options, and a run with table, JSON and plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from effnet_kernels.bench import (
    batch_norm_act,
    depthwise_conv_bn_act,
    environment,
    fused_mbconv,
    mbconv,
    models,
    peers,
    pointwise_conv_bn_act,
    report,
    squeeze_excite,
    xla,
)
from effnet_kernels.bench.results import Results

SUITES: dict[str, Any] = {
    "kernels": depthwise_conv_bn_act,
    "mbconv": mbconv,
    "fused_mbconv": fused_mbconv,
    "pointwise_conv_bn_act": pointwise_conv_bn_act,
    "squeeze_excite": squeeze_excite,
    "batch_norm_act": batch_norm_act,
    "models": models,
}
"""The suites by the name of their subcommand: each op's (``kernels`` is the depthwise one's), and
that of whole models.
"""

_COSTLY = ("compile-max", xla.NAME)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser, suite: Any) -> None:
    """The options of ``suite``: its own and the common ones."""
    device = environment.default_device().type
    caches = ["warm"] if suite is models else ["warm", "cold"]
    seconds = 10.0 if suite is models else 1.0
    suite.add_arguments(parser)
    parser.add_argument(
        "--batch", nargs="+", type=_positive, default=[8], metavar="N", help="default: 8"
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"],
        metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default: float32 bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", metavar="CONTENDER",
        help=f"of {', '.join(suite.PEERS)} and our backends (cpu, cuda, triton, auto"
        f"{'; cpu+prepared, cpu+compile ...' if suite is models else ''}); eager always runs "
        "(default: all that can run, without those that tune or compile for minutes, "
        f"{' and '.join(name for name in _COSTLY if name in suite.PEERS)})",
    )  # fmt: skip
    parser.add_argument(
        "--caches", nargs="+", choices=("warm", "cold"), metavar="KIND",
        default=caches,
        help="of warm and cold; cold: every call finds its input in memory, not in a cache "
        f"(default: {' '.join(caches)})",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=seconds, metavar="S",
        help=f"of sampling for each problem and kind of cache (default: {seconds:g})",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=device, help=f"default: {device}"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="of the CPU")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where the JSON and the plot go (default: benchmarks/results/<device>)",
    )  # fmt: skip
    parser.add_argument("--name", default=suite.NAME, help=f"of the files (default: {suite.NAME})")
    parser.add_argument("--quiet", action="store_true", help="geometric means only, no rows")
    parser.set_defaults(suite=suite)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Runs a suite as its parsed options say.

    Returns:
        The exit status: 1 where a row of ours is wrong or failed, or the run was interrupted.

    Raises:
        report.MissingExtraError: rich or matplotlib is not installed.
        ValueError: an option names what does not exist.
    """
    console = report.console()
    progress_of = report.extra("rich.progress")
    report.extra("matplotlib")
    suite = arguments.suite
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but PyTorch sees no GPU")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = {
        key: [str(v) for v in value] if isinstance(value, list) else value
        for key, value in vars(arguments).items()
        if key in ("models", "modes", "batch", "dtypes", "only", "caches", "seconds", "threads")
    }
    arguments.dtypes = [DTYPES[name] for name in arguments.dtypes]
    problems = list(suite.problems(arguments))
    if not problems:
        raise ValueError(
            f"--models {' '.join(arguments.models)} --modes {' '.join(arguments.modes)} --dtypes "
            f"{' '.join(settings['dtypes'])}: nothing that this suite measures"
        )
    check_only(arguments.only, suite, device)
    only = arguments.only or _affordable(suite, device)
    with console.status("measuring the copy bandwidth and the matrix rate"):
        results = Results(
            suite.NAME,
            environment.describe(device),
            environment.ceilings(device, arguments.dtypes),
            settings,
        )
    load, cores = results.environment["load_average"], results.environment["cores"]
    if device.type == "cpu" and load is not None and load > cores / 2:
        console.print(
            f"[yellow]the machine is busy (load {load:.1f} on {cores} cores): the times will be "
            "those of a busy machine[/]"
        )
    directory = arguments.out or Path("benchmarks", "results", environment.device_slug(device))
    path = directory / f"{arguments.name}.json"
    with progress_of.Progress(
        progress_of.TextColumn("{task.description}"),
        progress_of.BarColumn(),
        progress_of.MofNCompleteColumn(),
        progress_of.TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("", total=len(problems))
        done = 0
        try:
            for problem in problems:
                progress.update(task, description=str(problem))
                match = suite.match(problem, device, only=only, cold="cold" in arguments.caches)
                results.rows += match.run(kinds=arguments.caches, seconds=arguments.seconds)
                results.write(path)  # what is measured is kept, whatever happens next
                done += 1
                progress.advance(task)
        except KeyboardInterrupt:
            console.print(f"[yellow]interrupted: {done} of {len(problems)} problems measured[/]")
    if not results.rows:
        return 1
    if not arguments.quiet:
        report.print_rows(results, console)
    report.print_groups(results, console)
    report.plot(results, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png').name}", soft_wrap=True)
    ours = [row for row in results.rows if row.contender not in suite.PEERS]
    bad = [row for row in ours if row.wrong or row.failed is not None]
    for row in bad[:10]:
        reason = row.failed or f"error {row.excess:.2f} times what the rule allows"
        console.print(
            f"[red]{row.contender} on {row.case} {row.dtype} {row.mode}[/]: "
            + report.extra("rich.markup").escape(reason)
        )
    return 1 if bad or done < len(problems) else 0


def _contenders(suite: Any, device: torch.device) -> list[str]:
    """All that may be asked for on ``device``."""
    names = [*suite.PEERS]
    backends = ["cpu"] if device.type == "cpu" else ["cuda", "triton", peers.AUTO]
    names += backends
    if suite is models:
        names += ["cpu+prepared"] if device.type == "cpu" else []
        names += [f"{backend}+compile" for backend in backends]
    return names


def _affordable(suite: Any, device: torch.device) -> list[str]:
    return [name for name in _contenders(suite, device) if name not in _COSTLY]


def check_only(only: list[str] | None, suite: Any, device: torch.device) -> None:
    """Refuses names of contenders that ``suite`` has none of on ``device``.

    Raises:
        ValueError: there is one.
    """
    known = _contenders(suite, device)
    for name in only or []:
        if name not in known:
            raise ValueError(f"--only: got {name!r}, expected some of {', '.join(known)}")
