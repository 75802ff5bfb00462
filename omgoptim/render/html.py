"""A report as one self-contained page for a person: no scripts, nothing loaded, every text escaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from html import escape

from omgoptim.render.blocks import Block, Chart, Items, Line, Section, Table, Text
from omgoptim.render.claims import (
    claimed,
    comparison_rows,
    control_claim,
    quality_claim,
    quality_label,
    size_words,
    speed_claim,
    verdict,
)
from omgoptim.render.html_style import CSS
from omgoptim.render.numbers import block, count_text, plain, size_text, time_text
from omgoptim.render.sections.candidates import candidates_section
from omgoptim.render.sections.comparison import comparison_section
from omgoptim.render.sections.explanation import explanation_section
from omgoptim.render.sections.layers import changed_section, costliest_section
from omgoptim.render.sections.outputs import outputs_section
from omgoptim.render.sections.quantization import quantization_section
from omgoptim.render.sections.run import environment_section, warnings_section
from omgoptim.render.sections.sensitivity import sensitivity_section
from omgoptim.render.sections.steps import steps_section
from omgoptim.render.sections.training import rounds_section, training_section
from omgoptim.reports import EfficiencyReport, Gains, Measurement

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

RESULTS = (
    warnings_section,
    comparison_section,
    outputs_section,
    steps_section,
    quantization_section,
    explanation_section,
    rounds_section,
    training_section,
    sensitivity_section,
    candidates_section,
    costliest_section,
)
DETAILS = (changed_section, environment_section)
"""Sections before and after the next steps and the artifact."""


def report_html(report: EfficiencyReport) -> str:
    """The page: verdict, big numbers, table, candidates and layers as pictures, warnings, next steps, how to repeat."""
    body = "\n".join(
        [
            _header(report),
            _tiles(report),
            *(_section(section(report, True)) for section in RESULTS),
            _next_steps(report),
            _artifact(report),
            *(_section(section(report, True)) for section in DETAILS),
            _repeat(report),
        ]
    )
    title = escape(f"omgoptim {report.verb}: {verdict(report).lower()}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _section(section: Section | None) -> str:
    if section is None:
        return ""
    parts = []
    lines: list[Line] = []
    for one in section.blocks:
        if isinstance(one, Line):
            lines.append(one)
            continue
        parts += [_lines(lines), _block(one, section.title)]
        lines = []
    return _card(section.title, "".join([*parts, _lines(lines)]), section.note, section.kind)


def _card(title: str, body: str, note: str = "", kind: str = "") -> str:
    """A card with its title; `body` is HTML, the other texts are not."""
    small = f" <small>{_text(note, 600)}</small>" if note else ""
    return f'<section class="{kind}"><h2>{_text(title)}{small}</h2>{body}</section>'


def _lines(lines: Sequence[Line]) -> str:
    """Labelled lines as a list of terms; a line without a label goes on with the one before it."""
    if not lines:
        return ""
    parts = []
    for line in lines:
        term = f"<dt>{_text(line.label)}</dt>" if line.label else ""
        head = f'<b class="{line.head.tone}">{_shown(line.head)}</b> ' if line.head else ""
        tone = f' class="{line.text.tone}"' if line.text.tone != "same" else ""
        parts.append(f"{term}<dd{tone}>{head}{_shown(line.text)}</dd>")
    return f"<dl>{''.join(parts)}</dl>"


def _block(one: Block, section: str) -> str:
    """A block as HTML; its title is left out where it is the section's."""
    if isinstance(one, Chart):
        return (f'<p class="note">{_text(one.note)}</p>' if one.note else "") + one.svg
    if isinstance(one, Items):
        items = "".join(f"<li>{_shown(item)}</li>" for item in one.items)
        return f"{_heading(one.title, section)}<ul>{items}</ul>"
    if not isinstance(one, Table):
        return ""
    note = f'<p class="note">{_text(one.note, 500)}</p>' if one.note else ""
    if one.folded:
        return f"<details><summary>{_text(one.title)}</summary>{note}{_table(one)}</details>"
    return f"{_heading(one.title, section)}{note}{_table(one)}"


def _heading(title: str, section: str) -> str:
    return f"<h3>{_text(title)}</h3>" if title and title.lower() != section.lower() else ""


def _table(table: Table) -> str:
    numeric = [column.numeric for column in table.columns]
    head = "".join(f'<th class="{"n" if column.numeric else ""}">{_text(column.name)}</th>' for column in table.columns)
    names = [column.name if column.name in ("drop", "why") else "" for column in table.columns]
    rows = []
    for row in table.rows:
        cells = []
        for cell, right, name in zip(row.cells, numeric, names, strict=True):
            kinds = [*(["n"] if right else []), *([cell.tone] if cell.tone != "same" else []), *filter(None, [name])]
            cells.append(f'<td class="{" ".join(kinds)}">{_shown(cell)}</td>')
        rows.append(f'<tr class="{row.mark}">{"".join(cells)}</tr>')
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _shown(text: Text) -> str:
    shown = _text(text.text, text.limit)
    return f"<code>{shown}</code>" if text.code and shown else shown


