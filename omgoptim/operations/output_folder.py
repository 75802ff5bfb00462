"""Output folder of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omgoptim.errors import RequestError, argument
from omgoptim.models import artifact as artifacts
from omgoptim.models.security.file_integrity import can_seal
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.context import RunContext
from omgoptim.requests import ModelRequest


def free_output(output: str | None, allow_path: Sequence[str], context: RunContext) -> Path | None:
    """Return the output folder; raise before any work if it exists."""
    if output is None:
        return None
    folder = PathPolicy.of(context.project, allow_path).inside(output, "output")
    if folder.exists():
        raise RequestError(f"output '{output}' exists already", "nothing is overwritten", "name a new folder")
    return folder


def deliver(
    folder: Path, output: Path | None, passed: bool, fault: str = "the artifact fails the quality guard"
) -> tuple[Path, list[str]]:
    """Copy a measured artifact to the output folder, unless it failed for the reason `fault`.

    Returns:
        The folder of the artifact, and warnings.
    """
    if output is None:
        return folder, []
    if not passed:
        return folder, [f"'{output.name}' was not written: {fault}"]
    artifacts.copy_artifact(folder, output)
    return output, []


def not_sealed(request: ModelRequest) -> list[str]:
    """Return a warning where the artifact cannot be sealed."""
    if "output" not in type(request).model_fields or can_seal():
        return []
    return [
        "your state folder cannot be written, so the artifact is not sealed as yours: where it holds a recipe, opening "
        f"it later takes {argument('trust_artifact', True)} (OMGOPTIM_STATE_DIR names another folder)"
    ]
