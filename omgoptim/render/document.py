"""A report as the document that the page shows: head, tiles and sections as data, bounded; `view/report.js` draws it.

One document has two ways to a reader: inline in report.html, and in the `_meta` of a tool's answer for a page that is
shown in a chat.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

from omgoptim.render.blocks import (
    Block,
    Chain,
    Code,
    Curve,
    Items,
    Line,
    Row,
    Scatter,
    Section,
    Strip,
    Table,
    Text,
)
from omgoptim.render.claims import (
    Tone,
    claimed,
    comparison_rows,
    control_claim,
    packed_size_text,
    quality_claim,
    quality_label,
    speed_claim,
    verdict,
)
from omgoptim.render.lists import model_of
from omgoptim.render.numbers import count_text, plain, size_text, time_text
from omgoptim.render.sections.candidates import candidates_section, steps_section
from omgoptim.render.sections.layers import changed_section, costliest_section, sensitivity_section
from omgoptim.render.sections.quantization import explanation_section, quantization_section
from omgoptim.render.sections.results import comparison_section, environment_section, outputs_section, warnings_section
from omgoptim.render.sections.training import rounds_section, training_section
from omgoptim.reports import EfficiencyReport, Gains, Measurement, NextStep
from omgoptim.text import clean_block, clean_exact

Json = dict[str, Any]

LARGEST = 140_000
"""Bytes of a document in report.html."""

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

_CUTS = ((4000, 4000), (400, 4000), (100, 2000), (40, 1000), (40, 400), (20, 200), (20, 100), (8, 40), (4, 12), (1, 4))
"""Most rows of folded tables and of all other lists, from the longest form to the shortest."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A big number."""

    big: str
    label: str
    small: str = ""
    tone: Tone = "same"


@dataclass(frozen=True, slots=True)
class Action:
    """A button of a page in a chat: it puts `message` to the assistant."""

    label: str
    message: str
    confirm: str = ""
    """Question of the confirmation dialog; empty for none."""


@dataclass(frozen=True, slots=True)
class Document:
    """Content of a page, from top to bottom."""

    title: str
    lead: str = ""
    verdict: str = ""
    tone: str = "same"
    """ok, no_gain, guard_failed, running or failed."""
    about: tuple[Text, ...] = ()
    """Verb, model and run."""
    tiles: tuple[Tile, ...] = ()
    sections: tuple[Section, ...] = ()
    actions: tuple[Action, ...] = ()
    progress: float | None = None
    """Fraction done of a running run, 0..1."""
    poll: tuple[tuple[str, str], ...] = ()
    """Arguments of the call that polls a running run; empty once it has ended."""


def report_document(
    report: EfficiencyReport, actions: Sequence[Action] = (), ask: Callable[[NextStep], str] | None = None
) -> Document:
    """Return a finished run as a document.

    Args:
        report: of a finished run.
        actions: buttons of a page in a chat.
        ask: message that asks an assistant for a next step; None for a page outside of a chat.
    """
    first, stop, rest = report.summary.partition(". ")
    two = report.before is not None and report.after is not None
    tiles = _gain_tiles(report) if two else _measured_tiles(report.before or report.after)
    sections = [
        *(section(report, True) for section in RESULTS),
        _next_steps(report, ask),
        _artifact(report),
        *(section(report, True) for section in DETAILS),
        _repeat(report),
    ]
    return Document(
        title=first + stop.strip(),
        lead=rest,
        verdict=verdict(report),
        tone=report.outcome,
        about=(Text(report.verb), Text(model_of(report), code=True), Text(report.run_id)),
        tiles=tuple(tiles),
        sections=tuple(section for section in sections if section is not None),
        actions=tuple(actions),
    )


def call_text(tool: str, arguments: Json) -> str:
    """Return the message that asks an assistant for a call of a tool."""
    return f"Call the tool {tool} of omgoptim with {json.dumps(arguments, ensure_ascii=False)}"


def document_json(document: Document, limit: int = LARGEST) -> str:
    """Return a document as JSON of at most `limit` bytes that may stand in a script element.

    Texts are cleaned; NaN and infinite numbers become null; lists that are too long are cut, with the number
    of entries left out.
    """
    for folded, others in _CUTS:
        text = json.dumps(_plain(document, (folded, others)), ensure_ascii=False, separators=(",", ":"))
        for character in "<>&\u2028\u2029":
            text = text.replace(character, f"\\u{ord(character):04x}")
        if len(text.encode()) <= limit:
            break
    return text


def _plain(value: Any, most: tuple[int, int]) -> Any:
    """Return plain JSON values of a block or its parts; defaults are left out."""
    if isinstance(value, str):
        return plain(value, 1200)
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(item, most) for item in value]
    if isinstance(value, Text):
        text = plain(value.text, value.limit)
        tone = {"tone": value.tone} if value.tone != "same" else {}
        return {"text": text, **tone, **({"code": 1} if value.code else {})} if tone or (value.code and text) else text
    if isinstance(value, Row):
        cells = [_plain(cell, most) for cell in value.cells]
        return {"mark": value.mark, "cells": cells} if value.mark else cells
    if isinstance(value, Code):
        ask = {"ask": clean_exact(value.ask)} if value.ask else {}
        return {"type": "code", **_fields(value, most), **ask, "text": clean_block(value.text, 8000)}
    if isinstance(value, Action):
        return {**_fields(value, most), "message": clean_exact(value.message)}
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__.lower(), **_fields(_cut(value, most), most)}
    return value


