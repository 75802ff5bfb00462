"""Documents and tables of runs: a run in progress, a list of runs, and several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.render.blocks import Block, Code, Columns, Items, Line, Mark, Section, Table, Text, cells_of, charts
from omgoptim.render.brief import to_json
from omgoptim.render.charts import learning_curve, live_scatter
from omgoptim.render.claims import ComparisonRow, Tone, comparison_rows, speed_undecided, verdict
from omgoptim.render.document import Action, Document, call_text
from omgoptim.render.html import page_html
from omgoptim.render.lists import model_of
from omgoptim.render.numbers import (
    drop_text,
    if_known,
    left_text,
    plain,
    ratio_text,
    size_text,
    stage_text,
    state_text,
    wait_text,
)
from omgoptim.render.shared import section_markdown, without_paths, without_paths_in
from omgoptim.reports import EfficiencyReport, LiveRun, RunState
from omgoptim.text import plural


def live_document(run: LiveRun, project: str) -> Document:
    """Return a running run: its progress, stages, measurements so far, and learning curve."""
    state = run.state
    left = "" if state.eta_s is None else f"about {left_text(state)}"
    ask = call_text("runs", {"action": "cancel", "run_id": state.run_id, "project": project})
    sections = [_measured(run), _training(run), _stages(run)]
    return Document(
        title=stage_text(state),
        lead=left,
        verdict=state.status.upper(),
        tone="running",
        about=(Text(state.verb), Text(state.model, code=True), Text(state.run_id)),
        sections=tuple(section for section in sections if section is not None),
        actions=(Action("Cancel the run", ask, "Cancel it? It can be resumed from its last checkpoint."),),
        progress=state.progress,
        poll=(("action", "show"), ("run_id", state.run_id), ("project", project)),
    )


def runs_document(states: Sequence[RunState], project: str) -> Document:
    """Return the newest runs of a project."""
    columns: Columns = {
        "run": [Text(state.run_id, code=True, limit=100) for state in states],
        "status": [Text(state.outcome or state.status) for state in states],
        "started (UTC)": [state.started[:16].replace("T", " ") for state in states],
        "model": [Text(state.model, code=True, limit=80) for state in states],
        "summary": [Text(state_text(state), limit=300) for state in states],
    }
    table = Table(*cells_of(columns))
    return Document(title=f"Runs in {project}", sections=(Section("Runs", (table,)),) if states else ())


def error_document(error: OmgoptimError, run_id: str | None, status: str) -> Document:
    """Return the document of an error, or of a failed or cancelled run: what happened, why, and what to do."""
    texts = [("why", error.why), ("fix", error.fix)]
    blocks: list[Block] = [Line(label, Text(text, limit=1200)) for label, text in texts if text]
    blocks += [Code(error.log, "its log ends")] if error.log else []
    about = (Text(run_id),) if run_id else ()
    sections = (Section("What to do", tuple(blocks)),) if blocks else ()
    return Document(title=error.what, verdict=status.upper(), tone="failed", about=about, sections=sections)


def ended_document(state: RunState) -> Document:
    """Return the document of a run that has ended, without its report: its status and last message."""
    return Document(title=state_text(state), verdict=state.status.upper(), tone="failed", about=(Text(state.run_id),))


def _stages(run: LiveRun) -> Section | None:
    if not run.stages:
        return None
    columns: Columns = {
        "stage": [Text(stage.name, limit=200) for stage in run.stages],
        "took": [wait_text(stage.seconds) for stage in run.stages],
    }
    return Section("Stages", (Table(*cells_of(columns, numeric=["took"])),), "times so far")


def _measured(run: LiveRun) -> Section | None:
    records = run.steps or run.candidates
    if not records:
        return None
    columns: Columns = {
        "#": [str(number) for number in range(1, len(records) + 1)],
        "name": [Text(one.name, limit=80) for one in records],
        "speedup": [if_known(ratio_text, one.speedup) for one in records],
        "size": [size_text(one.size_bytes) if one.size_bytes else "" for one in records],
        "drop": [if_known(drop_text, one.quality_drop) for one in records],
        "what": [Text(one.why or one.status.replace("_", " "), limit=200) for one in records],
    }
    table = Table(*cells_of(columns, numeric=["speedup", "size", "drop"]))
    picture = live_scatter(records, run.state.verb, run.max_quality_drop)
    title = "Steps so far" if run.steps else "Candidates so far"
    return Section(title, (*charts(picture), table), "from single launches, on the selection samples; preliminary")


def _training(run: LiveRun) -> Section | None:
    if not run.epochs:
        return None
    last = run.epochs[-1]
    quality = "" if last.quality is None else f", quality {last.quality:.4f}"
    loss = "no number" if last.loss is None else f"{last.loss:.4g}"
    text = f"epoch {last.epoch} of round {last.round}: loss {loss}{quality}"
    picture = learning_curve(run.epochs, [], plain(text), ("", ""))
    return Section("Training", (Items("", (Text(text),)), *charts(picture)))


TITLE = "Runs side by side"
NOTE = (
    "Each ratio compares a run's artifact with its own original. Latencies of two runs cannot be divided by each "
    "other: omgoptim compare A B measures two artifacts in alternating turns."
)
_COLUMNS = ("run", "verdict", "model", "artifact", "size", "latency", "quality")
MOST_WARNINGS = 3
"""Warnings of each run that are shown."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run and its report; None where it has none."""

    state: RunState
    report: EfficiencyReport | None


