"""A report as rich renderables for a terminal: the verdict first, then the numbers, then what to do next.

All text of a model, a log or a library goes through `rich.text.Text`, which reads no markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from omgoptim.errors import OmgoptimError
from omgoptim.render import facts
from omgoptim.render.terminal_outputs import outputs_table
from omgoptim.render.terminal_precision import coverage_block, explanation_block
from omgoptim.render.terminal_rounds import rounds_table, sensitivity_table, training_line
from omgoptim.reports import Candidate, DoctorReport, EfficiencyReport, PackageState, RunState
from omgoptim.requests.command import in_shell

_VERDICT_STYLE = {"ok": "green", "no_gain": "yellow", "guard_failed": "red"}
_TONE_STYLE = {"better": "green", "worse": "red", "same": "", "open": "yellow"}
_STATUS_STYLE = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
_STATE_MARK = {"ok": ("✓", "green"), "missing": ("–", "yellow"), "broken": ("✗", "red")}

BRIEF = {"candidates": 8, "skipped": 3, "layers": 8, "warnings": 8}
"""How many rows of each list the short form shows; the full form shows all."""


def report_view(report: EfficiencyReport, *, full: bool = False, folder: Path | None = None) -> RenderableType:
    """A whole report. `folder` is its run folder, to say where report.json and report.html are."""
    parts: Iterable[RenderableType | None] = (
        _verdict_panel(report),
        _comparison_table(report),
        outputs_table(report, full),
        coverage_block(report, full),
        rounds_table(report, full),
        training_line(report),
        sensitivity_table(report, full),
        explanation_block(report, full),
        _layers_table(report, full),
        _candidates_table(report, full),
        _changed(report, full),
        _skipped(report, full),
        _warnings(report, full),
        _next_steps(report),
        _places(report, folder),
    )
    return Group(*(part for part in parts if part is not None))


def error_view(error: OmgoptimError) -> RenderableType:
    """What happened, why, and what to do next."""
    lines = [Text.assemble(("error: ", "bold red"), facts.block(error.what))]
    if error.why:
        lines.append(Text.assemble(("  why: ", "bold"), facts.block(error.why)))
    if error.fix:
        lines.append(Text.assemble(("  fix: ", "bold"), facts.block(in_shell(error.fix))))
    lines += [Text(f"  | {line}", "dim") for line in error.log.splitlines()]
    return Group(*lines)


def runs_view(states: list[RunState]) -> RenderableType:
    """The runs of a project, one line each."""
    if not states:
        return Text("No runs yet. Start with: omgoptim profile MODEL")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("run", "status", "started (UTC)", "model", "summary"):
        table.add_column(header, overflow="fold", no_wrap=header in ("run", "status", "started (UTC)"))
    for state in states:
        going = facts.progress_text(state) if state.status in ("starting", "queued", "running") else ""
        told = going or state.summary or (state.error or {}).get("what", "")
        table.add_row(
            Text(state.run_id),
            Text(state.outcome or state.status, _STATUS_STYLE.get(state.status, "")),
            Text(state.started[:16].replace("T", " ")),
            Text(facts.plain(state.model, 60)),
            Text(facts.plain(told, 100)),
        )
    return table


def state_view(state: RunState) -> RenderableType:
    """A run that has no report: where it stands, or how it ended."""
    head = Text.assemble((state.run_id, "bold"), "  ", (state.status, _STATUS_STYLE.get(state.status, "")))
    lines: list[RenderableType] = [head]
    if state.status in ("starting", "queued", "running"):
        lines.append(Text(f"  {facts.progress_text(state)}"))
    if state.error:
        lines.append(error_view(OmgoptimError.from_dict(state.error)))
    lines.append(Text(f"  folder: {state.folder}"))
    return Group(*lines)


def doctor_view(report: DoctorReport) -> RenderableType:
    """What this machine and the project's Python can do, and what to install for the rest."""
    style = "green" if report.outcome == "ok" else "yellow"
    head = Panel(Text(report.summary), title=Text(report.outcome.upper(), f"bold {style}"), border_style=style)
    about = Table.grid(padding=(0, 2))
    features = f" ({', '.join(report.cpu_features)})" if report.cpu_features else ""
    for label, value in (
        ("python", f"{report.python} ({report.python_version}, {report.python_found_by})"),
        ("cpu", f"{report.cpu}, {report.cores} cores{features}"),
        ("gpu", report.gpu or "none"),
        ("project", report.project),
    ):
        about.add_row(Text(label, "dim"), Text(value))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", "package", "version", "unlocks"):
        table.add_column(header, overflow="fold")
    packages = (*report.runtimes, *report.extras)
    for package in packages:
        table.add_row(*_package_row(package))
    fixes = {package.fix: package.name for package in reversed(packages) if package.fix}
    lines = [_to_copy("  ", (fix, "cyan"), (f"  # {name}", "dim")) for fix, name in reversed(fixes.items())]
    installs: list[Text] = [Text("to install", "bold"), *lines, Text()] if lines else []
    entry = Text(json.dumps(report.mcp_entry, indent=2), no_wrap=True, overflow="ignore")
    return Group(
        head,
        Padding(about, (0, 1)),
        table,
        *installs,
        Text("for an MCP client", "bold"),
        entry,
    )


