"""A report as markdown for an agent: the same facts as the structured answer, complete on its own.

Text that comes from a model, a log or a data set is put on one line, bounded, and stripped of what could close a
code span or hide: control characters and backticks (and pipes in a table).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from omgoptim.errors import OmgoptimError
from omgoptim.render import arms, facts, rounds
from omgoptim.render.markdown_parts import bulleted as _bulleted
from omgoptim.render.markdown_parts import cell as _cell
from omgoptim.render.markdown_parts import code, safe
from omgoptim.render.markdown_precision import coverage_lines, explanation_lines, precision_lines
from omgoptim.render.outputs import outputs_lines
from omgoptim.reports import DoctorReport, EfficiencyReport, RunState
from omgoptim.text import LONGEST_LINE

Detail = Literal["brief", "full"]

MAX_BRIEF = 8_000
"""Characters of the brief form, about 2,000 tokens."""

MAX_FULL = 40_000
"""Characters of the full form, about 10,000 tokens."""


def report_markdown(report: EfficiencyReport, detail: Detail = "brief", folder: Path | None = None) -> str:
    """The report for an agent. `folder` is the run's folder, to say where report.json and report.html are."""
    full = detail == "full"
    sections = [
        [f"**{facts.verdict(report)}** {safe(report.summary, 1200)}"],
        _bulleted("Warnings", [safe(text, 300) for text in report.warnings], 50 if full else 6),
        _comparison(report),
        outputs_lines(report, full),
        coverage_lines(report),
        _next_steps(report),
        _places(report, folder),
        _rounds(report, 100 if full else 8),
        _training(report),
        _sensitivity(report, full),
        explanation_lines(report, 100 if full else 4),
        _candidates(report, 100 if full else 6),
        _layers(report, 100 if full else 6),
        _bulleted(
            f"{facts.changed_title(report).capitalize()} ({len(facts.changed_paths(report))} layers)",
            _changes(report),
            200 if full else 3,
        ),
        _skipped(report, 50 if full else 3, 20 if full else 2),
        precision_lines(report, 200) if full else [],
        _environment(report) if full else [],
        [f"Repeat: {code(report.repeat, 600)}"],
    ]
    text = "\n\n".join("\n".join(lines) for lines in sections if lines)
    limit = MAX_FULL if full else MAX_BRIEF
    if len(text) <= limit:
        return text
    whole_lines = text[: limit - 40].rpartition("\n")[0]  # a cut line might leave a code span open
    return f"{whole_lines.rstrip()}\n… cut; the rest is in report.json"


def state_markdown(state: RunState) -> str:
    """A run without a report: where it stands, or how it ended."""
    head = f"**{state.status.upper()}** run {code(state.run_id)} ({safe(state.verb)})"
    if state.error:
        log = code(f"{state.folder}/log.txt", 300)
        return f"{head}\n{error_markdown(OmgoptimError.from_dict(state.error))}\nLog: {log}"
    if state.status in ("starting", "queued", "running"):
        return f"{head}: {safe(facts.progress_text(state))}"
    return f"{head}: {safe(state.summary or '')}\nFolder: {code(state.folder, 300)}"


def runs_markdown(states: list[RunState], total: int) -> str:
    """The newest runs of a project, one line each."""
    if not states:
        return "No runs yet in this project."
    lines = []
    for state in states:
        what = state.summary or (state.error or {}).get("what", "") or facts.progress_text(state)
        model = f" {safe(state.model, 60)}" if state.model else ""
        lines.append(f"- {code(state.run_id)} {safe(state.outcome or state.status, 40)}{model}: {safe(what, 140)}")
    more = [f"… {total - len(states)} older ones in .omgoptim/runs"] if total > len(states) else []
    return "\n".join(lines + more)


