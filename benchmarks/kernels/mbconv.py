"""The published measurement of ``ops.mbconv`` and ``ops.mbconv_train``: see published.py."""

from __future__ import annotations

import sys

from published import run

from effnet_kernels.bench import mbconv

if __name__ == "__main__":
    sys.exit(run(mbconv))
