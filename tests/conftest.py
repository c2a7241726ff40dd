"""The repository root goes on the path, so that `pytest` and `python tests/test_x.py` import the same files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
