"""Total gain against the first original, for a run on an earlier run's artifact."""

from __future__ import annotations

from pathlib import Path

from omgoptim.errors import OmgoptimError
from omgoptim.models.manifest import Manifest
from omgoptim.models.report_file import read_report
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import RUNS, find_artifact
from omgoptim.operations.context import RunContext, is_live
from omgoptim.operations.verdict import size_phrase
from omgoptim.reports import EfficiencyReport, Gains, Measurement, Total
from omgoptim.requests import ModelRequest, Request

MEASURED_WITH = ("data", "inputs", "samples", "seed")
"""Arguments that must agree for two runs to have the same evaluation samples."""


def with_total_gain(report: EfficiencyReport, request: Request, context: RunContext) -> EfficiencyReport:
    """Add the total gain to the report of a run that changed an earlier run's artifact."""
    if not isinstance(request, ModelRequest) or report.after is None or is_live(request.model):
        return report
    first = _first_run(request, context)
    begun = _report_of(first, context.project) if first else None
    if begun is None or begun.before is None:
        return report
    total = _total(begun, begun.before, report, report.after)
    sentence = total_sentence(total)
    summary = f"{report.summary} {sentence}" if sentence else report.summary
    return report.model_copy(update={"total": total, "summary": summary})


def total_sentence(total: Total) -> str:
    """Return a sentence such as `Against the first original, of run prune-…: 7.90x smaller on disk; …`."""
    parts = [size_phrase(Gains(size_ratio=total.size_ratio))] if total.size_ratio is not None else []
    if total.quality_drop is not None:
        parts.append(f"a quality drop of {total.quality_drop:.4f}")
    if not parts:
        return ""
    return (
        f"Against the first original, of run {total.from_run}: {', '.join(parts)}; speed against it was not measured."
    )


def _first_run(request: ModelRequest, context: RunContext) -> str | None:
    """Return the oldest run in the lineage of the request's model; None where it is not an artifact."""
    try:
        folder = find_artifact(request.model, PathPolicy.of_request(context.project, request))
        lineage = Manifest.read(folder).lineage if folder is not None else ()
    except OmgoptimError:
        return None
    return lineage[0] if lineage else None


def _report_of(run_id: str, project: Path) -> EfficiencyReport | None:
    """Read the sealed report of a run of this project and user; None where there is none.

    A manifest names only the run, and unsealed numbers may not be measured.
    """
    if Path(run_id).name != run_id:
        return None
    found = read_report(project / RUNS / run_id / "report.json", run_id)
    return found[0] if found and found[1] else None


def _total(begun: EfficiencyReport, first: Measurement, report: EfficiencyReport, last: Measurement) -> Total:
    asked = [(begun.request.get(name), report.request.get(name)) for name in MEASURED_WITH]
    same = all(one == other and not is_live(one) for one, other in asked)
    each_its_own = (last.metric or "").endswith("agreement")  # with the original of its own run
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
