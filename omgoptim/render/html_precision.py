"""The sections of the HTML report on coverage, guard and explanation of a quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from omgoptim.render import facts, precision
from omgoptim.render.charts import WIDTH, tail
from omgoptim.render.html_parts import section, table, text
from omgoptim.reports import EfficiencyReport, Explanation, LayerNoise

MOST_BARS = 15
"""How many layers the picture shows, the most sensitive first; the table has all."""

_ROW = 30
_NUMBERS = ("bytes", "alone", "gain in float", "recovered", "float weights", "time", "share")


def coverage_section(report: EfficiencyReport) -> str:
    """What the gain comes from, what was quantized, what that took, every layer, and what else was kept."""
    parts = precision.parts_text(report.gains_by) if report.gains_by else ""
    body = f"<p>{text(f'Speedup: {parts}', 300)}</p>" if parts else ""
    if report.coverage is not None:
        verdict, _, why = precision.coverage_text(report.coverage).partition(" ")
        tone = precision.coverage_tone(report.coverage)
        body += f'<p><b class="{tone}">{text(verdict)}</b> {text(why, 500)}</p>'
    if report.guard is not None:
        body += "".join(f"<p>{text(line, 600)}</p>" for line in _guard(report))
    if report.coverage is not None and report.coverage.layers:
        rows = [precision.precision_cells(layer) for layer in report.coverage.layers]
        listed = _cells_table(rows)
        body += f"<details><summary>{len(rows)} layers with weights</summary>{listed}</details>"
    kept = "".join(f"<li>{text(one, 300)}</li>" for one in precision.alternative_texts(report))
    body += f"<h3>Kept beside it</h3><ul>{kept}</ul>" if kept else ""
    return section("Coverage and guard" if report.guard else "Coverage", body) if body else ""


def explanation_section(report: EfficiencyReport) -> str:
    """Why quality fell and why it is not faster."""
    explanation = report.explanation
    if explanation is None:
        return ""
    body = f"<p>{text(explanation.summary, 1200)}</p>"
    items = "".join(f"<li>{text(precision.finding_text(one), 900)}</li>" for one in explanation.findings)
    body += f"<h3>Found</h3><ul>{items}</ul>" if items else ""
    body += _sensitive(explanation) + _times(explanation)
    return section("Explanation", body)


def noise_bars(layers: Sequence[LayerNoise], whole_db: float | None = None) -> str:
    """The signal-to-noise ratio of each layer as a bar, the most sensitive first. Empty without layers.

    Args:
        whole_db: that of the model with all layers quantized, drawn as a line where it is within the picture.
    """
    shown = list(layers[:MOST_BARS])
    if not shown:
        return ""
    names = [tail(precision.path_text(layer.path, 200), 38) for layer in shown]
    start = 24 + round(6.6 * max(map(len, names)))
    most = max((layer.sqnr_db for layer in shown if math.isfinite(layer.sqnr_db)), default=0.0)
    most = max(most, whole_db or 0.0, 1e-9)
    per_db = (WIDTH - start - 90) / most
    height = _ROW * len(shown) + 6
    parts = [
        _bar(layer, name, index, start, per_db) for index, (layer, name) in enumerate(zip(shown, names, strict=True))
    ]
    if whole_db is not None and whole_db > 0:
        at = start + per_db * whole_db
        told = f"<title>all layers quantized: {whole_db:.1f} dB</title>"
        parts.append(f'<line class="guard" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}">{told}</line>')
    name = "Signal-to-noise ratio with only this layer quantized"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _bar(layer: LayerNoise, name: str, index: int, start: int, per_db: float) -> str:
    top, db = index * _ROW + 6, layer.sqnr_db
    width = max(1.0, per_db * db) if math.isfinite(db) else 1.0
    whole = escape(f"{precision.path_text(layer.path, 200)} ({facts.plain(layer.kind, 60)})")
    title = f"<title>{whole}</title>"
    return (
        f'<text class="label" x="{start - 12}" y="{top + 15}" text-anchor="end">{escape(name)}{title}</text>'
        f'<rect class="bar" x="{start}" y="{top + 2}" width="{width:.1f}" height="18" rx="4"/>'
        f'<text x="{start + width + 8:.1f}" y="{top + 15}">{db:.1f} dB</text>'
    )


def _guard(report: EfficiencyReport) -> list[str]:
    if report.guard is None:
        return []
    first, *kept = precision.guard_texts(report.guard)
    return [f"The guard {first}", *kept]


def _sensitive(explanation: Explanation) -> str:
    if not explanation.layers:
        return ""
    rows = [precision.noise_cells(layer) for layer in explanation.layers]
    picture = noise_bars(explanation.layers, explanation.sqnr_db)
    line = "; dashes: all layers quantized" if explanation.sqnr_db else ""
    note = f'<p class="note">{text(precision.noise_note(explanation), 500)}; short bars hurt{line}</p>'
    listed = f"<details><summary>{len(rows)} layers</summary>{_cells_table(rows)}</details>"
    return f"<h3>Most sensitive layers</h3>{note}{picture}{listed}"


def _times(explanation: Explanation) -> str:
    if not explanation.times:
        return ""
    rows = [
        {
            "kind": facts.plain(time.kind, 60),
            "time": facts.time_text(time.time_ms),
            "share": f"{time.share:.0%}",
            "computed in": precision.numbers_text(time),
        }
        for time in explanation.times
    ]
    bound = precision.bound_text(explanation)
    note = f'<p class="note">{escape(bound)}</p>' if bound else ""
    return f"<h3>Time of one call</h3>{_cells_table(rows)}{note}"


def _cells_table(rows: Sequence[dict[str, str]]) -> str:
    """A table of cells by column; a column that is empty in every row is left out."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    kinds = {name: "n" if name in _NUMBERS else "" for name in columns}
    cells = ("".join(f'<td class="{kinds[name]}">{text(row[name])}</td>' for name in columns) for row in rows)
    return table(((name, name in _NUMBERS) for name in columns), (f"<tr>{row}</tr>" for row in cells))
