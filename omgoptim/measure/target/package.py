"""What goes over to a target: the modules that measure, and, where it has no network, numpy and an engine from here."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import platform
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omgoptim.bootstrap import PACKAGE_FILE

ROOTS = ("omgoptim.measure.target.agent", "omgoptim.measure.measuring_server")
"""What runs there; all that these import goes over."""

DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
}
"""Distributions that a package needs to be imported there."""


@dataclass(frozen=True, slots=True)
class MeasuringPackage:
    """An archive of modules, named by the hash of its content."""

    name: str
    archive: bytes


@cache
def measuring_package() -> MeasuringPackage:
    """Return the modules that measure, as a .tar.gz."""
    files = {path.relative_to(PACKAGE_FILE.parent.parent).as_posix(): path.read_bytes() for path in _modules()}
    digest = hashlib.sha256()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for name, content in sorted(files.items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return MeasuringPackage(digest.hexdigest()[:32], buffer.getvalue())


def _modules() -> list[Path]:
    """Return the files of the roots and of every module that is imported with them."""
    waiting, found = list(ROOTS), {PACKAGE_FILE}
    while waiting:
        name = waiting.pop()
        base = PACKAGE_FILE.parent.parent.joinpath(*name.split("."))
        path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if path in found or not path.is_file():
            continue
        found.add(path)
        waiting += [name.rpartition(".")[0], *_imported(ast.parse(path.read_text(encoding="utf-8")).body)]
    return sorted(found)


def _imported(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the modules of omgoptim that the top level of a module imports; not those for type checkers only."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "omgoptim":
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "omgoptim")
        elif isinstance(node, ast.Try):
            yield from _imported(node.body)


def installed_version(name: str) -> str | None:
    """Return the version of a package in this Python; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def platform_key() -> list[str]:
    """Return what must be equal for compiled packages to run on another machine."""
    return [platform.system(), platform.machine(), platform.python_implementation(), platform.python_version()[:4]]


def pack_installed(names: list[str], target: Path) -> None:
    """Write the installed files of packages, as this Python has them, to a .tar.

    Raises:
        OSError: a file cannot be read or written.
    """
    with tarfile.open(target, "w") as archive:
        for name in dict.fromkeys(one for given in names for one in DISTRIBUTIONS[given]):
            for file in importlib.metadata.distribution(name).files or ():
                path = Path(str(file.locate()))
                if ".." not in file.parts and "__pycache__" not in file.parts and path.is_file():
                    archive.add(path.resolve(), file.as_posix(), recursive=False)
