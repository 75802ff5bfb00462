"""Package of the project for a cluster: a zip of its files."""

from __future__ import annotations

import fnmatch
import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import RequestError, argument

EXCLUDED = frozenset(
    {".omgoptim", ".git", ".venv", "venv", "env", "node_modules", "__pycache__", ".mypy_cache", ".pytest_cache",
     ".ruff_cache", ".ipynb_checkpoints"}
)  # fmt: skip
"""Names of folders that are not sent."""

IGNORE = ".rayignore"
"""File of the project with further patterns, one a line, as Ray itself reads it."""

MOST_BYTES = 500 * 2**20
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
    if sizes.total() > MOST_BYTES:
        largest = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.most_common(3))
        raise RequestError(
            f"the project is too large to be sent: {sizes.total() / 1e6:.0f} MB",
            f"Ray takes {MOST_BYTES / 1e6:.0f} MB; the largest parts are {largest}",
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
