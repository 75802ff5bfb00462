"""The candidates of a run, with what was measured of each and why it was chosen or not."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Chart, Columns, Mark, Section, Text, table_of
from omgoptim.render.charts import candidate_scatter
from omgoptim.render.claims import Tone
from omgoptim.render.lists import ranked_candidates
from omgoptim.render.numbers import drop_text, ratio_text, size_text
from omgoptim.reports import Candidate, EfficiencyReport

BRIEF = 8
"""Candidates that the short form shows."""


def candidates_section(report: EfficiencyReport, full: bool) -> Section | None:
    """The chosen one first, then finalists, then the others."""
    candidates = ranked_candidates(report)
    if not candidates:
        return None
    shown = candidates if full else candidates[:BRIEF]
    picture = candidate_scatter(report)
    columns: Columns = {
        "#": [str(number) if picture and full else "" for number in range(1, len(shown) + 1)],
        "candidate": [Text(one.name, limit=60) for one in shown],
        "status": [Text(one.status, tone=_tone(one, report)) for one in shown],
        "speedup": ["" if one.speedup is None else ratio_text(one.speedup) for one in shown],
        "size": ["" if one.size_bytes is None else size_text(one.size_bytes) for one in shown],
        "drop": ["" if one.quality_drop is None else drop_text(one.quality_drop) for one in shown],
        "why": [Text(one.why, limit=400 if full else 160) for one in shown],
    }
    numeric = ["speedup", "size", "drop"]
    left_out = len(candidates) - len(shown)
    marks = [_mark(one) for one in shown]
    table = table_of(columns, numeric=numeric, marks=marks, title="candidates", left_out=left_out)
    trial = ", after a short trial" if report.verb == "distill" else ""
    note = f"quality on the selection split{trial}" if picture else ""
    blocks: tuple[Block, ...] = (Chart(picture), table) if picture else (table,)
    return Section("Candidates", blocks, note)


def _mark(one: Candidate) -> Mark:
    if one.status == "chosen":
        return "chosen"
    return "faded" if one.status in ("dropped", "failed", "skipped") else ""


def _tone(one: Candidate, report: EfficiencyReport) -> Tone:
    if one.status == "chosen" and report.outcome == "ok":
        return "better"
    return "worse" if one.status == "failed" else "same"
