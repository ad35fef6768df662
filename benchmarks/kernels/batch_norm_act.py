"""The published measurement of ``ops.batch_norm_act``: see published.py."""

from __future__ import annotations

import sys

from published import run

from effnet_kernels.bench import batch_norm_act

if __name__ == "__main__":
    sys.exit(run(batch_norm_act))
