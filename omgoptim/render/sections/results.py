"""Results of a run: before / after table, outputs, warnings and environment."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Columns, Items, Line, Section, Table, Text, cells_of
from omgoptim.render.claims import (
    column_names,
    comparison_rows,
    side_title,
    size_files_text,
    speed_undecided,
    total_text,
)
from omgoptim.reports import EfficiencyReport, OutputRecord, TargetMachine


def comparison_section(report: EfficiencyReport, _full: bool) -> Section | None:
    """Return the before / after table, one row per measured quantity."""
    rows = comparison_rows(report)
    if not rows:
        return None
    names = column_names(report)
    labels = [row.label for row in rows]
    if report.before is None or report.after is None:
        title = side_title("measured", report.before or report.after)
        values = [Text(row.before or row.after) for row in rows]
        blocks: list[Block] = [Table(*cells_of({"": labels, title: values}, numeric=[title]))]
        heading = "Measured"
    else:
        before, after = side_title(names[0], report.before), side_title(names[1], report.after)
        columns: Columns = {
            "": labels,
            before: [Text(row.before) for row in rows],
            after: [Text(row.after) for row in rows],
            "gain": [Text(row.gain, tone=row.tone) for row in rows],
        }
        blocks = [Table(*cells_of(columns, numeric=[before, after]))]
        heading = f"{names[0].capitalize()} and {names[1]}"
    if report.total is not None:
        text = f"against the original of run {report.total.from_run}: {total_text(report.total)}"
        blocks.append(Line("total", Text(text, limit=300)))
    launches = report.gains.launches if report.gains else None
    many = "launch" if launches == 1 else "launches"
    decided = launches and not speed_undecided(report)
    notes = [f"latency ratio over {launches} fresh {many} of both"] if decided else []
    notes += [f"size counts {files}"] if (files := size_files_text(report)) else []
    return Section(heading, tuple(blocks), "; ".join(notes), "comparison")


BRIEF = 8
"""Outputs that the short form shows. Chosen: what fits a screen."""


def outputs_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Return the outputs: several always, a single one in full or if it was ruined."""
    outputs = shown_outputs(report, full)
    shown = outputs if full else outputs[:BRIEF]
    if not shown:
        return None
    columns: Columns = {
        "output": [Text(one.name, code=True, limit=60) for one in shown],
        "shape": [Text(f"({', '.join(map(str, one.shape))})", limit=60) for one in shown],
        "kind": [one.kind.replace("_", " ") + (", labelled" if one.labelled else "") for one in shown],
        "agreement with the original": [
            Text(agreement_text(one), tone="worse" if one.ruined else "same") for one in shown
        ],
        "reopened": [Text(reopened_text(one) if full else "", limit=80) for one in shown],
        "evidence": [Text(one.evidence if full else "", limit=160) for one in shown],
    }
    table = Table(
        *cells_of(columns),
        title="outputs",
        left_out=len(outputs) - len(shown),
    )
    return Section("Outputs", (table,))


def shown_outputs(report: EfficiencyReport, full: bool = False) -> list[OutputRecord]:
    """Return the outputs that a report lists."""
    several = len(report.outputs) > 1 or any(output.ruined for output in report.outputs)
    return report.outputs if several or full else []


def agreement_text(output: OutputRecord) -> str:
    """`R2 0.9905 (relative error 0.0974)`, `same class 98.5 %`; empty where it was not measured."""
    if not output.weight:
        return "not compared"
    if output.agreement is None:
        return ""
    ruined = ", ruined" if output.ruined else ""
    if output.relative_error is not None:
        return f"R2 {output.agreement:.4f} (relative error {output.relative_error:.4f}{ruined})"
    same = "same class" if output.kind == "class_scores" else "equal"
    return f"{same} {output.agreement:.1%}{ruined}"


def reopened_text(output: OutputRecord) -> str:
    """Difference of the reopened artifact to the model in memory: `within 2.1e-07`; empty where not measured."""
    if output.reopened is None:
        return ""
    return f"within {output.reopened:.2g}" if output.reopened else "bit for bit"


BRIEF_WARNINGS = 6
"""Warnings that the short form shows. Chosen: what fits a screen."""


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
    return Section("Environment", lines, kind="environment")
