"""Integrity of files from untrusted folders: bounded reading, hashes, and HMACs. No torch.

Records are signed by HMAC-SHA256 under a key that only this user can read. The key is created on first use in the
user's state folder: OMGOPTIM_STATE_DIR, else XDG_STATE_HOME/omgoptim, else ~/.local/state/omgoptim (on Windows
LOCALAPPDATA/omgoptim). If it cannot be stored, nothing is signed; unsigned files are treated as another user's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import os
import secrets
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

RecordKind = Literal["artifact", "request", "state", "worker", "report"]
"""Kinds of signed records: the HMAC of one kind is invalid for another."""

HMAC_FIELD = "origin"
"""The field of a record that holds its HMAC."""

KEY_BYTES = 32
"""Length of the key: 256 bits, the output size of SHA-256 (RFC 2104 recommends no less)."""


def state_folder() -> Path | None:
    """Return the user's state folder, which need not exist; None if there is no home folder."""
    for name, below in (("OMGOPTIM_STATE_DIR", ""), ("XDG_STATE_HOME", "omgoptim")):
        value = os.environ.get(name, "")
        if value and Path(value).is_absolute():  # a relative one would lie in whichever project is open
            return Path(value) / below
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "omgoptim"
    try:
        return Path.home() / ".local" / "state" / "omgoptim"
    except RuntimeError:
        return None


def can_sign() -> bool:
    """Return whether this user has a key, or can be given one."""
    return _key(make=True) is not None


def sign_record(kind: RecordKind, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with its HMAC, or without one if no key can be kept."""
    unsigned = {name: value for name, value in record.items() if name != HMAC_FIELD}
    key = _key(make=True)
    return unsigned if key is None else unsigned | {HMAC_FIELD: _mac(key, kind, unsigned)}


def is_signed(kind: RecordKind, record: Mapping[str, Any]) -> bool:
    """Return whether this user signed the record, and nothing in it was changed since."""
    mac = record.get(HMAC_FIELD)
    key = _key(make=False)
    if not isinstance(mac, str) or not mac.isascii() or key is None:
        return False
    unsigned = {name: value for name, value in record.items() if name != HMAC_FIELD}
    return hmac.compare_digest(mac, _mac(key, kind, unsigned))


def _mac(key: bytes, kind: RecordKind, record: Mapping[str, Any]) -> str:
    """Return the HMAC of a record's canonical JSON: names sorted, no spaces, ASCII."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hmac.new(key, f"omgoptim {kind}\n{text}".encode(), hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes | None:
    """Return the user's key, created atomically if there is none and `make` is set; None if none can be kept."""
    folder = state_folder()
    if folder is None:
        return None
    key = _read_key(folder / "key")
    if key is None and make:
        with contextlib.suppress(OSError):
            _make_key(folder)
        key = _read_key(folder / "key")
    return key


def _read_key(path: Path) -> bytes | None:
    """Read the key in a file; None unless it is a regular file of this user with a key in it."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
            text = file.read(4 * KEY_BYTES) if is_own and stat.S_ISREG(status.st_mode) else b""
        key = bytes.fromhex(text.decode("ascii").strip())
    except (OSError, ValueError):
        return None
    return key if len(key) == KEY_BYTES else None


def _make_key(folder: Path) -> None:
    """Create a key in the folder; if another process does so first, that key stays."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = folder / f".key.{os.getpid()}-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(KEY_BYTES))
        try:
            os.link(partial, folder / "key")
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not (folder / "key").exists():
                partial.replace(folder / "key")
    finally:
        partial.unlink(missing_ok=True)


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Read the content of a regular file.

    Raises:
        OSError: it cannot be read, or is a pipe, a device, a folder.
        ValueError: it is larger than `max_bytes`.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe would wait for a writer
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(max_bytes + 1) if status.st_size <= max_bytes else b""
    if max(status.st_size, len(content)) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes} bytes")
    return content


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