def _package_row(package: PackageState) -> list[Text]:
    mark, style = _STATE_MARK[package.state]
    return [Text(mark, style), Text(package.name), Text(package.version or ""), Text(package.unlocks)]


def _verdict_panel(report: EfficiencyReport) -> RenderableType:
    style = _VERDICT_STYLE[report.outcome]
    title = Text.assemble((facts.verdict(report), f"bold {style}"), ("  " + report.verb, "dim"))
    return Panel(Text(facts.plain(report.summary, 1200)), title=title, title_align="left", border_style=style)


def _comparison_table(report: EfficiencyReport) -> RenderableType | None:
    rows = facts.comparison_rows(report)
    if not rows:
        return None
    two = report.before is not None and report.after is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name, side in zip(facts.sides(report), (report.before, report.after), strict=True):
        if side is not None:
            title = facts.side_title(name if two else "measured", side).replace(": ", "\n")
            table.add_column(Text(title), justify="right")
    if two:
        table.add_column("gain")
    for row in rows:
        cells = [Text(row.label, "dim")]
        cells += [Text(row.before)] if report.before is not None else []
        cells += [Text(row.after, "bold" if two else "")] if report.after is not None else []
        table.add_row(*cells, *([Text(row.gain, _TONE_STYLE[row.tone])] if two else []))
    if report.total is None:
        return table
    first = facts.plain(report.total.from_run, 80)
    return Group(table, Text(f" since the original of {first}: {facts.total_text(report.total)}\n"))


def _layers_table(report: EfficiencyReport, full: bool) -> RenderableType | None:
    if not report.layers:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text("costliest layers", "bold"), title_justify="left")
    for header in ("layer", "kind", "time", "share", "MACs", "size"):
        left = header in ("layer", "kind")
        table.add_column(header, justify="left" if left else "right", overflow="fold")
    for layer in report.layers if full else report.layers[: BRIEF["layers"]]:
        table.add_row(
            Text(facts.plain(layer.path, 80)),
            Text(facts.plain(layer.kind, 40)),
            Text("" if layer.time_ms is None else facts.time_text(layer.time_ms)),
            Text("" if layer.time_share is None else f"{layer.time_share:.0%}"),
            Text("" if layer.macs is None else facts.count_text(layer.macs)),
            Text("" if layer.size_bytes is None else facts.size_text(layer.size_bytes)),
        )
    return table


