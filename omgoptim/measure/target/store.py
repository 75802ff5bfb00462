"""Cache folder on a target: contents by hash, packages, a scratch folder per connection. Runs on the target."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

from omgoptim.errors import SetupError

MAX_BYTES = 4 * 2**30
"""Bound of the contents; the least recently used go first. Chosen: some ten large models."""

KEPT = 3
"""Versions of the measuring package, and sets of packages, that are kept. Chosen by disk space."""

LOCK = "measuring.lock"


class Store:
    """The cache folder of one user on a target.

    Args:
        folder: created by the bootstrap.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents, self.packages, sessions = folder / "contents", folder / "packages", folder / "sessions"
        for path in (self.contents, self.packages, sessions):
            path.mkdir(mode=0o700, exist_ok=True)
        self._sessions = sessions
        self.session = Path(tempfile.mkdtemp(dir=sessions))
        self._alive = _locked(self.session / "alive")
        self._measuring: TextIO | None = None
        self._clear()

    def close(self) -> None:
        """Remove the scratch folder of this connection and release its locks."""
        shutil.rmtree(self.session, ignore_errors=True)
        self.release()
        if self._alive is not None:
            self._alive.close()

    def path(self, digest: str) -> Path:
        """Return the path of a content.

        Raises:
            ValueError: it is not a sha256 in hexadecimal digits.
        """
        if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise ValueError("not a sha256")
        return self.contents / digest

    def has(self, digest: str) -> bool:
        """Return whether a content is there, and mark it as used."""
        try:
            os.utime(self.path(digest))
        except FileNotFoundError:
            return False
        return True

    def artifact(self, name: str, files: dict[str, str]) -> Path:
        """Make a folder of contents, by links where the file system has them.

        Args:
            name: of the folder.
            files: relative path to sha256.
        """
        folder = self.session / "artifacts" / name
        for file, digest in files.items():
            place = folder / file
            if ".." in place.parts or not place.is_relative_to(folder):
                raise ValueError("not a path inside the folder")
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.path(digest), place)
            except OSError:
                shutil.copy2(self.path(digest), place)
        return folder

    def hold(self, holder: str) -> str | None:
        """Take the lock of the target without waiting; return None, or a note on its holder."""
        if self._measuring is not None:
            return None
        taken = _locked(self.folder / LOCK)
        note = self.folder / "measuring.json"
        if taken is None:
            try:
                record = json.loads(note.read_text(encoding="utf-8"))
                return (
                    f"{record['holder']} has been measuring on it for {max(0.0, time.time() - record['since']):.0f} s"
                )
            except (OSError, ValueError, KeyError, TypeError):
                return "another run is measuring on it"
        self._measuring = taken
        note.write_text(json.dumps({"holder": holder, "since": time.time()}), encoding="utf-8")
        return None

    def release(self) -> None:
        """Release the lock."""
        if self._measuring is not None:
            self._measuring.close()
            self._measuring = None

    def size_bytes(self) -> int:
        """Return the bytes of everything in the cache folder."""
        return sum(path.lstat().st_size for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())

    def clean(self) -> int:
        """Remove the cache folder; return the freed bytes.

        Raises:
            SetupError: a run measures there.
        """
        other = self.hold("doctor")
        if other is not None:
            raise SetupError("the target is in use", other, "wait until that run has finished")
        size = self.size_bytes()
        shutil.rmtree(self.folder, ignore_errors=True)
        return size

    def _clear(self) -> None:
        """Remove scratch folders of dead connections, old versions, and contents above the bound."""
        for session in self._sessions.iterdir():
            alive = _locked(session / "alive") if session != self.session else None
            if alive is not None:
                alive.close()
                shutil.rmtree(session, ignore_errors=True)
        for folder in (self.folder / "code", self.packages):
            versions = sorted(_entries(folder), key=lambda path: path.stat().st_mtime, reverse=True)
            for old in versions[KEPT:]:
                shutil.rmtree(old, ignore_errors=True)
        left = MAX_BYTES
        for path in sorted(_entries(self.contents), key=lambda path: path.stat().st_mtime, reverse=True):
            left -= path.stat().st_size
            if left < 0:
                path.unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _locked(path: Path) -> TextIO | None:
    """Return a file with its lock held; None if another process holds it, or the folder is gone."""
    try:
        file = path.open("a", encoding="utf-8")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


# Packages

PROBE = """
import importlib, importlib.metadata, importlib.util, json, sys
found = {}
for name in sys.argv[2:]:
    try:
        if sys.argv[1] == "import":
            importlib.import_module(name)
        found[name] = None
        if importlib.util.find_spec(name):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:  # a build under another name, such as onnxruntime-gpu
                found[name] = importlib.import_module(name).__version__
    except Exception:
        found[name] = None
print(json.dumps(found))
"""
PIP = ("-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "--only-binary=:all:")
PIP_LIMIT_S = 900.0
"""Limit of an installation: numpy and two engines are 100 MB, fifteen minutes at 1 Mbit/s."""


def find_packages(store: Store, names: list[str], wanted: str, *, imported: bool) -> dict[str, str | None]:
    """Return the versions of packages that are here, those of the cache folder before this Python's own.

    Args:
        store: cache folder of the target.
        names: of the distributions.
        wanted: name of their folder in the cache.
        imported: leave out what does not import.
    """
    folder = store.packages / wanted
    if folder.is_dir():
        os.utime(folder)
        path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(folder), *path]))
    command = [sys.executable, "-c", PROBE, "import" if imported else "find", *names]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=store.session, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return {name: found.get(name) for name in names}


def install_packages(store: Store, requirements: list[list[str]], wanted: str) -> str | None:
    """Install with this Python's pip into the cache folder; return None, or pip's last line.

    Args:
        store: cache folder of the target.
        requirements: lists to try in this order.
        wanted: name of their folder in the cache.
    """
    said = ""
    for some in requirements:
        partial = Path(tempfile.mkdtemp(dir=store.session))
        command = [sys.executable, *PIP, "--retries", "1", "--timeout", "10", "-t", str(partial), *some]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=store.session, check=False, stdin=subprocess.DEVNULL,
                timeout=PIP_LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"pip took longer than {PIP_LIMIT_S:g} s"
        if done.returncode == 0:
            _replace(partial, store.packages / wanted)
            return None
        said = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return said


def unpack_packages(store: Store, digest: str, wanted: str) -> None:
    """Unpack installed packages that came from the other machine."""
    partial = Path(tempfile.mkdtemp(dir=store.session))
    with tarfile.open(store.path(digest)) as archive:
        for member in archive:
            place = partial / member.name
            if member.isfile() and ".." not in place.parts and place.is_relative_to(partial):
                place.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                with place.open("wb") as file:
                    shutil.copyfileobj(content, file)  # type: ignore[arg-type]  # a regular file has content
                place.chmod(0o600 | (member.mode & 0o100))
    _replace(partial, store.packages / wanted)
    store.path(digest).unlink(missing_ok=True)


def _replace(partial: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
