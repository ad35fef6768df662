"""The command line: ``effnet-kernels info | convert | bench | tune``."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import effnet_kernels
from effnet_kernels import backends

_DESCRIPTION = "Fused kernels for the EfficientNet family."
_EXAMPLES = """\
examples:
  effnet-kernels info                       which backends run here, and why others do not
  effnet-kernels convert efficientnet_b4    what convert() would replace in a timm model
  effnet-kernels bench kernels              the depthwise op beside eager PyTorch, torch.compile
  effnet-kernels bench mbconv               likewise whole blocks, or another op
  effnet-kernels bench models --batch 1 8   whole models, stock and converted
"""
_CONVERT_EXAMPLES = """\
examples:
  effnet-kernels convert efficientnet_b0
  effnet-kernels convert tf_efficientnetv2_s --json
"""
_BENCH_EXAMPLES = """\
examples:
  effnet-kernels bench kernels --batch 8 --dtypes float32
  effnet-kernels bench kernels --models efficientnetv2_s --modes training --only compile cpu
  effnet-kernels bench mbconv --batch 1 8 --modes inference
  effnet-kernels bench fused_mbconv --models efficientnetv2_s@384 --only compile folded cpu
  effnet-kernels bench models --models efficientnet_b0@224 --modes inference --batch 1 8 --out runs
  effnet-kernels bench models --modes inference --device cpu --only onnxruntime openvino cpu