def _cut(value: Any, most: tuple[int, int]) -> Any:
    """Return a table, list or drawing with its first entries, a curve with its last."""
    folded, others = most
    if isinstance(value, Table):
        keep = folded if value.folded else others
        more = value.left_out + max(0, len(value.rows) - keep)
        return replace(value, rows=value.rows[:keep], left_out=more)
    if isinstance(value, Items):
        return replace(value, items=value.items[:others], left_out=value.left_out + max(0, len(value.items) - others))
    if isinstance(value, Strip) and len(value.layers) > 3 * others:
        return Strip(f"{value.title}, here are the first {3 * others}", value.layers[: 3 * others])
    if isinstance(value, Scatter):
        return replace(value, points=value.points[:others], front=value.front[:others])
    if isinstance(value, Chain):
        return Chain(value.title, value.links[:others])
    if isinstance(value, Curve) and (gone := len(value.values) - others) > 0:
        kept = tuple(place - gone for place in value.kept if place >= gone)
        return replace(value, values=value.values[gone:], rounds=value.rounds[gone:], kept=kept)
    return value


def _fields(value: Any, most: tuple[int, int]) -> Json:
    given = ((field, getattr(value, field.name)) for field in fields(value))
    kept = (
        (field.name, item) for field, item in given if item != (None if field.default is MISSING else field.default)
    )
    return {name: _plain(item, most) for name, item in kept}


def _gain_tiles(report: EfficiencyReport) -> list[Tile]:
    gains, before, after = report.gains or Gains(), report.before, report.after
    tiles = []
    claim, tone = speed_claim(gains)
    if claim:
        big, _, rest = claim.partition(" ")
        times = [side.latency_ms_p50 for side in (before, after) if side]
        arrow = " → ".join(time_text(value) for value in times if value is not None)
        tiles.append(Tile(big.rstrip(","), rest, arrow, claimed(tone, report)))
    for row in comparison_rows(report):
        if row.label in ("size", "peak memory") and row.gain:
            big, _, rest = row.gain.partition(" ")
            now = packed_size_text(after) if row.label == "size" and after else row.after
            tiles.append(Tile(big, f"{rest} {row.label}".strip(), f"{row.before} → {now}", row.tone))
    if after and after.quality is not None:
        drop, tone = quality_claim(report)
        tiles.append(Tile(f"{after.quality:.4f}", quality_label(after), drop, tone))
    if report.control is not None and report.control.quality is not None and report.control.gain is not None:
        _, tone = control_claim(report.control)
        low, high = report.control.gain_low, report.control.gain_high
        interval = f" ({low:+.4f} to {high:+.4f})" if low is not None and high is not None else ""
        small = f"without the teacher {report.control.quality:.4f}{interval}"
        tiles.append(Tile(f"{report.control.gain:+.4f}", "effect of distillation", small, claimed(tone, report)))
    return tiles


def _measured_tiles(measured: Measurement | None) -> list[Tile]:
    if measured is None:
        return []
    tiles = []
    if measured.latency_ms_p50 is not None:
        p90 = f"p90 {time_text(measured.latency_ms_p90)}" if measured.latency_ms_p90 is not None else ""
        tiles.append(Tile(time_text(measured.latency_ms_p50), f"latency on {measured.runtime}", p90))
    if measured.size_bytes is not None:
        params = f"{count_text(measured.params)} parameters" if measured.params is not None else ""
        tiles.append(Tile(size_text(measured.size_bytes), "on disk", params))
    if measured.macs is not None:
        tiles.append(Tile(count_text(measured.macs), "MACs per sample", "1 MAC = 2 FLOPs"))
    if measured.quality is not None:
        tiles.append(Tile(f"{measured.quality:.4f}", quality_label(measured)))
    return tiles


def _next_steps(report: EfficiencyReport, ask: Callable[[NextStep], str] | None) -> Section | None:
    blocks = [Code(step.command, step.why, ask=ask(step) if ask else "") for step in report.next_steps[:8]]
    return Section("Next", tuple(blocks), kind="next") if blocks else None


def _artifact(report: EfficiencyReport) -> Section | None:
    artifact = report.artifact
    if artifact is None:
        return None
    files = ", ".join(f"{plain(name, 80)} ({size_text(size)})" for name, size in list(artifact.files.items())[:40])
    blocks: list[Block] = [Line("folder", Text(artifact.path, code=True, limit=600)), Line("files", Text(files))]
    return Section("Artifact", (*blocks, *([Code(artifact.load)] if artifact.load else [])))


def _repeat(report: EfficiencyReport) -> Section | None:
    if not report.repeat:
        return None
    request = json.dumps(report.request, indent=2, ensure_ascii=True)
    return Section("Repeat", (Code(report.repeat), Code(request, "the whole request", folded=True)))
