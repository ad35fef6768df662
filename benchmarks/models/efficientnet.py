"""The published measurement of whole models.

On a CPU: EfficientNet-B0 at 224, B4 at 380, V2-S at 300 (padded as TensorFlow does it) and at 384,
batch 1 and 8, float32 and bfloat16. On a GPU: the same models, batch 1 and one that fills it,
bfloat16. Options change that, and results go to benchmarks/results/<device>.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torchvision_ops  # noqa: F401  timm's import needs it beside a CPU build of torch

from effnet_kernels.bench import command, environment, models


def main() -> int:
    """Runs the suite with the settings of this device unless options say otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    command.add_arguments(parser, models)
    device = environment.default_device()
    results = Path(__file__).parents[1] / "results" / environment.device_slug(device)
    parser.set_defaults(out=results, batch=[1, 8])
    if device.type == "cuda":
        parser.set_defaults(batch=[1, 128], dtypes=["bfloat16"])
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
