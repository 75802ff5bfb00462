"""The sections of the HTML report on rounds, training and sensitivity."""

from __future__ import annotations

from omgoptim.render import arms, curves, rounds
from omgoptim.render.html_parts import section, table, text
from omgoptim.reports import EfficiencyReport


def rounds_section(report: EfficiencyReport) -> str:
    """The rounds as a table, and what training did as curves."""
    body, note = "", ""
    shown = rounds.shown_rounds(report)
    if shown:
        columns = rounds.round_columns(shown)
        header = [*((name if name != "kept" else "", name != "kept") for name in columns), ("why", False)]
        rows = []
        for place, one in enumerate(shown):
            cells = "".join(
                f'<td class="{"kept" if name == "kept" else "n"}">{cells[place]}</td>'
                for name, cells in columns.items()
            )
            rows.append(f'<tr class="{"chosen" if one.kept else ""}">{cells}<td>{text(one.why)}</td></tr>')
        body = table(header, rows)
        note = rounds.rounds_note(shown)
    if report.training is not None:
        body += f'<p class="note">{text(rounds.training_text(report.training), 600)}</p>'
        alone = report.control.training if report.control is not None else None
        if report.control is not None:
            body += f'<p class="note">control: {text(arms.control_text(report.control), 600)}</p>'
            note = "the two losses measure different things; the qualities compare"
        body += curves.learning_curve(report.training, alone)
    return section("Rounds and training" if shown else "Training", body, note) if body else ""


def sensitivity_section(report: EfficiencyReport) -> str:
    """One small curve per layer or group, the most sensitive first."""
    found = rounds.slacks(report)
    guard = report.request.get("max_quality_drop")
    picture = curves.sensitivity_multiples(found, float(guard) if isinstance(guard, (int, float)) else None)
    if not picture:
        return ""
    most = f"the {curves.MOST_LAYERS} most sensitive of {len(found)}; " if len(found) > curves.MOST_LAYERS else ""
    return section("Sensitivity", picture, f"{most}drop in quality when this alone is compressed; dashes: the guard")