def _text(value: str, limit: int = 400) -> str:
    """Text of a model, a log or a library, bounded and escaped."""
    return escape(plain(value, limit))


def _header(report: EfficiencyReport) -> str:
    model = str(report.request.get("model") or " and ".join(str(report.request.get(k, "")) for k in ("a", "b")))
    badge = f'<span class="badge {report.outcome}">{verdict(report)}</span>'
    kicker = f"{badge}<span>{_text(report.verb)}</span><code>{_text(model)}</code><span>{_text(report.run_id)}</span>"
    first, stop, rest = plain(report.summary, 1200).partition(". ")
    lead = f'<p class="lead">{escape(rest)}</p>' if rest else ""
    return f'<header><p class="kicker">{kicker}</p><h1>{escape(first + stop.strip())}</h1>{lead}</header>'


def _tiles(report: EfficiencyReport) -> str:
    two = report.before is not None and report.after is not None
    tiles = _gain_tiles(report) if two else _measured_tiles(report.before or report.after)
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(big: str, label: str, small: str = "", tone: str = "") -> str:
    lines = f'<b class="{tone}">{escape(big)}</b><span>{escape(label)}</span><small>{escape(small)}</small>'
    return f'<div class="tile">{lines}</div>'


def _gain_tiles(report: EfficiencyReport) -> list[str]:
    gains, before, after = report.gains or Gains(), report.before, report.after
    tiles = []
    claim, tone = speed_claim(gains)
    if claim:
        big, _, rest = claim.partition(" ")
        times = _arrow(before, after, lambda m: m.latency_ms_p50, time_text)
        tiles.append(_tile(big.rstrip(","), rest, times, claimed(tone, report)))
    for row in comparison_rows(report):
        if row.label in ("size", "peak memory") and row.gain:
            big, _, rest = row.gain.partition(" ")
            now = size_words(after) if row.label == "size" and after else row.after
            tiles.append(_tile(big, f"{rest} {row.label}".strip(), f"{row.before} → {now}", row.tone))
    if after and after.quality is not None:
        drop, tone = quality_claim(report)
        tiles.append(_tile(f"{after.quality:.4f}", quality_label(after), drop, tone))
    if report.control is not None and report.control.quality is not None and report.control.gain is not None:
        _, tone = control_claim(report.control)
        low, high = report.control.gain_low, report.control.gain_high
        interval = f" ({low:+.4f} to {high:+.4f})" if low is not None and high is not None else ""
        small = f"without the teacher {report.control.quality:.4f}{interval}"
        tiles.append(_tile(f"{report.control.gain:+.4f}", "effect of distillation", small, claimed(tone, report)))
    return tiles


def _measured_tiles(measured: Measurement | None) -> list[str]:
    if measured is None:
        return []
    tiles = []
    if measured.latency_ms_p50 is not None:
        p90 = f"p90 {time_text(measured.latency_ms_p90)}" if measured.latency_ms_p90 is not None else ""
        tiles.append(_tile(time_text(measured.latency_ms_p50), f"latency on {measured.runtime}", p90))
    if measured.size_bytes is not None:
        params = f"{count_text(measured.params)} parameters" if measured.params is not None else ""
        tiles.append(_tile(size_text(measured.size_bytes), "on disk", params))
    if measured.macs is not None:
        tiles.append(_tile(count_text(measured.macs), "MACs per sample", "1 MAC = 2 FLOPs"))
    if measured.quality is not None:
        tiles.append(_tile(f"{measured.quality:.4f}", quality_label(measured)))
    return tiles


def _arrow(
    before: Measurement | None,
    after: Measurement | None,
    pick: Callable[[Measurement], float | None],
    show: Callable[[float], str],
) -> str:
    values = [pick(side) if side else None for side in (before, after)]
    return " → ".join(show(value) for value in values if value is not None)


def _next_steps(report: EfficiencyReport) -> str:
    items = "".join(f"<li>{_text(step.why)}<pre>{_text(step.command, 1500)}</pre></li>" for step in report.next_steps)
    return _card("Next", f"<ul>{items}</ul>") if items else ""


def _artifact(report: EfficiencyReport) -> str:
    artifact = report.artifact
    if artifact is None:
        return ""
    files = ", ".join(f"{_text(name, 80)} ({size_text(size)})" for name, size in artifact.files.items())
    where = f'<p><code>{_text(artifact.path, 600)}</code></p><p class="note">{files}</p>'
    return _card("Artifact", f"{where}<pre>{escape(block(artifact.load))}</pre>")


def _repeat(report: EfficiencyReport) -> str:
    request = escape(json.dumps(report.request, indent=2, ensure_ascii=True)[:8000])
    whole = f"<details><summary>the whole request</summary><pre>{request}</pre></details>"
    return _card("Repeat", f"<pre>{_text(report.repeat, 2000)}</pre>{whole}")