def runs_section(runs: Sequence[Run]) -> Section:
    """Return a table with one row per run, in the order given; a common model or machine is named once."""
    rows = [_cells(run) for run in runs]
    marks: list[Mark] = ["" if run.report else "faded" for run in runs]
    lines = []
    models = list(dict.fromkeys(row["model"].text for row in rows))
    if len(models) == 1:
        rows = [row | {"model": Text("")} for row in rows]
        lines.append(Line("model", Text(models[0], limit=200)))
    machines = list(dict.fromkeys(_machine(run.report) for run in runs if run.report))
    if machines:
        lines.append(Line("machine" if len(machines) == 1 else "machines", Text("; ".join(machines))))
    table = Table(*cells_of({name: [row[name] for row in rows] for name in _COLUMNS}, marks=marks))
    remarks = tuple(Text(f"{run.state.run_id}: {text}", limit=300) for run in runs for text in _remarks(run))
    return Section(TITLE, (table, *lines, *([Items("warnings", remarks)] if remarks else [])), NOTE)


def runs_markdown(runs: Sequence[Run]) -> str:
    """Return the runs as a table of markdown, without paths of the machine."""
    return f"### {TITLE}\n\n{section_markdown(_section(runs), noted=True)}\n"


def runs_json(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the runs as plain JSON values; what was not measured is null."""
    names = ("outcome", "summary", "warnings", "next_steps", "before", "after", "gains")
    each: list[dict[str, Any]] = []
    for run in runs:
        record = to_json(run.report) if run.report else {}
        state: dict[str, Any] = {"run_id": run.state.run_id, "verb": run.state.verb, "status": run.state.status}
        if run.report is None:
            each.append(state | {"summary": run.state.summary, "error": run.state.error})
        else:
            each.append(state | {"verdict": verdict(run.report), **{name: record[name] for name in names}})
    return {"note": NOTE, "runs": each}


def runs_html(runs: Sequence[Run]) -> str:
    """Return the runs as one self-contained page, without paths of the machine."""
    shown = "comparison"  # the kind of section that a page has without scripts too
    table = replace(_section(runs), title=f"{len(runs)} runs", kind=shown, note="")
    return page_html(Document(title=TITLE, lead=NOTE, sections=(table,)), "omgoptim")


def _section(runs: Sequence[Run]) -> Section:
    return runs_section([_without_paths(run) for run in runs])


def _without_paths(run: Run) -> Run:
    texts = {"model": without_paths_in(run.state.model), "summary": without_paths_in(state_text(run.state))}
    return Run(run.state.model_copy(update=texts), run.report and without_paths(run.report))


def _machine(report: EfficiencyReport) -> str:
    """Return `AMD EPYC 9R14, 2 threads`."""
    here = report.environment
    return f"{here.gpu if here.device == 'cuda' and here.gpu else here.cpu}, {plural(here.threads, 'thread')}"


def _remarks(run: Run) -> list[str]:
    if run.report is not None:
        return run.report.warnings[:MOST_WARNINGS]
    return [state_text(run.state)]


def _cells(run: Run) -> dict[str, Text]:
    """Return the cells of a run by column; a column that is empty for every run is left out."""
    report, state = run.report, run.state
    if report is None:
        tone: Tone = "worse" if state.status == "failed" else "same"
        verdict_cell = Text(state.status.upper(), tone=tone)
        texts = (Text(state.run_id, code=True), verdict_cell, Text(state.model, limit=80), *[Text("")] * 4)
        return dict(zip(_COLUMNS, texts, strict=True))
    rows = {row.label.partition(" (")[0]: row for row in comparison_rows(report)}
    size, latency, quality = (
        rows.get(label, ComparisonRow("", "", "")) for label in ("size", "latency p50", "quality")
    )
    if speed_undecided(report):
        latency = ComparisonRow("", "", "", f"undecided: {rows['speed'].gain}", "open")
    model = model_of(report)
    known = report.after or report.before
    texts = (
        Text(state.run_id, code=True),
        Text(verdict(report), tone=_verdict_tone(report)),
        Text(model, limit=80),
        Text(f"{known.runtime} {known.precision}" if known else "", limit=80),
        *(_with_gain(row) for row in (size, latency, quality)),
    )
    return dict(zip(_COLUMNS, texts, strict=True))


def _with_gain(row: ComparisonRow) -> Text:
    """Return `232 kB, 3.84x smaller`."""
    return Text(", ".join(filter(None, (row.after or row.before, row.gain))), tone=row.tone)


def _verdict_tone(report: EfficiencyReport) -> Tone:
    tones: dict[str, Tone] = {"ok": "better", "no_gain": "open", "guard_failed": "worse"}
    return tones[report.outcome] if verdict(report) in ("OK", "NO GAIN", "GUARD FAILED") else "same"
