"""A run that goes on, and the runs of a project, as documents of the page."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.errors import OmgoptimError
from omgoptim.render.blocks import Block, Chart, Code, Columns, Items, Line, Section, Text, table_of
from omgoptim.render.charts import live_scatter
from omgoptim.render.curves import learning_curve
from omgoptim.render.document import Action, Document, call_text
from omgoptim.render.numbers import drop_text, plain, progress_text, ratio_text, size_text, stage_text, wait_text
from omgoptim.reports import LiveRun, RunState


def live_document(run: LiveRun, project: str) -> Document:
    """Return a run that goes on: where it stands, its stages, what it has measured, and how it learns."""
    state = run.state
    left = "" if state.eta_s is None else f"about {wait_text(state.eta_s)} left"
    ask = call_text("runs", {"action": "cancel", "run_id": state.run_id, "project": project})
    sections = [_measured(run), _training(run), _stages(run)]
    return Document(
        title=stage_text(state),
        lead=left,
        verdict=state.status.upper(),
        tone="running",
        about=(Text(state.verb), Text(state.model, code=True), Text(state.run_id)),
        sections=tuple(section for section in sections if section is not None),
        actions=(Action("Cancel the run", ask, "Cancel it? What it has computed is lost."),),
        progress=state.progress,
        poll=(("action", "show"), ("run_id", state.run_id), ("project", project)),
    )


def runs_document(states: Sequence[RunState], project: str) -> Document:
    """Return the newest runs of a project."""
    table = table_of(
        {
            "run": [Text(state.run_id, code=True, limit=100) for state in states],
            "status": [Text(state.outcome or state.status) for state in states],
            "started (UTC)": [state.started[:16].replace("T", " ") for state in states],
            "model": [Text(state.model, code=True, limit=80) for state in states],
            "summary": [Text(_said(state), limit=300) for state in states],
        }
    )
    return Document(title=f"Runs in {project}", sections=(Section("Runs", (table,)),) if states else ())


def error_document(error: OmgoptimError, run_id: str | None, status: str) -> Document:
    """Return a refusal or a run that failed or was cancelled: what happened, why, and what to do."""
    texts = [("why", error.why), ("fix", error.fix)]
    blocks: list[Block] = [Line(label, Text(text, limit=1200)) for label, text in texts if text]
    blocks += [Code(error.log, "its log ends")] if error.log else []
    about = (Text(run_id),) if run_id else ()
    sections = (Section("What to do", tuple(blocks)),) if blocks else ()
    return Document(title=error.what, verdict=status.upper(), tone="failed", about=about, sections=sections)


def ended_document(state: RunState) -> Document:
    """Return a run that has ended without looking at its report: its status and what it said last."""
    return Document(title=_said(state), verdict=state.status.upper(), tone="failed", about=(Text(state.run_id),))


def _said(state: RunState) -> str:
    return state.summary or (state.error or {}).get("what", "") or progress_text(state)


def _stages(run: LiveRun) -> Section | None:
    if not run.stages:
        return None
    columns: Columns = {
        "stage": [Text(stage.name, limit=200) for stage in run.stages],
        "took": [wait_text(stage.seconds) for stage in run.stages],
    }
    return Section("Stages", (table_of(columns, numeric=["took"]),), "times so far")


def _measured(run: LiveRun) -> Section | None:
    records = run.steps or run.candidates
    if not records:
        return None
    table = table_of(
        {
            "#": [str(number) for number in range(1, len(records) + 1)],
            "name": [Text(one.name, limit=80) for one in records],
            "speedup": ["" if one.speedup is None else ratio_text(one.speedup) for one in records],
            "size": [size_text(one.size_bytes) if one.size_bytes else "" for one in records],
            "drop": ["" if one.quality_drop is None else drop_text(one.quality_drop) for one in records],
            "what": [Text(one.why or one.status.replace("_", " "), limit=200) for one in records],
        },
        numeric=["speedup", "size", "drop"],
    )
    picture = live_scatter(records, run.state.verb, run.max_quality_drop)
    charts = (Chart(picture),) if picture else ()
    title = "Steps so far" if run.steps else "Candidates so far"
    return Section(title, (*charts, table), "from single launches, on the selection samples; nothing is decided yet")


def _training(run: LiveRun) -> Section | None:
    if not run.epochs:
        return None
    last = run.epochs[-1]
    quality = "" if last.quality is None else f", quality {last.quality:.4f}"
    loss = "no number" if last.loss is None else f"{last.loss:.4g}"
    text = f"epoch {last.epoch} of round {last.round}: loss {loss}{quality}"
    picture = learning_curve(run.epochs, [], plain(text), ("", ""))
    blocks = (Chart(picture),) if picture else ()
    return Section("Training", (Items("", (Text(text),)), *blocks))
