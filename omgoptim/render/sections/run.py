"""Warnings, and the environment of the measurement."""

from __future__ import annotations

from omgoptim.render.blocks import Items, Line, Section, Text
from omgoptim.reports import EfficiencyReport, TargetMachine

BRIEF_WARNINGS = 6
"""Warnings that the short form shows."""


def warnings_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Warnings of the report."""
    shown = report.warnings if full else report.warnings[:BRIEF_WARNINGS]
    if not shown:
        return None
    items = Items("warnings", tuple(Text(text, limit=500) for text in shown), len(report.warnings) - len(shown))
    return Section("Warnings", (items,), kind="warnings")


def _target_line(target: TargetMachine) -> str:
    features = f" ({', '.join(target.cpu_features)})" if target.cpu_features else ""
    versions = ", ".join(f"{name} {version}" for name, version in target.versions.items())
    machine = f"{target.cpu}{features}, {target.cores} cores, {target.system}"
    return f"{target.address}: {machine}, {target.python}, {versions}"


def environment_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Machine, versions and seed; only in full."""
    if not full:
        return None
    here = report.environment
    features = f" ({', '.join(here.cpu_features)})" if here.cpu_features else ""
    values = {
        "cpu": f"{here.cpu}{features}",
        "gpu": here.gpu or "none",
        "measured on": _target_line(here.target) if here.target else "",
        "device": f"{here.device}, {here.threads} threads",
        "python": here.python,
        "versions": ", ".join(f"{name} {version}" for name, version in here.versions.items()),
        "seed": str(here.seed),
        "load before timing": "" if here.load is None else f"{here.load:.0%} of the machine",
        "lineage": " -> ".join(report.lineage),
    }
    lines = tuple(Line(name, Text(value, limit=800)) for name, value in values.items() if value)
    return Section("Where these numbers come from", lines, kind="environment")
