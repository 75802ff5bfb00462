"""Policy of a request: the files that it may read and the modules whose code it may run. No torch.

Files: those inside the project, and those in folders that the request or the user's environment allows. Code: what is
defined in such files, and in the modules that were allowed by name. Rights that an artifact, a recipe or a stored
request claims for itself are ignored.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omgoptim.errors import DataError, ModelError, OmgoptimError, RequestError, argument

if TYPE_CHECKING:
    from omgoptim.requests import CompareRequest, ModelRequest

INSTALLED = ("site-packages", "dist-packages")
"""Folders of installed packages, wherever they lie: also in a .venv inside the project."""


@dataclass(frozen=True, slots=True)
class PathPolicy:
    """Rights of a request: the project, further folders and modules, and trust in a foreign artifact."""

    project: Path
    allowed: tuple[Path, ...] = ()
    modules: tuple[str, ...] = ()
    """Installed modules whose functions and classes may be named, with everything below them."""
    trusted: bool = False
    """Artifacts of other users may run the code that their recipes name."""

    @staticmethod
    def of(
        project: Path, allow_path: Sequence[str], allow_module: Sequence[str] = (), *, trust_artifact: bool = False
    ) -> PathPolicy:
        """Combine the rights of a request with OMGOPTIM_ALLOW_PATH and OMGOPTIM_ALLOW_MODULE."""
        folders = [*allow_path, *filter(None, os.environ.get("OMGOPTIM_ALLOW_PATH", "").split(os.pathsep))]
        modules = [*allow_module, *os.environ.get("OMGOPTIM_ALLOW_MODULE", "").replace(",", " ").split()]
        resolved = tuple(Path(folder).expanduser().resolve() for folder in folders)
        return PathPolicy(project.resolve(), resolved, tuple(modules), trust_artifact)

    @staticmethod
    def of_request(project: Path, request: ModelRequest | CompareRequest) -> PathPolicy:
        """Return the policy of a request."""
        trust = request.trust_artifact
        return PathPolicy.of(project, request.allow_path, request.allow_module, trust_artifact=trust)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for a process that this one starts."""
        allowed = [str(folder) for folder in self.allowed]
        return {
            "project": str(self.project),
            "allowed": allowed,
            "modules": list(self.modules),
            "trusted": self.trusted,
        }

    @staticmethod
    def from_json(record: dict[str, Any]) -> PathPolicy:
        """Create the policy from the result of `to_json`."""
        allowed = tuple(Path(folder) for folder in record["allowed"])
        return PathPolicy(Path(record["project"]), allowed, tuple(record["modules"]), record["trusted"])

    def new_folder(self, text: str, what: str) -> Path:
        """Resolve the folder to create that `text` names, relative to the project.

        Raises:
            RequestError: it lies outside of the project and of the allowed folders, exists already, or lies in a file
                or in a folder that cannot be written.
        """
        folder = self.inside(text, what)
        if folder.exists():
            raise RequestError(f"{what} '{text}' exists already", "nothing is overwritten", "name a new folder")
        above = next(parent for parent in folder.parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            why = f"{above} {'cannot be written' if above.is_dir() else 'is a file'}"
            raise RequestError(f"{what} '{text}' cannot be created", why, "name another folder")
        return folder

    def file(self, text: str, what: str) -> Path:
        """Resolve the existing file or folder that `text` names, relative to the project.

        Raises:
            RequestError: it lies outside of the project and of the allowed folders.
            ModelError, DataError: it does not exist.
        """
        path = self.inside(text, what)
        if not path.exists():
            raise error_about(what)(
                f"{what} '{text}' does not exist",
                f"looked for {path}",
                f"paths are relative to the project; set another project with {argument('project', 'FOLDER')}",
            )
        if not (path.is_file() or path.is_dir()):  # a pipe would be waited for
            raise error_about(what)(f"{what} '{text}' is not a regular file", f"{path} is a pipe or a device")
        return path

    def inside(self, text: str, what: str) -> Path:
        """Resolve the path that `text` names, which may not exist yet.

        Raises:
            RequestError: it lies outside of the project and of the allowed folders, or is not a valid path.
        """
        try:
            path = (self.project / Path(text).expanduser()).resolve()
            path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, holds a NUL, ~ of an unknown user
            raise RequestError(f"{what} {text[:80]!r} is not a valid path", str(error)[-200:]) from error
        if self._root_of(path) is None:
            raise RequestError(
                f"{what} '{text}' lies outside the project",
                f"{path} is not under {self.project}",
                f"allow its folder with {argument('allow_path', [str(path.parent)])}, "
                f"or give another {argument('project', 'FOLDER')}",
            )
        return path

    def holds_code(self, file: str | None) -> bool:
        """Return whether a Python file is part of the project or an allowed folder, and of no installed package."""
        if not file:
            return False
        try:
            path = Path(file).resolve()
            if not path.is_file():  # code without a file, such as `<string>`
                return False
        except (OSError, RuntimeError, ValueError):
            return False
        root = self._root_of(path)
        return root is not None and not _is_installed(path, root)

    def allows_module(self, name: str | None) -> bool:
        """Return whether a module, or a package around it, was allowed by name."""
        return any(name == module or (name or "").startswith(f"{module}.") for module in self.modules)

    def relative(self, path: Path) -> str:
        """Return a file's path for a recipe: relative inside the project, so that the project can move."""
        return path.relative_to(self.project).as_posix() if path.is_relative_to(self.project) else str(path)

    def _root_of(self, path: Path) -> Path | None:
        """Return the innermost allowed folder around a path; None if there is none."""
        roots = [folder for folder in (self.project, *self.allowed) if path.is_relative_to(folder)]
        return max(roots, key=lambda folder: len(folder.parts), default=None)


def _is_installed(path: Path, root: Path) -> bool:
    """Return whether a file below `root` belongs to an installed package, to Python or to an environment."""
    below = path.relative_to(root)
    if any(part in INSTALLED for part in below.parts):
        return True
    standard = [Path(sysconfig.get_paths()[name]).resolve() for name in ("stdlib", "platstdlib")]
    if any(path.is_relative_to(folder) and not root.is_relative_to(folder) for folder in standard):
        return True
    between = [root / Path(*below.parts[:count]) for count in range(1, len(below.parts))]
    return any((folder / "pyvenv.cfg").is_file() for folder in between)


def error_about(what: str) -> type[OmgoptimError]:
    """Return the error class for "model", "checkpoint", "data" or "metric"."""
    return DataError if what in ("data", "metric") else ModelError
