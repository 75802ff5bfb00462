"""Atomic writing, and bounded reading of untrusted files, in a run's folder."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omgoptim.models.security.file_integrity import read_plain

MOST_RECORD_BYTES = 16 * 2**20


def read_record(file: Path) -> dict[str, Any]:
    """The object in a file of a run's folder, which may come from anybody.

    Raises:
        ValueError: it holds none, or more than a run writes.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(read_plain(file, MOST_RECORD_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it holds no object")
    return record


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all, and replaces what was there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    partial.write_text(text, encoding="utf-8")
    _with_patience(lambda: os.replace(partial, path))


def remove(path: Path) -> None:
    """Delete a file that others may be reading, if it is there."""
    _with_patience(lambda: path.unlink(missing_ok=True))


def _with_patience(act: Callable[[], None]) -> None:
    for _ in range(20 if sys.platform == "win32" else 0):  # Windows refuses while a reader has the file open
        try:
            act()
        except PermissionError:
            time.sleep(0.02)
        else:
            return
    act()


def now() -> str:
    """The time as every file of a run writes it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
