"""What the scripts beside this one do: a suite with the settings that its results are published by.

On a CPU: EfficientNet-B0's shapes, batch 8, float32 and bfloat16. On a GPU: B0, B4 and V2-S, a
batch that fills it, bfloat16 and float16. Fused-MBConv, which neither B0 nor B4 has: V2-S at 300
and 384; on a GPU also M and L. Options change that, and results go to benchmarks/results/<device>.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnet_kernels.bench import command, environment


def run(
    suite: Any,
    models: Sequence[str] = ("efficientnet_b0", "efficientnet_b4", "efficientnetv2_s"),
) -> int:
    """Runs ``suite`` with the settings of this device unless options say otherwise.

    Args:
        suite: a module.
        models: what a GPU measures; a CPU the suite's default.

    Returns:
        The exit status.
    """
    assert __doc__ is not None
    settings = __doc__.partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        description=f"The published measurement of {suite.NAME}.\n\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser, suite)
    device = environment.default_device()
    results = Path(__file__).parents[1] / "results" / environment.device_slug(device)
    parser.set_defaults(out=results)
    if device.type == "cuda":
        parser.set_defaults(models=list(models), batch=[128], dtypes=["bfloat16", "float16"])
    return command.run(parser.parse_args())
