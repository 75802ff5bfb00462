"""Makes `by_hand` importable from every test: pytest imports test files by path, not by folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
