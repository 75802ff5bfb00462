"""Connection to a Ray cluster: its address, a probe, the token, and the project as a zip.

`ray.init` on an address where nothing answers blocks for minutes: a plain TCP connection says so in seconds.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import socket
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omgoptim.errors import RequestError, SetupError, argument
from omgoptim.requests.training import refuse_ray_client

PROBE_S = 2.0
"""Seconds that a head may take to accept a connection. Chosen: a network round trip takes far less."""

ADDRESS = "RAY_ADDRESS"

MODE = "RAY_AUTH_MODE"
"""Environment variable without which Ray takes no notice of a token."""


def cluster_address() -> str | None:
    """Return the address in RAY_ADDRESS; None for a local Ray.

    Raises:
        RequestError: it is of the Ray Client.
        SetupError: nothing answers there.
    """
    named = os.environ.get(ADDRESS, "").strip()
    if not named or named == "local":
        return None
    refuse_ray_client(named, f"{ADDRESS}={named}")
    if named == "auto":
        current = Path("/tmp/ray/ray_current_cluster")  # where `ray start` writes it
        named = current.read_text(encoding="utf-8").strip() if current.is_file() else ""
        if not named:
            raise SetupError(
                f"{ADDRESS} is auto, and no Ray runs on this machine",
                f"there is no {current}",
                f"start it (`ray start --head`), or unset {ADDRESS} for a local Ray",
            )
    host, _, port = named.rpartition(":")
    if not host or not port.isdecimal():
        raise SetupError(f"{ADDRESS}={named} is not an address", "it is host:port", "for instance head:6379")
    probe(host.strip("[]"), int(port), f"{ADDRESS}={named}")
    return named


def probe_head(url: str) -> None:
    """Check that a head of Ray jobs accepts connections.

    Raises:
        SetupError: nothing answers there.
    """
    parts = urlsplit(url)
    probe(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), argument("on", url))


def probe(host: str, port: int, given: str) -> None:
    """Check that a TCP port accepts connections.

    Raises:
        SetupError: nothing answers in time.
    """
    try:
        socket.create_connection((host, port), PROBE_S).close()
    except OSError as error:
        raise SetupError(
            f"no Ray head answers: {given}",
            f"{host}:{port}: {error.strerror or error}",
            f"start it (`ray start --head`), or give {argument('on', 'ray')} without {ADDRESS} for a local Ray",
        ) from None


def ray_library(part: str = "") -> Any:
    """Import Ray, or a part of it such as `train.torch`.

    Raises:
        SetupError: it is not installed.
    """
    try:
        return importlib.import_module(f"ray.{part}" if part else "ray")
    except ImportError as error:
        raise SetupError(
            "running on Ray needs the package ray",
            f"{str(error).splitlines()[0]} ({sys.executable})",
            "pip install 'omgoptim[ray]'",
        ) from error


@contextmanager
def token_mode() -> Iterator[None]:
    """Let Ray and the processes that it starts meanwhile authenticate by RAY_AUTH_TOKEN, where one is given."""
    given = bool(os.environ.get("RAY_AUTH_TOKEN")) and MODE not in os.environ
    if given:
        os.environ[MODE] = "token"
    reload_auth_settings()
    try:
        yield
    finally:
        if given:
            os.environ.pop(MODE, None)
        reload_auth_settings()


def reload_auth_settings() -> None:
    """Make Ray read mode and token from the environment again; it keeps those that it was imported with."""
    with suppress(ImportError, AttributeError):
        compiled = importlib.import_module("ray._raylet")
        compiled.Config.initialize("")
        compiled.AuthenticationTokenLoader.instance().reset_cache()


EXCLUDED = frozenset(
    {".omgoptim", ".git", ".venv", "venv", "env", "node_modules", "__pycache__", ".mypy_cache", ".pytest_cache",
     ".ruff_cache", ".ipynb_checkpoints"}
)  # fmt: skip
"""Names of folders that are not sent."""

IGNORE = ".rayignore"
"""File of the project with further patterns, one a line, as Ray itself reads it."""

MAX_BYTES = 500 * 2**20
"""Ray keeps a package in the head's memory, and takes 512 MiB."""


@dataclass(frozen=True, slots=True)
class Package:
    """A project that is ready to be sent."""

    file: Path
    files: int
    size_bytes: int
    """Size of the zip, in bytes."""

    def __str__(self) -> str:
        return f"{self.size_bytes / 1e6:.1f} MB in {self.files} files"


def pack(project: Path, target: Path) -> Package:
    """Write a zip of a project's files.

    Raises:
        RequestError: they are more than Ray takes; the largest folders are named before anything is sent.
    """
    files = list(_files(project))
    sizes: Counter[str] = Counter()
    for file in files:
        sizes[file.relative_to(project).parts[0]] += file.stat().st_size
    if sizes.total() > MAX_BYTES:
        largest = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.most_common(3))
        raise RequestError(
            f"the project is too large to be sent: {sizes.total() / 1e6:.0f} MB",
            f"Ray takes {MAX_BYTES / 1e6:.0f} MB; the largest parts are {largest}",
            f"put data on storage that the cluster shares ({argument('allow_path', ['FOLDER'])}), and name what "
            f"is not needed in {IGNORE}",
        )
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for file in files:
            archive.write(file, file.relative_to(project).as_posix())
    return Package(target, len(files), target.stat().st_size)


def _files(project: Path) -> Iterator[Path]:
    """Yield the project's own files; a link that leads out of it is left behind."""
    ignored = _patterns(project / IGNORE)
    for folder, names, files in os.walk(project):
        here = Path(folder)
        names[:] = sorted(
            name for name in names if name not in EXCLUDED and not _matches(here / name, project, ignored)
        )
        for name in sorted(files):
            file = here / name
            inside = file.is_file() and file.resolve().is_relative_to(project.resolve())
            if inside and not _matches(file, project, ignored):
                yield file


def _patterns(file: Path) -> list[str]:
    if not file.is_file():
        return []
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.strip("/") for line in lines if line and not line.startswith("#")]


def _matches(path: Path, project: Path, patterns: list[str]) -> bool:
    relative = path.relative_to(project).as_posix()
    return any(fnmatch.fnmatch(relative, pattern) or fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
