"""Report and delivery of the entries of a final measurement, shared by `optimize` and `search`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from omgoptim.models.report_file import write_sealed
from omgoptim.operations.context import RunContext
from omgoptim.operations.final_measurement import (
    AnyEntry,
    FinalChoice,
    MeasuredEntry,
    doubts,
    implausible_speedup,
    save_choice,
)
from omgoptim.operations.gain_attribution import waiting_warnings
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import new_calls, pick_step, repeat_of
from omgoptim.operations.output_folder import deliver as deliver_output
from omgoptim.operations.report_records import artifact_record, environment, output_records, shown_request
from omgoptim.operations.timing import slow_warnings
from omgoptim.operations.verdict import Outcome, is_gain, load_warnings, passes, quality_warnings
from omgoptim.reports import Alternative, EfficiencyReport, GainsBy
from omgoptim.requests import OptimizeRequest, SearchRequest

Request = OptimizeRequest | SearchRequest


def outcome_of(one: MeasuredEntry[AnyEntry], guard: float) -> Outcome:
    """Return the outcome of a run that delivers an entry; `guard` is the largest quality drop."""
    if one.missed or not passes(one.quality, guard):
        return "guard_failed"
    return "ok" if is_gain(one.gains) else "no_gain"


def final_report(
    request: Request,
    context: RunContext,
    loaded: LoadedModel,
    chosen: FinalChoice[AnyEntry],
    one: MeasuredEntry[AnyEntry],
    summary: str,
    parts: GainsBy | None = None,
) -> EfficiencyReport:
    """Return the report of an entry as that of the run's artifact, without what only its verb knows.

    `parts` are the gains by engine and precision that the entry's quantization measured; they show implausible ones.
    """
    verb: Literal["optimize", "search"] = "optimize" if isinstance(request, OptimizeRequest) else "search"
    guard, place = request.max_quality_drop, str(context.artifact)
    artifact = artifact_record(one.entry.artifact)
    load = artifact.load.replace(str(one.entry.artifact), place)
    implausible = implausible_speedup(one, chosen, loaded, parts)
    waits = waiting_warnings(chosen.original, one.timing, chosen.load, loaded.device)
    return EfficiencyReport(
        outcome=outcome_of(one, guard),
        summary=" ".join([*doubts(one, chosen, loaded, parts), summary]),
        warnings=[
            *([implausible] if implausible else waits),
            *loaded.notes,
            *quality_warnings(one.quality, guard, loaded.data.real),
            *load_warnings(chosen.load),
            *slow_warnings(one.timing),
        ],
        verb=verb,
        run_id=context.run_id,
        request=shown_request(request),
        environment=environment(context, loaded.bench, request.seed, loaded.device, chosen.load),
        before=one.before,
        after=one.after,
        gains=one.gains,
        outputs=output_records(loaded.outputs, one.quality, one.timing),
        alternatives=[_alternative(other, chosen, guard, context) for other in chosen.finalists if other is not one],
        delivered=one.slug,
        macs_check=loaded.macs.check if loaded.macs else None,
        artifact=artifact.model_copy(update={"path": place, "load": load}),
        lineage=list(loaded.lineage),
        repeat=repeat_of(verb, request),
    )


def deliver(
    request: Request,
    context: RunContext,
    chosen: FinalChoice[AnyEntry],
    reports: Mapping[str, EfficiencyReport],
    output: Path | None,
) -> EfficiencyReport:
    """Put the entries into the run's folder, each with its report; return the winner's.

    Args:
        request: of the run.
        context: of the run.
        chosen: all entries and the winner.
        reports: of every entry by its slug.
        output: folder for a copy of the winner.
    """
    places = save_choice(chosen, context)
    for name, report in reports.items():
        asked = report.model_copy(update={"next_steps": new_calls(report, request)})
        write_sealed(context.alternatives / f"{name}.json", context.run_id, asked)
    report = reports[chosen.winner.slug]
    place, notes = deliver_output(places[chosen.winner.slug], output, chosen.holds)
    update = {"warnings": [*report.warnings, *notes]}
    return report.model_copy(update=update | ({"artifact": artifact_record(place)} if output else {}))


def _alternative(
    one: MeasuredEntry[AnyEntry], chosen: FinalChoice[AnyEntry], guard: float, context: RunContext
) -> Alternative:
    return Alternative(
        name=one.slug,
        candidate=one.entry.name,
        runtime=one.after.runtime,
        precision=one.after.precision,
        best_for=_strengths(one, chosen, guard),
        size_bytes=one.after.size_bytes,
        size_ratio=one.gains.size_ratio,
        speedup=one.gains.speedup,
        speedup_low=one.gains.speedup_low,
        speedup_high=one.gains.speedup_high,
        quality=one.quality.after,
        quality_drop=one.quality.drop,
        holds=passes(one.quality, guard),
        path=str(context.alternatives / one.slug),
        command=pick_step(context.run_id, one.slug, "").command,
    )


def _strengths(one: MeasuredEntry[AnyEntry], chosen: FinalChoice[AnyEntry], guard: float) -> list[str]:
    holding = [other for other in chosen.finalists if passes(other.quality, guard)]
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
