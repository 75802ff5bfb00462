"""The steps of a run that reaches for a goal: what was tried, what it brought, and what the result builds on."""

from __future__ import annotations

from omgoptim.render.blocks import Section, Text, table_of
from omgoptim.render.claims import Tone
from omgoptim.render.numbers import drop_text, ratio_text, size_text, wait_text
from omgoptim.reports import EfficiencyReport, Step


def steps_section(report: EfficiencyReport, full: bool) -> Section | None:
    """In the order in which they were taken; those that the result was made by stand out."""
    steps = report.steps
    if not steps:
        return None
    table = table_of(
        {
            "step": [Text(step.name, limit=80) for step in steps],
            "from": [Text(step.parent or "", limit=80) for step in steps],
            "status": [Text(step.status.replace("_", " "), tone=_tone(step)) for step in steps],
            "speedup": ["" if step.speedup is None else ratio_text(step.speedup) for step in steps],
            "expected": ["" if step.expected_speedup is None else ratio_text(step.expected_speedup) for step in steps],
            "size": ["" if not step.size_bytes else size_text(step.size_bytes) for step in steps],
            "drop": ["" if step.quality_drop is None else drop_text(step.quality_drop) for step in steps],
            "took": ["" if step.seconds is None else wait_text(step.seconds) for step in steps],
            "why": [Text(step.why, limit=400 if full else 120) for step in steps],
            "run": [Text(step.run_id or "", code=True, limit=60) if full else "" for step in steps],
        },
        numeric=["speedup", "expected", "size", "drop", "took"],
        marks=["chosen" if step.status == "kept" else "" for step in steps],
        title="steps",
        note="speedup and drop against the original, from single launches and on the selection samples",
    )
    return Section("Steps", (table,))


def _tone(step: Step) -> Tone:
    return "better" if step.status == "kept" else "worse" if step.status == "failed" else "same"
