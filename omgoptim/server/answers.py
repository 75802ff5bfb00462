"""Answers of the tools, as structured content and as text.

Clients show a model one or the other, so each is complete.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mcp.types import CallToolResult, TextContent

from omgoptim.errors import OmgoptimError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import ENDED
from omgoptim.render import brief, markdown, numbers
from omgoptim.render.markdown import code, safe
from omgoptim.reports import DoctorReport, EfficiencyReport, NextStep, RunState
from omgoptim.server.tools import options_of
from omgoptim.text import clean_block, clean_json

Json = dict[str, Any]
Detail = Literal["brief", "full"]

MULTILINE = ("load", "log")
"""Fields of the structured answer with text of several lines."""

LISTED = 10
"""Most runs in a list. Chosen: an answer has about 2,000 tokens."""


def report_answer(report: EfficiencyReport, folder: RunFolder, detail: Detail) -> CallToolResult:
    """Return the answer for a finished run; its next steps are as the tool list has their arguments."""
    make = brief.full_report if detail == "full" else brief.brief_report
    return _result(make(report, folder.path), markdown.report_markdown(report, detail, folder.path))


def unfinished_answer(state: RunState, project: Path, wait_s: float, cap: str | None = None) -> CallToolResult:
    """Return the answer for a run in progress: its stage, and the call that continues to wait.

    `cap` is the warning that the wait was shorter than requested.
    """
    left = "" if state.eta_s is None else f", about {numbers.left_text(state)}"
    summary = f"The run continues: {numbers.stage_text(state)}{left}. Wait for it with the call in next_steps."
    arguments = {"action": "wait", "run_id": state.run_id, "project": str(project), "wait_s": wait_s}
    wait = NextStep(
        tool="runs",
        arguments=arguments,
        command=shlex.join(["omgoptim", "runs", "wait", state.run_id, "--project", str(project)]),
        why="wait for the report",
    )
    content = _head(state.status, summary) | {
        "warnings": [cap] if cap else [],
        "next_steps": [brief.to_json(wait)],
        "run_id": state.run_id,
        "verb": state.verb,
        "stage": numbers.stage_text(state),
        "progress": state.progress,
        "eta_s": state.eta_s,
    }
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    warning = f"\nWarning: {safe(cap)}." if cap else ""
    text = f"{markdown.state_markdown(state)}\n{safe(summary)}{warning}\nNext: {code(f'runs({call})', 800)}"
    return _result(content, text)


def cancelled_answer(state: RunState) -> CallToolResult:
    """Return the answer to a cancellation."""
    ended = {
        "cancelled": f"Run {state.run_id} is cancelled.",
        "done": f"Run {state.run_id} had already ended; its report is available.",
    }
    summary = ended.get(state.status, f"Run {state.run_id} had already ended: {state.status}.")
    return _result(_head(state.status, summary) | {"run_id": state.run_id}, safe(summary))


def runs_answer(states: Sequence[RunState], project: Path) -> CallToolResult:
    """Return the answer with the newest runs of a project."""
    shown = states[:LISTED]
    going = sum(state.status not in ENDED for state in states)
    summary = f"{len(states)} runs in {project}, {going} still active." if states else f"No runs yet in {project}."
    content = _head("ok", summary) | {"runs": [_listed(state) for state in shown]}
    return _result(content, f"{safe(summary, 400)}\n{markdown.runs_markdown(list(shown), len(states))}")


def doctor_answer(report: DoctorReport) -> CallToolResult:
    """Return the answer of the tool doctor."""
    return _result(brief.to_json(report), markdown.doctor_markdown(report))


def error_answer(error: OmgoptimError, run_id: str | None = None) -> CallToolResult:
    """Return an error or a failed run as a tool result, as text and as structured content."""
    content: Json = {"error": error.to_dict()} | ({"run_id": run_id} if run_id else {})
    return _result(content, markdown.error_markdown(error), is_error=True)


def with_listed_options(report: EfficiencyReport) -> EfficiencyReport:
    """Return a report whose next steps have rare arguments in `options`, as the tool list has them."""
    return report.model_copy(update={"next_steps": [_as_listed(step) for step in report.next_steps]})


def _as_listed(step: NextStep) -> NextStep:
    """Return a next step with its rare arguments in `options`."""
    rare = {name: value for name, value in step.arguments.items() if name in options_of(step.tool)}
    if not rare:
        return step
    arguments = {name: value for name, value in step.arguments.items() if name not in rare}
    return step.model_copy(update={"arguments": arguments | {"options": rare}})


def _head(status: str, summary: str) -> Json:
    """Return the fields that every answer without a report begins with."""
    return {"status": status, "summary": summary, "warnings": [], "next_steps": []}


def _listed(state: RunState) -> Json:
    names = ("run_id", "verb", "status", "outcome", "started", "progress", "eta_s")
    fields = {name: value for name in names if (value := getattr(state, name)) is not None}
    if state.status not in ENDED:
        fields["stage"] = numbers.stage_text(state)
    return fields | {"model": numbers.plain(state.model, 120), "summary": numbers.plain(state.summary or "", 200)}


def _result(content: Json, text: str, is_error: bool = False) -> CallToolResult:
    """Return an answer as a tool result, all texts stripped of hidden characters."""
    return CallToolResult(
        content=[TextContent(type="text", text=clean_block(text, markdown.MAX_FULL))],
        structured_content=clean_json(content, MULTILINE),
        is_error=is_error,
    )
