"""Which files may be read: those inside the project, and those in folders that the request allows. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omgoptim.errors import DataError, ModelError, OmgoptimError, RequestError, argument


@dataclass(frozen=True, slots=True)
class Reach:
    """The project and the further folders that a request may read from."""

    project: Path
    allowed: tuple[Path, ...] = ()

    @staticmethod
    def of(project: Path, allow_path: Sequence[str]) -> Reach:
        """The reach of a request: its own `allow_path`, and what the user allowed in OMGOPTIM_ALLOW_PATH."""
        standing = os.environ.get("OMGOPTIM_ALLOW_PATH", "").split(os.pathsep)
        allow_path = [*allow_path, *filter(None, standing)]
        return Reach(project.resolve(), tuple(Path(folder).expanduser().resolve() for folder in allow_path))

    def file(self, text: str, what: str) -> Path:
        """An existing file or folder that `text` names, relative to the project, links resolved.

        Raises:
            RequestError: it lies outside of the project and of the allowed folders.
            ModelError, DataError: it does not exist.
        """
        path = self.inside(text, what)
        if not path.exists():
            raise error_about(what)(
                f"{what} '{text}' does not exist",
                f"looked for {path}",
                f"paths are relative to the project; give another one with {argument('project', 'FOLDER')}",
            )
        return path

    def inside(self, text: str, what: str) -> Path:
        """The resolved path that `text` names, which may not exist yet.

        Raises:
            RequestError: it lies outside of the project and of the allowed folders, or is no path at all.
        """
        try:
            path = (self.project / Path(text).expanduser()).resolve()
            path.exists()
        except (OSError, ValueError, RuntimeError) as error:  # too long, holds a NUL, ~ of an unknown user
            raise RequestError(f"{what} {text[:80]!r} is no path", str(error)[-200:]) from error
        if not any(path.is_relative_to(folder) for folder in (self.project, *self.allowed)):
            raise RequestError(
                f"{what} '{text}' lies outside the project",
                f"{path} is not under {self.project}",
                f"allow its folder with {argument('allow_path', [str(path.parent)])}, "
                f"or give another {argument('project', 'FOLDER')}",
            )
        return path


def error_about(what: str) -> type[OmgoptimError]:
    """The kind of error for "model", "checkpoint", "data" or "metric"."""
    return DataError if what in ("data", "metric") else ModelError
