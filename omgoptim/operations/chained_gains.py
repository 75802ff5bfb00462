"""The gain against the first original, where a run goes on from an earlier run's artifact."""

from __future__ import annotations

from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.models.artifact import Manifest
from omgoptim.models.report_file import read_report
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import RUNS, find_artifact
from omgoptim.operations.context import RunContext, is_live
from omgoptim.operations.verdict import size_words
from omgoptim.reports import EfficiencyReport, Gains, Measurement, Total
from omgoptim.requests import ModelRequest, Request

MEASURED_WITH = ("data", "inputs", "samples", "seed")
"""Arguments that must be the same for two runs to have read their quality on the same samples."""


def with_total(report: EfficiencyReport, request: Request, context: RunContext) -> EfficiencyReport:
    """Add the total gain to the report of a run that changed an earlier run's artifact."""
    if not isinstance(request, ModelRequest) or report.after is None or is_live(request.model):
        return report
    first = _first_run(request, context)
    begun = _report_of(first, context.project) if first else None
    if begun is None or begun.before is None:
        return report
    total = _total(begun, begun.before, report, report.after)
    words = total_words(total)
    summary = f"{report.summary} {words}" if words else report.summary
    return report.model_copy(update={"total": total, "summary": summary})


def total_words(total: Total) -> str:
    """One sentence: `Against the first original, of run prune-…: 7.90x smaller on disk; speed … not measured.`"""
    told = [size_words(Gains(size_ratio=total.size_ratio))] if total.size_ratio is not None else []
    if total.quality_drop is not None:
        told.append(f"a quality drop of {total.quality_drop:.4f}")
    if not told:
        return ""
    return f"Against the first original, of run {total.from_run}: {', '.join(told)}; speed against it was not measured."


def _first_run(request: ModelRequest, context: RunContext) -> str | None:
    """The oldest run that the request's model descends from; None where it is no artifact."""
    try:
        folder = find_artifact(request.model, PathPolicy.of_request(context.project, request))
        lineage = Manifest.read(folder).lineage if folder is not None else ()
    except OmgoptimError:
        return None
    return lineage[0] if lineage else None


def _report_of(run_id: str, project: Path) -> EfficiencyReport | None:
    """The report that a run of this project and this user wrote; None where there is none.

    What a manifest names is only a name, and numbers that somebody else wrote were not measured here.
    """
    if Path(run_id).name != run_id:
        return None
    found = read_report(project / RUNS / run_id / "report.json", run_id)
    return found[0] if found and found[1] else None


def _total(begun: EfficiencyReport, first: Measurement, report: EfficiencyReport, last: Measurement) -> Total:
    asked = [(begun.request.get(name), report.request.get(name)) for name in MEASURED_WITH]
    same = all(one == other and not is_live(one) for one, other in asked)
    each_its_own = (last.metric or "").endswith("agreement")  # with the original of its own run, which is another
    comparable = same and not each_its_own and (first.metric, first.samples) == (last.metric, last.samples)
    drop = None
    if comparable and first.quality is not None and last.quality is not None:
        drop = first.quality - last.quality
    return Total(
        from_run=begun.run_id,
        size_ratio=_ratio(first.size_bytes, last.size_bytes),
        params_ratio=_ratio(first.params, last.params),
        macs_ratio=_ratio(first.macs, last.macs),
        quality_drop=drop,
    )


def _ratio(first: int | None, last: int | None) -> float | None:
    return first / last if first and last else None
