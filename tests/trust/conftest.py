"""Makes `payloads` importable from the tests of this folder: pytest imports test files by path."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
