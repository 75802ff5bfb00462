"""The steps of a run that reaches for a goal: what was tried, what it brought, and what the result builds on."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from omgoptim.render.blocks import Block, Chart, Section, Text, table_of
from omgoptim.render.charts import expected_bars, step_chain, step_scatter
from omgoptim.render.claims import Tone
from omgoptim.render.numbers import drop_text, ratio_text, size_text, wait_text
from omgoptim.reports import EfficiencyReport, Step


def steps_section(report: EfficiencyReport, full: bool) -> Section | None:
    """In the order in which they were taken; those that the result was made by stand out."""
    steps = report.steps
    if not steps:
        return None
    picture = step_scatter(report)
    front = ["yes" if step.on_front else "" for step in steps]
    table = table_of(
        {
            "#": [str(number) if picture and full else "" for number in range(1, len(steps) + 1)],
            "step": [Text(step.name, limit=80) for step in steps],
            "from": [Text(step.parent or "", limit=80) for step in steps],
            "status": [Text(step.status.replace("_", " "), tone=_tone(step)) for step in steps],
            "speedup": ["" if step.speedup is None else ratio_text(step.speedup) for step in steps],
            "expected": ["" if step.expected_speedup is None else ratio_text(step.expected_speedup) for step in steps],
            "size": ["" if not step.size_bytes else size_text(step.size_bytes) for step in steps],
            "drop": ["" if step.quality_drop is None else drop_text(step.quality_drop) for step in steps],
            "front": front,
            "took": ["" if step.seconds is None else wait_text(step.seconds) for step in steps],
            "takes about": [
                "" if step.expected_seconds is None else wait_text(step.expected_seconds) for step in steps
            ],
            "why": [Text(step.why, limit=400 if full else 120) for step in steps],
            "run": [Text(step.run_id or "", code=True, limit=60) if full else "" for step in steps],
        },
        numeric=["speedup", "expected", "size", "drop", "took", "takes about"],
        marks=["chosen" if step.status == "kept" else "" for step in steps],
        title="steps",
        note=_note(steps),
    )
    expected = expected_bars(report)
    charts: list[Block] = [Chart(step_chain(report))] if len(steps) > 1 else []
    charts += [Chart(drawing) for drawing in (picture, expected) if drawing is not None]
    return Section("Steps", (*charts, table))


def expectation_error(steps: Sequence[Step]) -> float | None:
    """Return the median of |expected / measured - 1| over the steps with both speedups; None without any."""
    errors = [abs(step.expected_speedup / step.speedup - 1) for step in steps if step.expected_speedup and step.speedup]
    return statistics.median(errors) if errors else None


def _note(steps: Sequence[Step]) -> str:
    if all(step.speedup is None and step.quality_drop is None for step in steps):
        return ""
    note = "speedup and drop against the original, from single launches and on the selection samples; "
    note += "front: no other step is as fast, as small and as good at once"
    error = expectation_error(steps)
    return note if error is None else f"{note}; expected speedups were {error:.0%} off in the median"


def _tone(step: Step) -> Tone:
    return "better" if step.status == "kept" else "worse" if step.status == "failed" else "same"