def doctor_markdown(report: DoctorReport) -> str:
    """What this machine and the project's Python can do, and what to install for the rest."""
    features = f" ({safe(', '.join(report.cpu_features), 400)})" if report.cpu_features else ""
    lines = [
        f"**{report.outcome.upper()}** {safe(report.summary, 600)}",
        "",
        f"- python: {code(report.python)} {safe(report.python_version)}, {safe(report.python_found_by)}",
        f"- cpu: {safe(report.cpu)}, {report.cores} cores{features}; gpu: {safe(report.gpu or 'none')}",
        f"- project: {code(report.project)}",
    ]
    for package in (*report.runtimes, *report.extras):
        version = f" {safe(package.version, 40)}" if package.version else ""
        fix = f"; {code(package.fix)}" if package.fix else ""
        lines.append(f"- {safe(package.name, 60)}{version}: {package.state} ({safe(package.unlocks, 120)}){fix}")
    return "\n".join([*lines, "", f"MCP entry: {code(json.dumps(report.mcp_entry), 2000)}"])


def error_markdown(error: OmgoptimError) -> str:
    """What happened, why, and what to do next."""
    parts = [("Error", error.what), ("Why", error.why), ("Fix", error.fix)]
    lines = [f"{name}: {safe(text, LONGEST_LINE)}" for name, text in parts if text]
    log = [f"  | {code(line, 300)}" for line in error.log.splitlines() if line.strip()]
    return "\n".join([*lines, *(["Its log ends:", *log] if log else [])])


def _comparison(report: EfficiencyReport) -> list[str]:
    rows = facts.comparison_rows(report)
    if not rows:
        return []
    if report.before is None or report.after is None:
        title = _cell(facts.side_title("measured", report.before or report.after))
        return [f"| | {title} |", "| --- | --- |", *(f"| {_cell(r.label)} | {r.before or r.after} |" for r in rows)]
    names = facts.sides(report)
    sides = (report.before, report.after)
    titles = [_cell(facts.side_title(name, side)) for name, side in zip(names, sides, strict=True)]
    head = [f"| | {titles[0]} | {titles[1]} | gain |", "| --- | --- | --- | --- |"]
    table = head + [f"| {_cell(r.label)} | {r.before} | {r.after} | {r.gain} |" for r in rows]
    if report.total is None:
        return table
    first = f"Since the original of run {code(report.total.from_run, 80)}"
    return [*table, "", f"{first}: {safe(facts.total_text(report.total), 300)}"]


def _next_steps(report: EfficiencyReport) -> list[str]:
    if not report.next_steps:
        return []
    lines = ["Next:"]
    for step in report.next_steps[:4]:
        call = json.dumps(step.arguments, ensure_ascii=False)
        lines.append(f"- {safe(step.why)}: tool {code(step.tool)} with {code(call, 800)}, or {code(step.command, 800)}")
    return lines


def _places(report: EfficiencyReport, folder: Path | None) -> list[str]:
    lines = [f"Run: {code(report.run_id)}"]
    if report.artifact:
        load = next(iter(report.artifact.load.splitlines()), "")  # further lines are other ways
        lines.append(f"Artifact: {code(report.artifact.path, 400)}; open it with {code(load, 400)}")
    if files := facts.size_files_text(report):
        lines.append(f"Size counts {code(files, 300)}")
    if folder:
        lines.append(f"Whole report: {code(str(folder / 'report.json'), 400)}, as a page: report.html beside it")
    return lines


def _rounds(report: EfficiencyReport, most: int) -> list[str]:
    shown = rounds.shown_rounds(report, most)
    if not shown:
        return []
    columns = rounds.round_columns(shown)
    whys = [_cell(facts.plain(one.why, 160)) for one in shown]
    note = rounds.rounds_note(shown)
    head = [f"Rounds ({note}):" if note else "Rounds:", "", f"| {' | '.join([*columns, 'why'])} |"]
    rule = f"|{' --- |' * (len(columns) + 1)}"
    rows = [f"| {' | '.join([*(cells[i] for cells in columns.values()), whys[i]])} |" for i in range(len(shown))]
    more = len(rounds.shown_rounds(report)) - len(shown)
    return [*head, rule, *rows, *([f"… {more} more in report.json"] if more else [])]


