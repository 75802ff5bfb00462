"""The outputs of a model and their agreement with the original's."""

from __future__ import annotations

from omgoptim.render.blocks import Section, Text, table_of
from omgoptim.reports import EfficiencyReport, OutputRecord

BRIEF = 8
"""Outputs that the short form shows."""


def outputs_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Several outputs always; a single one in full, or where it was ruined."""
    outputs = shown_outputs(report, full)
    shown = outputs if full else outputs[:BRIEF]
    if not shown:
        return None
    table = table_of(
        {
            "output": [Text(one.name, code=True, limit=60) for one in shown],
            "shape": [Text(shape_text(one), limit=60) for one in shown],
            "kind": [kind_text(one) for one in shown],
            "agreement with the original": [
                Text(agreement_text(one), tone="worse" if one.ruined else "same") for one in shown
            ],
            "reopened": [Text(reopened_text(one) if full else "", limit=80) for one in shown],
            "known by": [Text(one.evidence if full else "", limit=160) for one in shown],
        },
        title="outputs",
        left_out=len(outputs) - len(shown),
    )
    return Section("Outputs", (table,))


def shown_outputs(report: EfficiencyReport, full: bool = False) -> list[OutputRecord]:
    """Return the outputs that a report lists."""
    several = len(report.outputs) > 1 or any(output.ruined for output in report.outputs)
    return report.outputs if several or full else []


def shape_text(output: OutputRecord) -> str:
    """Return `(batch, 4)`."""
    return f"({', '.join(str(size) for size in output.shape)})"


def kind_text(output: OutputRecord) -> str:
    """Return `class scores, labelled`."""
    return output.kind.replace("_", " ") + (", labelled" if output.labelled else "")


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
