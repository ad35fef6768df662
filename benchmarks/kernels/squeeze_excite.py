"""The published measurement of ``ops.squeeze_excite``: see published.py."""

from __future__ import annotations

import sys

from published import run

from effnet_kernels.bench import squeeze_excite

if __name__ == "__main__":
    sys.exit(run(squeeze_excite))
