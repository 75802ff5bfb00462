"""What is shown of times that mean nothing beside each other: the machine was overloaded while they were measured."""

from __future__ import annotations

from omgoptim.reports import EfficiencyReport, Measurement

TIMES = ("latency_ms_p50", "latency_ms_p90", "throughput_per_s")
"""Fields of a measurement."""


def speed_undecided(report: EfficiencyReport) -> bool:
    """Whether times were measured and no ratio of them can be told."""
    return report.gains is not None and report.gains.launches is not None and report.gains.speedup is None


def shown_sides(report: EfficiencyReport) -> tuple[Measurement | None, Measurement | None]:
    """Both sides of the comparison, without their times where those mean nothing."""
    if not speed_undecided(report):
        return report.before, report.after
    nothing = dict.fromkeys(TIMES)
    before, after = (side.model_copy(update=nothing) if side else None for side in (report.before, report.after))
    return before, after
