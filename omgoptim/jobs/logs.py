"""A run's log: what the user's code and the libraries printed. It can be large, and may hold anything."""

from __future__ import annotations

import os
from pathlib import Path

from omgoptim.text import clean_block

LARGEST_LOG = 64 * 2**20
KEPT_OF_A_LARGE_LOG = 2**20


def log_tail(log: Path, lines: int = 20, characters: int = 1200) -> str:
    """The last lines of a log, safe to show; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4 * characters))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    shown = clean_block(text, 8 * characters).rstrip().splitlines()[-lines:]
    return "\n".join(shown)[-characters:]


def trim(log: Path, largest: int = LARGEST_LOG, kept: int = KEPT_OF_A_LARGE_LOG) -> None:
    """Cut a log that grew past `largest` bytes down to its last `kept`, so that printing cannot fill the disk.

    Safe while others write: they append.
    """
    if not log.exists() or log.stat().st_size <= largest:
        return
    with log.open("rb") as file:
        file.seek(-kept, os.SEEK_END)
        end = file.read()
    with log.open("r+b") as file:
        file.truncate(0)
    with log.open("ab") as file:
        file.write(b"[omgoptim: the log grew too large; its beginning was removed]\n" + end)
