"""Bytes, FLOPs and the limits they set for a model, at each level of fusion.

python benchmarks/roofline.py efficientnet_b0 --dtype bfloat16 --bandwidth 4300 --matmul 790
python benchmarks/roofline.py effnet:efficientnet_b0          # the model of python/effnet
"""

from __future__ import annotations

import argparse
import difflib
import sys

import torch
import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch
from torch import nn

from effnet_kernels import use_backend
from effnet_kernels.bench import command, environment, traffic

_OURS = "effnet:"


class ModelError(ValueError):
    """There is no such model."""


def create(name: str) -> nn.Module:
    """timm's model ``name``, or with ``effnet:`` before it this project's.

    Raises:
        ModelError: there is no such model.
    """
    if name.startswith(_OURS):
        import effnet

        try:
            return effnet.create_model(name.removeprefix(_OURS))
        except ValueError as error:
            raise ModelError(str(error)) from error
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ModelError(f"timm has no model {name!r}{hint}")
    return timm.create_model(name)  # type: ignore[no-any-return]


def default_size(name: str) -> int:
    """The resolution a model is made for."""
    import timm

    config = timm.get_pretrained_cfg(name.removeprefix(_OURS), allow_unregistered=True)
    return int(config.input_size[-1]) if config is not None else 224


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="timm's name of it, or effnet:NAME")
    parser.add_argument("--size", type=int, help="pixels (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1, help="default: 1")
    parser.add_argument("--dtype", choices=command.DTYPES, default="bfloat16")
    parser.add_argument("--bandwidth", type=float, help="GB/s of a copy (default: measured here)")
    parser.add_argument("--matmul", type=float, help="TFLOP/s (default: measured here)")
    parser.add_argument("--kernels", action="store_true", help="list every level's kernels")
    arguments = parser.parse_args()
    dtype, device = command.DTYPES[arguments.dtype], environment.default_device()
    try:
        with torch.device("meta"):
            model = create(arguments.model).to(dtype=dtype, memory_format=torch.channels_last)
            size = arguments.size or default_size(arguments.model)
            image = torch.empty(arguments.batch, 3, size, size, dtype=dtype)
            image = image.contiguous(memory_format=torch.channels_last)
        with use_backend("eager"):  # our ops as the ones they are made of
            recording = traffic.record(model, image)
    except ModelError as error:
        print(f"roofline.py: {error}", file=sys.stderr)
        return 2
    bandwidth = (arguments.bandwidth or environment.copy_bandwidth(device) / 1e9) * 1e9
    rate = (arguments.matmul or environment.matmul_rate(device, dtype) / 1e12) * 1e12
    print(
        f"{arguments.model} at {size}x{size}, {arguments.dtype}, batch {arguments.batch}; copy "
        f"{bandwidth / 1e9:.4g} GB/s, matmul {rate / 1e12:.3g} TFLOP/s\n"
        "images/s by bytes: activations over the copy bandwidth; by FLOPs: over the matmul rate; "
        "by kernel: each\nkernel takes the longer of its bytes (weights too) and its FLOPs\n"
    )
    print(
        f"{'level':12}{'kernels':>8}{'MB/image':>10}{'weights MB':>12}{'GFLOP/image':>13}"
        f"{'FLOP/byte':>11}{'by bytes':>11}{'by FLOPs':>11}{'by kernel':>11}"
    )
    n = arguments.batch
    for level in traffic.count(recording):
        print(
            f"{level.level:12}{len(level.kernels):>8}{level.bytes / n / 1e6:>10.2f}"
            f"{level.weight_bytes / 1e6:>12.2f}{level.flops / n / 1e9:>13.3f}"
            f"{level.flops / (level.bytes + level.weight_bytes):>11.1f}"
            f"{n * bandwidth / level.bytes:>11.0f}{n * rate / level.flops:>11.0f}"
            f"{n / level.seconds(bandwidth, rate):>11.0f}"
        )
        if arguments.kernels:
            for kernel in level.kernels:
                print(f"    {kernel.bytes / n / 1e6:8.3f} MB  {', '.join(kernel.ops)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
