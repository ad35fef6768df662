"""The published measurement of ``ops.depthwise_conv_bn_act``.

On a CPU: EfficientNet-B0's shapes, batch 8, float32 and bfloat16. On a GPU: B0, B4 and V2-S, a
batch that fills it, bfloat16 and float16. Options change that, and results go to
benchmarks/results/<device>.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from effnet_kernels.bench import command, depthwise_conv_bn_act, environment


def main() -> int:
    """Runs the suite with the settings of this device unless options say otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    command.add_arguments(parser, depthwise_conv_bn_act)
    device = command.default_device()
    results = Path(__file__).parents[1] / "results" / environment.device_slug(device)
    parser.set_defaults(out=results)
    if device.type == "cuda":
        parser.set_defaults(
            models=["efficientnet_b0", "efficientnet_b4", "efficientnetv2_s"],
            batch=[128],
            dtypes=["bfloat16", "float16"],
        )
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
