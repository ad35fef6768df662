"""The command line, ``effnet``: its commands are ``commands``'."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from effnet.commands import cam, evolve, export, models, predict, search, train

_EXAMPLES = """\
examples:
  effnet models                                        the family, with what its members cost
  effnet models efficientnet_b0 --measure              and how fast they are on this device
  effnet train --data digits --resolution 32 --width 0.25 --depth 0.3 --stem-stride 1 \\
      --epochs 15 --lr 0.01 --out runs/digits          offline
  effnet finetune --data Flowers102 --download --weights b0.safetensors --out runs/flowers
  effnet predict cat.jpg --model efficientnet_b0 --weights b0.safetensors
  effnet cam cat.jpg --model efficientnet_b0 --weights b0.safetensors --out cat.png
  effnet export --model efficientnet_b0 --weights b0.safetensors --out b0.onnx
  effnet search --model efficientnetv2_s --most-parameters 20   MBConv or Fused-MBConv, by stage
  effnet evolve --data digits --width 0.25 --depth 0.3 --resolution 16 --out runs/evolve
                                                       better tables, by training many
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effnet", description="The EfficientNet family on fused kernels.", epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (models, train, predict, cam, export, search, evolve):
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except ValueError as error:
        print(f"effnet: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"effnet: {error}; pip install 'effnet_kernels[effnet]' brings it", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has gone, as in `| head`; nothing is left to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"effnet: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
