"""The outputs of a model, in the words that every report has, as lines and as a table of a page."""

from __future__ import annotations

from omgoptim.render.html_parts import section, table, text
from omgoptim.render.markdown_parts import bulleted, safe
from omgoptim.reports import EfficiencyReport, OutputRecord

HEADER = ("output", "shape", "kind", "agreement with the original")


def shown(report: EfficiencyReport, full: bool = False) -> list[OutputRecord]:
    """The outputs that a report lists: several always, a single one in full detail, or where it was ruined."""
    several = len(report.outputs) > 1 or any(output.ruined for output in report.outputs)
    return report.outputs if several or full else []


def shape_text(output: OutputRecord) -> str:
    """`(batch, 4)`"""
    return f"({', '.join(str(size) for size in output.shape)})"


def kind_text(output: OutputRecord) -> str:
    """`class scores, labelled`"""
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
    """`reopened within 2.1e-07 of the model in memory`; empty where it was not measured."""
    if output.reopened is None:
        return ""
    if not output.reopened:
        return "reopened bit for bit"
    return f"reopened within {output.reopened:.2g} of the model in memory"


def outputs_lines(report: EfficiencyReport, full: bool) -> list[str]:
    """The outputs for an agent."""
    lines = []
    for output in shown(report, full):
        told = [shape_text(output), kind_text(output), agreement_text(output)]
        told += [reopened_text(output)] if full else []
        lines.append(f"`{safe(output.name, 60)}` {safe(': '.join(part for part in told if part), 240)}")
    return bulleted("Outputs, against the original's", lines, 50 if full else 8)


def outputs_section(report: EfficiencyReport) -> str:
    """The outputs for a page."""
    if not report.outputs:
        return ""
    rows = (
        f"<tr><td>{text(output.name, 60)}</td><td>{text(shape_text(output), 60)}</td>"
        f'<td>{text(kind_text(output))}</td><td class="{"worse" if output.ruined else ""}">'
        f"{text(agreement_text(output))}</td><td>{text(reopened_text(output))}</td>"
        f'<td class="why">{text(output.evidence, 160)}</td></tr>'
        for output in report.outputs
    )
    return section("Outputs", table([(name, False) for name in (*HEADER, "fresh process", "known by")], rows))