def _training(report: EfficiencyReport) -> list[str]:
    lines = [f"Training: {safe(rounds.training_text(report.training), 600)}"] if report.training else []
    if report.control:
        lines.append(f"Control: {safe(arms.control_text(report.control), 600)}")
    curves = arms.curve_lines(report)
    return [*lines, *([f"Quality by epoch: {safe('; '.join(curves), 400)}"] if curves else [])]


def _sensitivity(report: EfficiencyReport, full: bool) -> list[str]:
    found = rounds.slacks(report)
    if not found:
        return []
    highest = rounds.highest_drop(found)
    shown = found[:100] if full else rounds.extremes(found)
    lines = []
    for slack in shown:
        worst = slack.worst
        within = f"; within the guard: {rounds.within_text(slack)}" if slack.within is not None else ""
        drop = f"drop {worst.quality_drop:.4f} at {rounds.amount_text(worst.amount)}"
        lines.append(f"{code(slack.path, 80)} {rounds.spark(slack, highest)} {drop}{within}")
    whole = len(shown) == len(found)
    of = "" if whole else f", the {len(shown)} most" if full else ", the most and the least sensitive"
    amounts = rounds.amounts_text(found[0])
    return _bulleted(f"Sensitivity ({len(found)} layers or groups{of}; one bar each for {amounts})", lines, len(lines))


def _candidates(report: EfficiencyReport, most: int) -> list[str]:
    lines = []
    for one in facts.ranked_candidates(report):
        numbers = [facts.ratio_text(one.speedup)] if one.speedup is not None else []
        numbers += [facts.size_text(one.size_bytes)] if one.size_bytes is not None else []
        numbers += [f"drop {facts.drop_text(one.quality_drop)}"] if one.quality_drop is not None else []
        told = f" ({', '.join(numbers)})" if numbers else ""
        lines.append(f"{safe(one.name, 60)}: {one.status}{told}. {safe(one.why, 160)}")
    return _bulleted("Candidates", lines, most)


def _layers(report: EfficiencyReport, most: int) -> list[str]:
    lines = []
    for layer in report.layers:
        numbers = [facts.time_text(layer.time_ms)] if layer.time_ms is not None else []
        numbers += [f"{layer.time_share:.0%} of the time"] if layer.time_share is not None else []
        numbers += [f"{facts.count_text(layer.macs)} MACs"] if layer.macs is not None else []
        numbers += [facts.size_text(layer.size_bytes)] if layer.size_bytes is not None else []
        lines.append(f"{code(layer.path, 80)} {safe(layer.kind, 40)}: {', '.join(numbers)}")
    return _bulleted("Costliest layers", lines, most)


def _changes(report: EfficiencyReport) -> list[str]:
    return [
        f"{code(c.path, 80)} {safe(c.what, 60)}: {safe(c.before, 60)} -> {safe(c.after, 60)}" for c in report.changed
    ]


def _skipped(report: EfficiencyReport, most: int, named: int) -> list[str]:
    lines = []
    for group in facts.skip_groups(report.skipped):
        paths = ", ".join(code(path, 60) for path in group.paths[:named])
        more = f" and {len(group.paths) - named} more" if len(group.paths) > named else ""
        lines.append(f"{safe(group.reason, 160)}: {paths}{more}")
    return _bulleted(f"Skipped ({len(report.skipped)} layers)", lines, most)


def _environment(report: EfficiencyReport) -> list[str]:
    here = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in list(here.versions.items())[:20])
    cpu = f"{safe(here.cpu)}, {here.threads} threads, device {safe(here.device)}, gpu {safe(here.gpu or 'none')}"
    return [f"Measured on {cpu}; python {safe(here.python)}; {safe(versions, 400)}; seed {here.seed}"]
