"""Reports of the entries of a final measurement, and their delivery into the run's folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence

from omgoptim.models.report_file import write_signed_report
from omgoptim.operations.final_measurement import AnyEntry, FinalChoice, MeasuredEntry
from omgoptim.operations.gain_attribution import waiting_warnings
from omgoptim.operations.next_steps import new_calls, pick_step, repeat_of
from omgoptim.operations.report_records import artifact_record, environment, output_records, shown_request
from omgoptim.operations.timing import slow_warnings
from omgoptim.operations.verdict import load_warnings, passes, quality_warnings
from omgoptim.reports import Alternative, EfficiencyReport, GainsBy
from omgoptim.requests import verb_of


def final_report(
    chosen: FinalChoice[AnyEntry],
    one: MeasuredEntry[AnyEntry],
    summary: str,
    notes: Sequence[str] = (),
    parts: GainsBy | None = None,
) -> EfficiencyReport:
    """Return the report of an entry as that of the run's artifact, without what only its verb knows.

    Args:
        chosen: all entries of the final measurement.
        one: the entry.
        summary: of the report.
        notes: warnings of the verb, between those of the original and those of the quality.
        parts: gains of the entry by engine and precision, which show implausible ones.
    """
    request, context, loaded, race = chosen.request, chosen.context, chosen.loaded, chosen.race

    artifact, place = artifact_record(one.entry.artifact), str(context.artifact)
    implausible = chosen.implausible(one, parts)
    labelled = any(target is not None for target in loaded.evaluation.targets)
    return EfficiencyReport(
        outcome=chosen.outcome(one),
        summary=summary,
        warnings=[
            *([implausible] if implausible else waiting_warnings(race.original, one.timing, race.load, loaded.device)),
            *loaded.notes,
            *notes,
            *quality_warnings(one.quality, chosen.guard, loaded.data.real, labelled),
            *load_warnings(race.load),
            *slow_warnings(race.original, one.timing),
        ],
        verb=verb_of(request),
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, race.load),
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
        repeat=repeat_of(request),
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
        place, ready = chosen.place(one), one.entry.artifact
        if context.work not in ready.parents:
            ready = context.work / "deliver" / one.slug
            shutil.rmtree(ready, ignore_errors=True)
            shutil.copytree(one.entry.artifact, ready)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(ready, place)
    for name, report in reports.items():
        asked = report.model_copy(update={"next_steps": new_calls(report, chosen.request), "delivered": name})
        write_signed_report(context.alternatives / f"{name}.json", context.run_id, asked)
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
