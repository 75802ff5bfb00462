"""Optuna's journal file with a single writer, repaired after a kill.

Optuna locks the file by a symbolic link. A killed process leaves the link, for which the next one waits 30 s, and may
leave an incomplete last line, to which Optuna appends: the file cannot be read then. A search has a single writer, the
worker of its run, so it needs no lock and may remove the incomplete line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHUNK = 2**16
"""Bytes read at a time from the end of the file."""


class OneWriter:
    """A lock for Optuna's journal that is always free."""

    def acquire(self) -> bool:
        """Return True: the lock is always acquired."""
        return True

    def release(self) -> None:
        """Do nothing."""


def backend(library: Any, path: Path) -> Any:
    """Return Optuna's file backend on a journal whose torn last line, if any, was cut.

    Args:
        library: the module optuna.
        path: of the journal.
    """
    cut_torn_line(path)
    return library.storages.journal.JournalFileBackend(str(path), lock_obj=OneWriter())


def cut_torn_line(path: Path) -> int:
    """Cut the text after the last line end of a file; return how many bytes that were.

    A missing file is ignored.
    """
    if not path.exists():
        return 0
    with open(path, "r+b") as file:
        size = end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - CHUNK)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                end = start + at + 1
                break
            end = start
        if end < size:
            file.truncate(end)
    return size - end
