"""The lists of a report in the order in which every form shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from omgoptim.reports import Candidate, EfficiencyReport, SensitivityPoint, Skip

_RANK = {"chosen": 0, "finalist": 1, "planned": 2, "dropped": 3, "failed": 4, "skipped": 5}
"""Order of candidates by status."""


def guard_of(report: EfficiencyReport) -> float | None:
    """Return the largest quality drop that the request allows; None where it has none."""
    guard = report.request.get("max_quality_drop")
    return float(guard) if isinstance(guard, (int, float)) else None


def model_of(report: EfficiencyReport) -> str:
    """Return the model of the request, or both artifacts of a comparison."""
    request = report.request
    return str(request.get("model") or " and ".join(str(request.get(name, "")) for name in ("a", "b")))


@dataclass(frozen=True, slots=True)
class SkipGroup:
    """Layers that were skipped for the same reason."""

    reason: str
    paths: tuple[str, ...]


def changed_paths(report: EfficiencyReport) -> list[str]:
    """Return the paths of the changed layers, each once."""
    return list(dict.fromkeys(change.path for change in report.changed))


def changed_title(report: EfficiencyReport) -> str:
    """Return the title of the list of changed layers: done or planned."""
    return "would change" if report.request.get("plan") else "changed"


def ranked_candidates(report: EfficiencyReport) -> list[Candidate]:
    """Return the candidates: the chosen one, the finalists, then the rest, each in the report's order."""
    return sorted(report.candidates, key=lambda candidate: _RANK[candidate.status])


def skip_groups(skipped: list[Skip]) -> list[SkipGroup]:
    """Group skipped layers by reason, the most common reason first."""
    groups: dict[str, list[str]] = {}
    for skip in skipped:
        groups.setdefault(skip.reason, []).append(skip.path)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [SkipGroup(reason, tuple(paths)) for reason, paths in ordered]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Quality drops when only one layer or group is compressed."""

    path: str
    points: tuple[SensitivityPoint, ...]
    """By amount, the smallest first."""
    within: float | None
    """The largest amount up to which every drop is within the guard; None where the guard is not known."""

    @property
    def worst(self) -> SensitivityPoint:
        """The point that loses most."""
        return max(self.points, key=lambda point: (point.quality_drop, point.amount))


def sensitivities(report: EfficiencyReport) -> list[Sensitivity]:
    """Return the layers or groups by how much quality they cost, the most sensitive first."""
    points: dict[str, list[SensitivityPoint]] = {}
    for point in report.sensitivity:
        points.setdefault(point.path, []).append(point)
    guard, found = guard_of(report), []
    for path, of_path in points.items():
        ordered = tuple(sorted(of_path, key=lambda point: point.amount))
        found.append(Sensitivity(path, ordered, None if guard is None else _within(ordered, guard)))
    return sorted(found, key=lambda one: (-one.worst.quality_drop, -fmean(point.quality_drop for point in one.points)))


def extremes(found: Sequence[Sensitivity], each: int = 5) -> list[Sensitivity]:
    """Return the most and the least sensitive entries, in order."""
    return list(found) if len(found) <= 2 * each else [*found[:each], *found[-each:]]


def _within(points: Sequence[SensitivityPoint], guard: float) -> float:
    amount = 0.0
    for point in points:
        if point.quality_drop > guard + 1e-12:
            break
        amount = point.amount
    return amount
