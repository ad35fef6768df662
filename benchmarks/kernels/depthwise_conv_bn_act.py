"""The published measurement of ``ops.depthwise_conv_bn_act``: see published.py."""

from __future__ import annotations

import sys

from published import run

from effnet_kernels.bench import depthwise_conv_bn_act

if __name__ == "__main__":
    sys.exit(run(depthwise_conv_bn_act))
