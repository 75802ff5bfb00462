"""Output folder of an artifact."""

from __future__ import annotations

from pathlib import Path

from omgoptim.errors import argument
from omgoptim.models import artifact as artifacts
from omgoptim.models.security.file_integrity import can_sign
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.context import RunContext
from omgoptim.operations.report_records import artifact_record
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import ModelRequest


def free_output(request: ModelRequest, context: RunContext) -> Path | None:
    """Return the output folder of a request, if it has one; raise before any work if it exists."""
    output: str | None = getattr(request, "output", None)
    return None if output is None else PathPolicy.of(context.project, request.allow_path).new_folder(output, "output")


def with_output(
    report: EfficiencyReport,
    artifact: Path,
    output: Path | None,
    fault: str = "the artifact fails the quality guard",
) -> EfficiencyReport:
    """Copy the run's artifact to the output folder and name it in the report; if it failed, warn with `fault`."""
    if output is None:
        return report
    if report.outcome == "guard_failed":
        note = f"'{output.name}' was not written: {fault}"
        return report.model_copy(update={"warnings": [*report.warnings, note]})
    artifacts.copy_artifact(artifact, output)
    return report.model_copy(update={"artifact": artifact_record(output)})


def not_sealed(request: ModelRequest) -> list[str]:
    """Return a warning where the artifact cannot be signed."""
    if "output" not in type(request).model_fields or can_sign():
        return []
    return [
        "the state folder cannot be written, so the artifact is not signed: if it holds a recipe, opening it later "
        f"requires {argument('trust_artifact', True)} (OMGOPTIM_STATE_DIR names another folder)"
    ]
