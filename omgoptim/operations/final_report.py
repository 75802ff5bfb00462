"""Reports of the finalists, and their artifacts in the run's folder and in the output folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from omgoptim.models import artifact as artifacts
from omgoptim.models.report_file import write_signed_report
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.operations.context import RunContext
from omgoptim.operations.final_measurement import AnyEntry, FinalChoice, MeasuredEntry
from omgoptim.operations.gain_attribution import waiting_warnings
from omgoptim.operations.next_steps import pick_step, without_repeats
from omgoptim.operations.report_records import (
    artifact_record,
    output_records,
    report_head,
)
from omgoptim.operations.timing import slow_warnings
from omgoptim.operations.verdict import load_warnings, passes, quality_warnings
from omgoptim.reports import Alternative, EfficiencyReport, GainsBy
from omgoptim.requests import ModelRequest


def final_report(
    chosen: FinalChoice[AnyEntry],
    one: MeasuredEntry[AnyEntry],
    summary: str,
    notes: Sequence[str] = (),
    parts: GainsBy | None = None,
) -> EfficiencyReport:
    """Return the report of an entry as that of the run's artifact, without what only its verb knows.

    `notes` are the verb's own warnings. `parts`, the gains by engine and precision, show an implausible speedup.
    """
    request, context, loaded, timings = chosen.request, chosen.context, chosen.loaded, chosen.timings

    artifact, place = artifact_record(one.entry.artifact), str(context.artifact)
    implausible = chosen.implausible(one, parts)
    labelled = any(target is not None for target in loaded.evaluation.targets)
    return EfficiencyReport(
        outcome=chosen.outcome(one),
        summary=summary,
        warnings=[
            *(
                [implausible]
                if implausible
                else waiting_warnings(timings.original, one.timing, timings.load, loaded.device)
            ),
            *loaded.notes,
            *notes,
            *quality_warnings(one.quality, chosen.guard, loaded.data.real, labelled),
            *load_warnings(timings.load),
            *slow_warnings(timings.original, one.timing),
        ],
        **report_head(request, context, loaded.bench, loaded.device, timings.load),
        before=one.before,
        after=one.after,
        gains=one.gains,
        gains_by=parts,
        outputs=output_records(loaded.outputs, one.quality, one.timing),
        alternatives=[_alternative(other, chosen) for other in chosen.finalists if other is not one],
        macs_check=loaded.macs.check if loaded.macs else None,
        artifact=artifact.model_copy(
            update={"path": place, "load": artifact.load.replace(str(one.entry.artifact), place)}
        ),
        lineage=list(loaded.lineage),
    )


def save_finalists(chosen: FinalChoice[AnyEntry], reports: Mapping[str, EfficiencyReport]) -> EfficiencyReport:
    """Put the entries into the run's folder, each with its report by its slug; return the winner's.

    An artifact in the run's scratch folder is moved, any other is copied. `pick` measures nothing: it finds the report
    beside the artifact.
    """
    context = chosen.context
    shutil.rmtree(context.alternatives, ignore_errors=True)  # of a run that was interrupted and resumed
    context.alternatives.mkdir()
    for one in chosen.finalists:
        place, ready = chosen.artifact_folder(one), one.entry.artifact
        if context.work not in ready.parents:
            ready = context.work / "deliver" / one.slug
            shutil.rmtree(ready, ignore_errors=True)
            shutil.copytree(one.entry.artifact, ready)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(ready, place)
    for name, report in reports.items():
        filtered = report.model_copy(update={"next_steps": without_repeats(report, chosen.request), "delivered": name})
        write_signed_report(context.alternatives / f"{name}.json", context.run_id, filtered)
    name = chosen.winner.slug
    return reports[name].model_copy(update={"delivered": name})


def _alternative(one: MeasuredEntry[AnyEntry], chosen: FinalChoice[AnyEntry]) -> Alternative:
    return Alternative(
        name=one.slug,
        candidate=one.entry.name,
        runtime=one.after.runtime,
        precision=one.after.precision,
        best_for=_strengths(one, chosen),
        size_bytes=one.after.size_bytes,
        size_ratio=one.gains.size_ratio,
        speedup=one.gains.speedup,
        speedup_low=one.gains.speedup_low,
        speedup_high=one.gains.speedup_high,
        quality=one.quality.after,
        quality_drop=one.quality.drop,
        holds=passes(one.quality, chosen.guard),
        path=str(chosen.context.alternatives / one.slug),
        command=pick_step(chosen.context.run_id, one.slug, "").command,
    )


def _strengths(one: MeasuredEntry[AnyEntry], chosen: FinalChoice[AnyEntry]) -> list[str]:
    """Return the properties in which an entry is best of those that pass the guard."""
    holding = [other for other in chosen.finalists if passes(other.quality, chosen.guard)]
    if not any(one is other for other in holding):
        return []
    strengths = []
    if one.gains.speedup is not None and one is max(holding, key=lambda other: other.gains.speedup or 0.0):
        strengths.append("speed")
    if one is max(holding, key=lambda other: other.gains.size_ratio or 0.0):
        strengths.append("size")
    if one is min(holding, key=lambda other: other.quality.drop):
        strengths.append("quality")
    return strengths


def new_output_folder(request: ModelRequest, context: RunContext) -> Path | None:
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
