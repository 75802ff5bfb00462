"""Measuring package for a target: its modules, the first lines that run there, and packages copied from here.

No code of a target's user is run, and nothing outside of the cache folder is written.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import io
import platform
import shlex
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omgoptim.bootstrap import PACKAGE_FILE

ROOTS = ("omgoptim.measure.target.agent", "omgoptim.measure.measuring_server")
"""Modules that run on a target; everything they import is sent with them."""

DISTRIBUTIONS = {"numpy": ("numpy",), "onnxruntime": ("onnxruntime",), "openvino": ("openvino",)}
"""Distributions that a package needs to be imported there."""

MARK = "omgoptim-target "
"""Prefix of the answering line; a login shell may print others before it."""

OLDEST = (3, 10)
"""Oldest Python of the package (`requires-python` in pyproject.toml)."""


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


FIND_PYTHON = r"""
name=$(uname -sm 2>/dev/null) || name=unknown
old=
for python in python3 python3.13 python3.12 python3.11 python3.10 python; do
  command -v "$python" >/dev/null 2>&1 || continue
  found=$("$python" -c 'import sys; print(".".join(map(str, sys.version_info[:3])))' 2>/dev/null) || continue
  if "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (OLDEST))' 2>/dev/null; then
    exec "$python" -u -c "$1" "$name" "$2"
  fi
  old="$old $python $found"
done
printf '\n%s{"refused": "python", "found": "%s", "uname": "%s"}\n' "MARK" "${old# }" "$name"
""".replace("OLDEST", ", ".join(map(str, OLDEST))).replace("MARK", MARK)

TAKE_PACKAGE = r"""
import io, json, os, shutil, sys, tarfile, tempfile
sys.path[:] = [entry for entry in sys.path if entry]
base = os.environ.get("XDG_CACHE_HOME", "")
if not os.path.isabs(base):
    base = os.path.join(os.path.expanduser("~"), ".cache")
cache = os.path.join(base, "omgoptim", "target")
code = os.path.join(cache, "code", sys.argv[2])
has_code = os.path.isfile(os.path.join(code, "omgoptim", "__init__.py"))
hello = {"uname": sys.argv[1], "cache": cache, "has_code": has_code}
partial = None
try:
    os.makedirs(os.path.dirname(code), mode=0o700, exist_ok=True)
    hello["free"] = shutil.disk_usage(cache).free
    if has_code:
        os.utime(code)
    else:
        partial = tempfile.mkdtemp(prefix="partial-", dir=os.path.dirname(code))
except OSError as error:
    hello = {"refused": "disk", "found": str(error), "uname": sys.argv[1]}
print("\nMARK" + json.dumps(hello), flush=True)
if "refused" in hello:
    sys.exit(0)
commands = sys.stdin.buffer
if partial is not None:
    try:
        content = commands.read(int(commands.readline()))
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                name = os.path.normpath(member.name)
                if not member.isfile() or os.path.isabs(name) or name.startswith(".."):
                    sys.exit("not a package")
                place = os.path.join(partial, name)
                os.makedirs(os.path.dirname(place), exist_ok=True)
                with open(place, "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)
        try:
            os.rename(partial, code)
        except OSError:
            if not os.path.isdir(code):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
sys.path.append(code)
from omgoptim.measure.target.agent import main
main(cache, sys.argv[1], commands)
""".replace("MARK", MARK)


def remote_command(code: str) -> str:
    """Return the command line for the target's login shell, whichever it is.

    Args:
        code: hash of the measuring package.
    """
    return f"exec sh -c {shlex.quote(FIND_PYTHON)} omgoptim {shlex.quote(TAKE_PACKAGE)} {shlex.quote(code)}"
