"""The published measurement of ``ops.fused_mbconv`` and its training: see published.py."""

from __future__ import annotations

import sys

from published import run

from effnet_kernels.bench import fused_mbconv

if __name__ == "__main__":
    sys.exit(run(fused_mbconv, (*fused_mbconv.MODELS, "efficientnetv2_m", "efficientnetv2_l")))
