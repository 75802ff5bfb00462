"""Make `by_hand` importable from every test: pytest imports test files by path, not by folder.

Tests run in several processes at once. Each of them has a folder for temporary files of its own and a queue of devices
of its own, because runs that measure take turns, and a core of its own, because threads that share a core wait for each
other. No test is about how fast something was.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

os.environ["OMGOPTIM_STATE_DIR"] = tempfile.mkdtemp(prefix="omgoptim-state-")  # never the real home
os.environ["OMGOPTIM_CACHE_DIR"] = os.environ["OMGOPTIM_STATE_DIR"]
atexit.register(shutil.rmtree, os.environ["OMGOPTIM_STATE_DIR"], ignore_errors=True)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:
    worker = os.environ["PYTEST_XDIST_WORKER"]
    own = Path(tempfile.gettempdir()) / f"tests-{os.environ['PYTEST_XDIST_TESTRUNUID'][:8]}" / worker
    own.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None
    os.environ["OMGOPTIM_LOCK_DIR"] = str(own / "queues")
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
