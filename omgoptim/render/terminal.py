"""A report as rich renderables for a terminal: the verdict first, then the numbers, then what to do next.

All text of a model, a log or a library goes through `rich.text.Text`, which reads no markup.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table as RichTable
from rich.text import Text as RichText

from omgoptim.errors import OmgoptimError
from omgoptim.render.blocks import Block, Items, Line, Section, Table, Text
from omgoptim.render.claims import size_files_text, verdict
from omgoptim.render.numbers import block, plain, progress_text, state_text
from omgoptim.render.sections.candidates import candidates_section, steps_section
from omgoptim.render.sections.layers import changed_section, costliest_section, sensitivity_section
from omgoptim.render.sections.quantization import explanation_section, quantization_section
from omgoptim.render.sections.results import comparison_section, outputs_section, warnings_section
from omgoptim.render.sections.training import rounds_section, training_section
from omgoptim.reports import DoctorReport, EfficiencyReport, PackageState, RunState
from omgoptim.requests.command import in_shell

SECTIONS = (
    comparison_section,
    outputs_section,
    steps_section,
    quantization_section,
    rounds_section,
    training_section,
    sensitivity_section,
    explanation_section,
    costliest_section,
    candidates_section,
    changed_section,
    warnings_section,
)
"""In the order of the screen: the most important is near the top and, with the next steps, at the end."""

_VERDICT_STYLE = {"ok": "green", "no_gain": "yellow", "guard_failed": "red"}
_TONE_STYLE = {"better": "green", "worse": "red", "same": "", "open": "yellow"}
_MARK_STYLE = {"": "", "chosen": "bold", "faded": "dim"}
_STATUS_STYLE = {"done": "green", "failed": "red", "cancelled": "yellow", "running": "cyan"}
_STATE_MARK = {"ok": ("✓", "green"), "missing": ("–", "yellow"), "broken": ("✗", "red")}
_LABEL = 10
"""Width of the labels of lines. That of the longest label, and a space."""


def report_view(report: EfficiencyReport, *, full: bool = False, folder: Path | None = None) -> RenderableType:
    """Return a whole report. `folder` is its run folder, to name report.json and report.html."""
    sections = (section(report, full) for section in SECTIONS)
    parts = [_section(section) for section in sections if section is not None]
    return Group(_verdict_panel(report), *parts, *_next_steps(report), _places(report, folder))


def section_view(section: Section) -> RenderableType:
    """Return a section with its title and its note."""
    note = [RichText(plain(section.note), "dim")] if section.note else []
    return Group(RichText(section.title, "bold"), _section(section), *note)


def error_view(error: OmgoptimError) -> RenderableType:
    """Return an error with its cause and fix."""
    lines = [RichText.assemble(("error: ", "bold red"), block(error.what))]
    if error.why:
        lines.append(RichText.assemble(("  why: ", "bold"), block(error.why)))
    if error.fix:
        lines.append(RichText.assemble(("  fix: ", "bold"), block(in_shell(error.fix))))
    lines += [RichText(f"  | {line}", "dim") for line in error.log.splitlines()]
    return Group(*lines)


def runs_view(states: list[RunState]) -> RenderableType:
    """Return the runs of a project, one line each."""
    if not states:
        return RichText("No runs yet. Start with: omgoptim profile MODEL")
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("run", "status", "started (UTC)", "model", "summary"):
        table.add_column(header, overflow="fold", no_wrap=header in ("run", "status", "started (UTC)"))
    for state in states:
        table.add_row(
            RichText(state.run_id),
            RichText(state.outcome or state.status, _STATUS_STYLE.get(state.status, "")),
            RichText(state.started[:16].replace("T", " ")),
            RichText(plain(state.model, 60)),
            RichText(plain(state_text(state), 100)),
        )
    return table


def state_view(state: RunState) -> RenderableType:
    """Return the state of a run without a report."""
    head = RichText.assemble((state.run_id, "bold"), "  ", (state.status, _STATUS_STYLE.get(state.status, "")))
    lines: list[RenderableType] = [head]
    if state.status in ("starting", "queued", "running"):
        lines.append(RichText(f"  {progress_text(state)}"))
    if state.error:
        lines.append(error_view(OmgoptimError.from_dict(state.error)))
    lines.append(RichText(f"  folder: {state.folder}"))
    return Group(*lines)


def doctor_view(report: DoctorReport) -> RenderableType:
    """Return the engines and packages of the project's Python, and how to install missing ones."""
    style = "green" if report.outcome == "ok" else "yellow"
    head = Panel(RichText(report.summary), title=RichText(report.outcome.upper(), f"bold {style}"), border_style=style)
    about = RichTable.grid(padding=(0, 2))
    features = f" ({', '.join(report.cpu_features)})" if report.cpu_features else ""
    memory = f", {report.memory_bytes / 2**30:.1f} GiB" if report.memory_bytes else ""
    for label, value in (
        *([("target", report.target)] if report.target else []),
        ("python", f"{report.python} ({report.python_version}, {report.python_found_by})"),
        ("cpu", f"{report.cpu}, {report.cores} cores{memory}{features}"),
        ("gpu", report.gpu or "none"),
        ("project", report.project),
    ):
        about.add_row(RichText(label, "dim"), RichText(value))
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("", "package", "version", "unlocks"):
        table.add_column(header, overflow="fold")
    packages = (*report.runtimes, *report.extras)
    for package in packages:
        table.add_row(*_package_row(package))
    fixes = {package.fix: package.name for package in reversed(packages) if package.fix}
    lines = [_to_copy("  ", (fix, "cyan"), (f"  # {name}", "dim")) for fix, name in reversed(fixes.items())]
    installs: list[RichText] = [RichText("to install", "bold"), *lines, RichText()] if lines else []
    entry = RichText(json.dumps(report.mcp_entry, indent=2), no_wrap=True, overflow="ignore")
    client = [RichText("for an MCP client", "bold"), entry] if report.mcp_entry else []
    return Group(head, Padding(about, (0, 1)), table, *installs, *client)


