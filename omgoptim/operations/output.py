"""The folder that the user wants the artifact in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omgoptim.errors import RequestError
from omgoptim.models import artifact as artifacts
from omgoptim.models.trust import Reach
from omgoptim.operations.context import RunContext


def free_output(output: str | None, allow_path: Sequence[str], context: RunContext) -> Path | None:
    """Where a copy of the artifact goes; refused before any work if it exists."""
    if output is None:
        return None
    folder = Reach.of(context.project, allow_path).inside(output, "output")
    if folder.exists():
        raise RequestError(f"output '{output}' exists already", "nothing is overwritten", "name a new folder")
    return folder


def deliver(folder: Path, output: Path | None, passed: bool) -> tuple[Path, list[str]]:
    """Copy a proved artifact to where the user wants it, unless it failed the guard.

    Returns:
        Where the artifact is now, and what must be said about it.
    """
    if output is None:
        return folder, []
    if not passed:
        return folder, [f"nothing was put into '{output.name}': what fails the guard is not delivered"]
    artifacts.copy_artifact(folder, output)
    return output, []
