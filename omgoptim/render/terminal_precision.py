"""Coverage, guard and explanation of a quantization as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from omgoptim.render import facts, precision
from omgoptim.reports import EfficiencyReport, Explanation

MOST = {"layers": 5, "findings": 3}
"""How many rows the short form shows; the full form shows all."""

_TONES = {"better": "bold green", "open": "bold yellow", "worse": "bold red", "same": "bold"}


def coverage_block(report: EfficiencyReport, full: bool) -> RenderableType | None:
    """What the gain comes from, what was quantized, the guard, and what else was kept; in full also every layer."""
    lines: list[RenderableType] = []
    if report.gains_by is not None and (parts := precision.parts_text(report.gains_by)):
        lines.append(Text.assemble(("speedup   ", "bold"), parts))
    if report.coverage is not None:
        verdict, _, why = precision.coverage_text(report.coverage).partition(" ")
        style = _TONES[precision.coverage_tone(report.coverage)]
        lines.append(Text.assemble(("coverage  ", "bold"), (verdict, style), " ", why))
    if report.guard is not None:
        first, *kept = precision.guard_texts(report.guard)
        style = "" if report.guard.holds else "red"
        lines.append(Text.assemble(("guard     ", "bold"), (first, style)))
        lines += [Text(f"          {line}") for line in kept]
    for index, text in enumerate(precision.alternative_texts(report)):
        lines.append(Text.assemble(("kept      " if index == 0 else "          ", "bold"), text))
    if full and report.coverage is not None and report.coverage.layers:
        rows = [precision.precision_cells(layer) for layer in report.coverage.layers]
        lines.append(_table("layers with weights", rows, right=("bytes",)))
    return Padding(Group(*lines), (0, 0, 1, 0)) if lines else None


def explanation_block(report: EfficiencyReport, full: bool) -> RenderableType | None:
    """Why quality fell and why it is not faster."""
    explanation = report.explanation
    if explanation is None:
        return None
    parts: list[RenderableType] = [Text.assemble(("explained ", "bold"), facts.plain(explanation.summary, 600))]
    findings = explanation.findings if full else explanation.findings[: MOST["findings"]]
    parts += [Text.assemble(("  found   ", "yellow"), precision.finding_text(one)) for one in findings]
    parts += _sensitive(explanation, full)
    times = precision.times_text(explanation, len(explanation.times) if full else precision.NAMED)
    if times:
        parts.append(Text.assemble(("  time    ", "bold"), times))
    return Padding(Group(*parts), (0, 0, 1, 0))


def _sensitive(explanation: Explanation, full: bool) -> list[RenderableType]:
    shown = explanation.layers if full else explanation.layers[: MOST["layers"]]
    if not shown:
        return []
    rows = [precision.noise_cells(layer) for layer in shown]
    right = ("alone", "gain in float", "recovered", "float weights")
    notes = [Text(f"  {precision.noise_note(explanation)}", "dim")]
    if len(shown) < len(explanation.layers):
        notes.append(Text(f"  and {len(explanation.layers) - len(shown)} more: --detail full", "dim"))
    return [_table("most sensitive layers", rows, right), *notes]


def _table(title: str, rows: Sequence[dict[str, str]], right: Sequence[str]) -> Table:
    """A table of cells by column; a column that is empty in every row is left out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title, "bold"), title_justify="left")
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[name]) for name in columns))
    return table