def _package_row(package: PackageState) -> list[RichText]:
    mark, style = _STATE_MARK[package.state]
    return [RichText(mark, style), RichText(package.name), RichText(package.version or ""), RichText(package.unlocks)]


def _verdict_panel(report: EfficiencyReport) -> RenderableType:
    style = _VERDICT_STYLE[report.outcome]
    title = RichText.assemble((verdict(report), f"bold {style}"), ("  " + report.verb, "dim"))
    return Panel(RichText(plain(report.summary, 1200)), title=title, title_align="left", border_style=style)


def _section(section: Section) -> RenderableType:
    parts = Group(*(part for one in section.blocks for part in _block(one)))
    last = section.blocks[-1]
    ends_blank = isinstance(last, Table) and not last.note and not last.left_out
    return parts if ends_blank else Padding(parts, (0, 0, 1, 0))


def _block(one: Block) -> Iterator[RenderableType]:
    if isinstance(one, Table):
        yield _table(one)
        if one.note:
            yield RichText(f"  {plain(one.note)}", "dim")
        if one.left_out:
            yield _left_out(one.left_out)
    elif isinstance(one, Line):
        head = (f"{_shown(one.head)} ", _TONE_STYLE[one.head.tone]) if one.head else ""
        label = (f"{one.label:<{_LABEL - 1}} ", "bold")
        yield RichText.assemble(label, head, (_shown(one.text), _TONE_STYLE[one.text.tone]))
    elif isinstance(one, Items):
        yield RichText(one.title, "bold")
        yield from (RichText(f"  {_shown(item)}", _TONE_STYLE[item.tone]) for item in one.items)
        if one.left_out:
            yield _left_out(one.left_out)


def _table(one: Table) -> RichTable:
    title = RichText(one.title, "bold") if one.title else None
    table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in one.columns:
        header = RichText(plain(column.name, 120).replace(": ", "\n"))
        table.add_column(header, justify="right" if column.numeric else "left", no_wrap=column.numeric, overflow="fold")
    for row in one.rows:
        cells = [RichText(_shown(cell), _TONE_STYLE[cell.tone]) for cell in row.cells]
        table.add_row(*cells, style=_MARK_STYLE[row.mark])
    return table


def _left_out(count: int) -> RichText:
    return RichText(f"  and {count} more: --detail full", "dim")


def _shown(text: Text) -> str:
    return plain(text.text, text.limit)


def _next_steps(report: EfficiencyReport) -> Sequence[RenderableType]:
    if not report.next_steps:
        return ()
    lines: list[RenderableType] = [RichText("next", "bold")]
    for step in report.next_steps:
        lines += [_to_copy("  ", (step.command, "cyan")), RichText(f"      {plain(step.why, 400)}", "dim")]
    return [*lines, ""]


def _places(report: EfficiencyReport, folder: Path | None) -> RenderableType:
    places = []
    if report.artifact:
        places.append(("artifact", report.artifact.path))
        places += [("open it", line) for line in block(report.artifact.load).splitlines()]
    if folder:
        places += [("report", str(folder / "report.json")), ("page", str(folder / "report.html"))]
    if files := size_files_text(report):
        places.append(("size of", files))
    places.append(("repeat", report.repeat))
    return Group(*(_to_copy((f"{label:<{_LABEL}}", "dim"), text) for label, text in places))


def _to_copy(*parts: str | tuple[str, str]) -> RichText:
    """Return a line that is never wrapped, so that it can be copied from the terminal and run."""
    return RichText.assemble(*parts, no_wrap=True, overflow="ignore")
