"""Files of a run: atomic writes, bounded reads, the log, and errors of a full or read-only disk."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omgoptim.errors import OmgoptimError, SetupError
from omgoptim.models.security.file_integrity import read_regular_file
from omgoptim.text import clean_block

MOST_RECORD_BYTES = 16 * 2**20
"""Maximum size of a JSON file of a run folder, far above what a run writes, against memory exhaustion."""


def read_record(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a run folder, which is untrusted.

    Raises:
        ValueError: it holds none, or more than a run writes.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(read_regular_file(file, MOST_RECORD_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(record, dict):
        raise ValueError("it holds no object")
    return record


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, replacing an existing one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    partial.write_text(text, encoding="utf-8")
    _with_patience(lambda: os.replace(partial, path))


def remove(path: Path) -> None:
    """Delete a file if it exists, also while others read it."""
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
    """Return the current time in ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


LARGEST_LOG, KEPT_OF_A_LARGE_LOG = 64 * 2**20, 2**20
"""Size in bytes from which a log is cut, and its size then, so that printing cannot fill the disk."""


def log_tail(log: Path, lines: int = 20, characters: int = 1200) -> str:
    """Return the last lines of a log, cleaned for display; empty without a log."""
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


FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota of this user is exceeded",
    errno.EFBIG: "the file size limit of this process is reached (ulimit -f)",
}
CLOSED = {
    errno.EROFS: "the disk is mounted read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a part of that path is a file",
    errno.ENAMETOOLONG: "the path is too long",
}
RESERVED_BYTES = 65_536
"""Reserved during a run, so that its final state can be written on a full disk."""

NOTHING_LEFT_BYTES = RESERVED_BYTES
"""Free bytes below which a disk counts as full."""


_ERRNO_IN_WORDS = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+),")
"""Pattern of a system error number in messages of Rust libraries (safetensors)."""


def cannot_write(folder: Path, error: OSError) -> SetupError:
    """Return the error for a folder that cannot be written."""
    reason = {**FULL, **CLOSED}.get(error.errno or 0, error.strerror or str(error))
    space = f"; {_bytes_text(free_bytes(folder))} are free" if error.errno in FULL else ""
    fix = "free some space there" if error.errno in FULL else "make it writable, or give another project (a copy of it)"
    return SetupError(f"cannot write in {folder}", f"{reason}{space}", fix)


def full_disk(run: Path, error: BaseException) -> SetupError | None:
    """Return the error of a full disk if one caused a failure, else None.

    Evidence is the number of a system error anywhere in its chain, or a disk that has nothing left.

    Args:
        run: the folder of the run, before what it left behind is removed.
        error: the failure of the run.
    """
    found = next(((number, one) for one in _chain(error) if (number := _number(one))), None)
    places = [run, Path(tempfile.gettempdir())]
    if found is None:
        empty = [place for place in places if free_bytes(place) < NOTHING_LEFT_BYTES]
        if not empty or isinstance(error, OmgoptimError) or not isinstance(error, Exception):
            return None
        number, place = errno.ENOSPC, empty[0]
    else:
        number, name = found[0], getattr(found[1], "filename", None)
        place = Path(os.fsdecode(name)).parent if isinstance(name, (str, bytes)) else min(places, key=free_bytes)
    written = sum(_sizes(run))
    why = f"{FULL[number]}; {_bytes_text(free_bytes(place))} are free there; the run has written "
    return SetupError(
        f"the file size limit is reached in {place}" if number == errno.EFBIG else f"no space left in {place}",
        f"{why}{_bytes_text(written)} so far and needs more",
        f"free some space, then: omgoptim runs resume {run.name} (tool: runs, action resume)",
    )


def keep_reserve(run: Path) -> None:
    """Write a file of the run's scratch that gives its space back when the scratch is removed."""
    with suppress(OSError):
        (run / ".reserve.tmp").write_bytes(os.urandom(RESERVED_BYTES))


def free_bytes(folder: Path) -> int:
    """Return the free bytes of a folder's disk."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 2**63


def _number(error: BaseException) -> int | None:
    """Return the system error number of an exception if it is in `FULL`."""
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL else None
    in_words = _ERRNO_IN_WORDS.search(str(error.args[0])) if error.args and isinstance(error.args[0], str) else None
    number = int(in_words[1] or in_words[2]) if in_words else None
    return number if number in FULL else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, its causes and its contexts."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__context__, one.__cause__]


def _sizes(folder: Path) -> Iterator[int]:
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                yield path.stat().st_size


def _bytes_text(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"
