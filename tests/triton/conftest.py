"""Lets the tests of this folder import ``aot``: ``triton`` is the name of the real package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
