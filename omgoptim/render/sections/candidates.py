"""Candidates of a run, and the steps of a chain, with measurements and reasons."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from omgoptim.render.blocks import Columns, Mark, Section, Table, Text, cells_of, charts
from omgoptim.render.charts import candidate_scatter, expected_bars, step_chain, step_scatter
from omgoptim.render.claims import Tone
from omgoptim.render.lists import ranked_candidates
from omgoptim.render.numbers import drop_text, if_known, ratio_text, size_text, wait_text
from omgoptim.reports import Candidate, EfficiencyReport, Step

BRIEF = 8
"""Candidates that the short form shows. Chosen: what fits a screen."""


def candidates_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Return the candidates: the chosen one, then finalists, then the others."""
    candidates = ranked_candidates(report)
    if not candidates:
        return None
    shown = candidates if full else candidates[:BRIEF]
    picture = candidate_scatter(report)
    columns: Columns = {
        "#": [str(number) if picture and full else "" for number in range(1, len(shown) + 1)],
        "candidate": [Text(one.name, limit=60) for one in shown],
        "status": [Text(one.status, tone=_tone(one, report)) for one in shown],
        "speedup": [if_known(ratio_text, one.speedup) for one in shown],
        "size": [if_known(size_text, one.size_bytes) for one in shown],
        "drop": [if_known(drop_text, one.quality_drop) for one in shown],
        "why": [Text(one.why, limit=400 if full else 160) for one in shown],
    }
    numeric = ["speedup", "size", "drop"]
    left_out = len(candidates) - len(shown)
    marks = [_mark(one) for one in shown]
    table = Table(*cells_of(columns, numeric=numeric, marks=marks), title="candidates", left_out=left_out)
    trial = ", after a short trial" if report.verb == "distill" else ""
    note = f"quality on the selection split{trial}" if picture else ""
    return Section("Candidates", (*charts(picture), table), note)


def _mark(one: Candidate) -> Mark:
    if one.status == "chosen":
        return "chosen"
    return "faded" if one.status in ("dropped", "failed", "skipped") else ""


def _tone(one: Candidate, report: EfficiencyReport) -> Tone:
    if one.status == "chosen" and report.outcome == "ok":
        return "better"
    return "worse" if one.status == "failed" else "same"


def steps_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Return the steps in order, those of the result highlighted."""
    steps = report.steps
    if not steps:
        return None
    picture = step_scatter(report)
    front = ["yes" if step.on_front else "" for step in steps]
    columns: Columns = {
        "#": [str(number) if picture and full else "" for number in range(1, len(steps) + 1)],
        "step": [Text(step.name, limit=80) for step in steps],
        "from": [Text(step.parent or "", limit=80) for step in steps],
        "status": [Text(step.status.replace("_", " "), tone=_step_tone(step)) for step in steps],
        "speedup": [if_known(ratio_text, step.speedup) for step in steps],
        "expected": [if_known(ratio_text, step.expected_speedup) for step in steps],
        "size": ["" if not step.size_bytes else size_text(step.size_bytes) for step in steps],
        "drop": [if_known(drop_text, step.quality_drop) for step in steps],
        "front": front,
        "took": [if_known(wait_text, step.seconds) for step in steps],
        "expected time": [if_known(wait_text, step.expected_seconds) for step in steps],
        "why": [Text(step.why, limit=400 if full else 120) for step in steps],
        "run": [Text(step.run_id or "", code=True, limit=60) if full else "" for step in steps],
    }
    table = Table(
        *cells_of(
            columns,
            numeric=["speedup", "expected", "size", "drop", "took", "expected time"],
            marks=["chosen" if step.status == "kept" else "" for step in steps],
        ),
        title="steps",
        note=_steps_note(steps),
    )
    chain = step_chain(report) if len(steps) > 1 else None
    return Section("Steps", (*charts(chain, picture, expected_bars(report)), table))


def expectation_error(steps: Sequence[Step]) -> float | None:
    """Return the median of |expected / measured - 1| over the steps with both speedups; None without any."""
    errors = [abs(step.expected_speedup / step.speedup - 1) for step in steps if step.expected_speedup and step.speedup]
    return statistics.median(errors) if errors else None


def _steps_note(steps: Sequence[Step]) -> str:
    if all(step.speedup is None and step.quality_drop is None for step in steps):
        return ""
    note = "speedup and drop against the original, from single launches and on the selection samples; "
    note += "front: on the Pareto front of speed, size and quality"
    error = expectation_error(steps)
    return note if error is None else f"{note}; median error of the expected speedups: {error:.0%}"


def _step_tone(step: Step) -> Tone:
    return "better" if step.status == "kept" else "worse" if step.status == "failed" else "same"
