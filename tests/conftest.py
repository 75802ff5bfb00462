"""Makes `by_hand` importable from every test: pytest imports test files by path, not by folder.

Tests run in two processes at once. Runs that measure take turns by a lock in the folder for temporary files; each
process has such a folder of its own, because no test is about how fast something was.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

if "PYTEST_XDIST_WORKER" in os.environ:
    own = Path(tempfile.gettempdir()) / f"tests-{os.environ['PYTEST_XDIST_TESTRUNUID'][:8]}"
    own = own / os.environ["PYTEST_XDIST_WORKER"]
    own.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None
