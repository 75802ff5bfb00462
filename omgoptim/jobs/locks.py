"""One run at a time measures on a device: two runs that time each other are both wrong."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from omgoptim.errors import SetupError
from omgoptim.requests import Request


def device_of(request: Request) -> str | None:
    """The device that a request measures on, or None if it measures nothing."""
    if getattr(request, "plan", False):
        return None
    return "cuda" if getattr(request, "device", "cpu") == "cuda" else "cpu"


def device_lock(device: str) -> FileLock:
    """The lock of a device, the same for every run of this user on this machine."""
    return FileLock(_lock_folder() / f"{device}.lock")


def _lock_folder() -> Path:
    user = str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir()) / f"omgoptim-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
        raise SetupError(f"{folder} belongs to another user", "runs take turns by locks in it", "remove that folder")
    return folder