"""

SUITES = (
    "kernels", "mbconv", "fused_mbconv", "pointwise_conv_bn_act", "squeeze_excite",
    "batch_norm_act", "models",
)  # fmt: skip
"""What ``bench`` takes: the names of ``bench.command.SUITES``."""


class CommandError(Exception):
    """What the user gave cannot be done; the message is one line."""


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "effnet-kernels", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=formatter
    )
    parser.add_argument("--version", action="version", version=effnet_kernels.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="backends, versions and devices of this machine")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    convert = commands.add_parser(
        "convert", help="what convert() would replace in a timm model", epilog=_CONVERT_EXAMPLES,
        formatter_class=formatter,
    )  # fmt: skip
    convert.add_argument("model", metavar="MODEL", help="timm's name of it")
    convert.add_argument("--json", action="store_true", help="print JSON")
    convert.set_defaults(run=_convert)

    bench = commands.add_parser(
        "bench", help="measure the kernels, or whole models, beside their peers",
        epilog=_BENCH_EXAMPLES, formatter_class=formatter,
    )  # fmt: skip
    # What a suite can do is known to the suite, which takes long to import: only when asked for.
    bench.add_argument(
        "suite", choices=SUITES, metavar="SUITE",
        help=f"of {', '.join(SUITES)}; kernels: those of the depthwise op",
    )  # fmt: skip
    bench.add_argument(
        "options", nargs=argparse.REMAINDER, help="the suite's: see bench SUITE --help"
    )
    bench.set_defaults(run=_bench)

    tune = commands.add_parser("tune", help="find the fastest tiles of Triton kernels on this GPU")
    tune.add_argument(
        "--models", nargs="+", default=["efficientnet_b0", "efficientnetv2_s"], metavar="MODEL",
        help="whose 1x1 convolutions and Fused-MBConv blocks: of those that bench kernels --help "
        "lists (default: efficientnet_b0 efficientnetv2_s)",
    )  # fmt: skip
    tune.add_argument("--batch", nargs="+", type=int, default=[256], metavar="N")
    tune.add_argument("--jobs", type=int, default=8, metavar="N", help="compilers (default: 8)")
    tune.add_argument("--out", metavar="FILE", help="default: the GPU's table in the package")
    tune.add_argument("--share", nargs=2, type=int, help=argparse.SUPPRESS)
    tune.set_defaults(run=_tune)
    return parser


def information() -> dict[str, Any]:
    """What ``info`` prints: backends (None, or why not), versions, devices, build."""
    from effnet_kernels.bench import environment

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            gpus.append(
                {
                    "name": properties.name,
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    missing = {name: backend.missing for name, backend in backends.KERNEL_BACKENDS.items()}
    for name, backend in backends.KERNEL_BACKENDS.items():
        if missing[name] is None and backend.devices == ("cuda",) and not gpus:
            missing[name] = "PyTorch sees no GPU"
    return {
        "effnet_kernels": effnet_kernels.__version__,
        "backends": missing,
        "disabled": backends.disabled(),
        "demanded_backend": os.environ.get("EFFNET_KERNELS_BACKEND") or None,
        "versions": {
            "python": platform.python_version(),
            **{name: environment.version_of(name) for name in ("torch", "triton", "timm")},
        },
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": {
            "model": environment.cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": environment.cpu_isa(),
        },
        "libraries": environment.libraries(),
    }


def _info(arguments: argparse.Namespace) -> int:
    found = information()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"effnet_kernels {found['effnet_kernels']}")
    print("\nbackends")
    for name, reason in found["backends"].items():
        print(f"  {name:8} {'available' if reason is None else f'no: {reason}'}")
    print(f"  {'eager':8} available")
    if found["disabled"]:
        print("  EFFNET_KERNELS_DISABLE is set: every call runs on eager")
    elif found["demanded_backend"]:
        print(f"  EFFNET_KERNELS_BACKEND={found['demanded_backend']}: no other is used")
    print("\nversions")
    for name, version in found["versions"].items():
        print(f"  {name:8} {version or 'not installed'}")
    print(f"  {'cuda':8} {found['cuda'] or 'none in this torch'}")
    print("\ndevices")
    for gpu in found["gpus"]:
        memory = gpu["memory_bytes"] / 2**30
        print(f"  {gpu['name']}, compute capability {gpu['compute_capability']}, {memory:.0f} GiB")
    cpu = found["cpu"]
    print(
        f"  {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads, kernels: {cpu['isa']}"
    )
    print("\nlibraries (libtorch stable ABI of 2.11)")
    for name, built in found["libraries"].items():
        print(f"  {name}, built {built}")
    if not found["libraries"]:
        print("  none is built")
    return 0


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise CommandError(
            "timm is not installed; pip install 'effnet_kernels[timm]' brings it"
        ) from None
    except Exception as error:  # a torchvision of another torch build fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f"timm does not import: {reason}") from None
    return timm


def _convert(arguments: argparse.Namespace) -> int:
    timm = _timm()
    if not timm.is_model(arguments.model):
        stem = arguments.model.split(".")[0]
        close = difflib.get_close_matches(stem, timm.list_models(), n=3, cutoff=0.6)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise CommandError(f"timm has no model {arguments.model!r}{hint}")
    model = timm.create_model(arguments.model)
    effnet_kernels.convert(model)
    entries = effnet_kernels.report(model)
    if arguments.json:
        blocks = [
            {"name": e.name, "class": e.class_name, "taken": e.taken, "reason": e.reason}
            for e in entries
        ]
        document = {"model": arguments.model, "taken": entries.taken, "blocks": blocks}
        print(json.dumps(document, indent=1))
        return 0
    print(entries)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from effnet_kernels.bench import command, report

    suite = command.SUITES[arguments.suite]
    if arguments.suite == "models":
        _timm()
    parser = argparse.ArgumentParser(
        f"effnet-kernels bench {arguments.suite}", description=suite.__doc__,
        epilog=_BENCH_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_arguments(parser, suite)
    try:
        return command.run(parser.parse_args(arguments.options))
    except (ValueError, report.MissingExtraError) as error:
        raise CommandError(str(error).splitlines()[0]) from None


def _tune(arguments: argparse.Namespace) -> int:
    from effnet_kernels.bench import shapes

    unknown = [model for model in arguments.models if model not in shapes.MODELS]
    if unknown:
        raise CommandError(f"--models: got {unknown[0]!r}, expected some of {[*shapes.MODELS]}")
    reason = backends.TRITON.missing
    if reason is not None or not torch.cuda.is_available():
        raise CommandError(f"tune needs an NVIDIA GPU and Triton: {reason or 'no GPU'}")
    from effnet_kernels.bench import tune

    return tune.run(
        arguments.models, arguments.batch, arguments.jobs, arguments.out, arguments.share
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        print(f"effnet-kernels: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone, as in `| head`; nothing is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