def _candidates_table(report: EfficiencyReport, full: bool) -> RenderableType | None:
    candidates = facts.ranked_candidates(report)
    if not candidates:
        return None
    shown = candidates if full else candidates[: BRIEF["candidates"]]
    numbers = {
        "speedup": ["" if one.speedup is None else facts.ratio_text(one.speedup) for one in shown],
        "size": ["" if one.size_bytes is None else facts.size_text(one.size_bytes) for one in shown],
        "drop": ["" if one.quality_drop is None else facts.drop_text(one.quality_drop) for one in shown],
    }
    measured = {header: cells for header, cells in numbers.items() if any(cells)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text("candidates", "bold"), title_justify="left")
    table.add_column("candidate", overflow="fold")
    table.add_column("status")
    for header in measured:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row, one in enumerate(shown):
        table.add_row(
            Text(facts.plain(one.name, 60)),
            Text(one.status, _candidate_style(one, report)),
            *(Text(cells[row]) for cells in measured.values()),
            Text(facts.plain(one.why, 400 if full else 140)),
        )
    if len(shown) < len(candidates):
        return Group(table, Text(f"  and {len(candidates) - len(shown)} more: --detail full", "dim"))
    return table


def _candidate_style(one: Candidate, report: EfficiencyReport) -> str:
    chosen = "bold green" if report.outcome == "ok" else "bold"
    return chosen if one.status == "chosen" else _STATUS_STYLE.get(one.status, "dim")


def _changed(report: EfficiencyReport, full: bool) -> RenderableType | None:
    if not report.changed:
        return None
    title = facts.changed_title(report)
    if not full:
        paths = facts.changed_paths(report)
        named = ", ".join(facts.plain(path or "the model itself", 60) for path in paths[:4])
        count = f"{len(paths)} layer{'' if len(paths) == 1 else 's'}"
        return _block([Text.assemble((f"{title}: {count}", "bold"), f"  {named}{', …' if len(paths) > 4 else ''}")])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title, "bold"), title_justify="left")
    for header in ("layer", "what", "before", "after"):
        table.add_column(header, overflow="fold")
    for one in report.changed:
        table.add_row(*(Text(facts.plain(cell, 120)) for cell in (one.path, one.what, one.before, one.after)))
    return table


def _skipped(report: EfficiencyReport, full: bool) -> RenderableType | None:
    groups = facts.skip_groups(report.skipped)
    if not groups:
        return None
    lines = [Text(f"skipped: {len(report.skipped)} layers", "bold")]
    for group in groups if full else groups[: BRIEF["skipped"]]:
        paths = group.paths if full else group.paths[:3]
        more = f" and {len(group.paths) - len(paths)} more" if len(paths) < len(group.paths) else ""
        named = ", ".join(facts.plain(path, 60) for path in paths)
        lines.append(Text(f"  {facts.plain(group.reason, 160)}: {named}{more}"))
    return _block(lines)


def _warnings(report: EfficiencyReport, full: bool) -> RenderableType | None:
    if not report.warnings:
        return None
    shown = report.warnings if full else report.warnings[: BRIEF["warnings"]]
    return _block([Text.assemble(("warning: ", "bold yellow"), facts.plain(text, 500)) for text in shown])


def _next_steps(report: EfficiencyReport) -> RenderableType | None:
    if not report.next_steps:
        return None
    lines = [Text("next", "bold")]
    for step in report.next_steps:
        lines += [_to_copy("  ", (step.command, "cyan")), Text(f"      {facts.plain(step.why, 200)}", "dim")]
    return Group(*lines, "")


def _places(report: EfficiencyReport, folder: Path | None) -> RenderableType:
    places = []
    if report.artifact:
        places.append(("artifact", report.artifact.path))
        places += [("open it", line) for line in facts.block(report.artifact.load).splitlines()]
    if folder:
        places += [("report", str(folder / "report.json")), ("page", str(folder / "report.html"))]
    size_files = facts.size_files_text(report)
    if size_files:
        places.append(("size of", size_files))
    places.append(("repeat", report.repeat))
    return Group(*(_to_copy((f"{label:<10}", "dim"), text) for label, text in places))


def _to_copy(*parts: str | tuple[str, str]) -> Text:
    """A line that stays one line, however long: what is copied out of the terminal must still run."""
    return Text.assemble(*parts, no_wrap=True, overflow="ignore")


def _block(lines: list[Text]) -> RenderableType:
    return Padding(Group(*lines), (0, 0, 1, 0))
