"""A report as markdown for an agent: the same facts as the structured answer, complete on its own.

Text of a model, a log or a data set is put on one line, bounded, and escaped.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

from omgoptim.errors import OmgoptimError
from omgoptim.render.blocks import Block, Items, Line, Section, Table, Text
from omgoptim.render.claims import size_files_text, verdict
from omgoptim.render.numbers import progress_text, state_text
from omgoptim.render.sections.candidates import candidates_section, steps_section
from omgoptim.render.sections.layers import changed_section, costliest_section, sensitivity_section
from omgoptim.render.sections.quantization import explanation_section, quantization_section
from omgoptim.render.sections.results import comparison_section, environment_section, outputs_section, warnings_section
from omgoptim.render.sections.training import rounds_section, training_section
from omgoptim.reports import DoctorReport, EfficiencyReport, RunState
from omgoptim.text import LONGEST_LINE, clean, clean_exact, clip

Detail = Literal["brief", "full"]

MAX_BRIEF = 8_000
"""Characters of the brief form, about 2,000 tokens."""

MAX_FULL = 40_000
"""Characters of the full form, about 10,000 tokens."""


MAX_ROWS = 100
"""Rows of a table, entries of a list; report.json has all. Chosen: a longer table is not read."""

FIRST = (warnings_section, comparison_section, outputs_section, steps_section, quantization_section)
REST = (
    rounds_section,
    training_section,
    sensitivity_section,
    explanation_section,
    candidates_section,
    costliest_section,
    changed_section,
    environment_section,
)
"""Sections before and after the next steps; a text that is too long is cut at its end."""


def report_markdown(report: EfficiencyReport, detail: Detail = "brief", folder: Path | None = None) -> str:
    """Return the report for an agent. `folder` is the run's folder, to name report.json and report.html."""
    full = detail == "full"
    parts = [
        [f"**{verdict(report)}** {safe(report.summary, 1200)}"],
        *(_section(section(report, full)) for section in FIRST),
        _next_steps(report),
        _places(report, folder),
        *(_section(section(report, full)) for section in REST),
        [f"Repeat: {code(report.repeat, 600)}"],
    ]
    text = "\n\n".join("\n".join(lines) for lines in parts if lines)
    limit = MAX_FULL if full else MAX_BRIEF
    if len(text) <= limit:
        return text
    whole_lines = text[: limit - 40].rpartition("\n")[0]  # a cut line might leave a code span open
    return f"{whole_lines.rstrip()}\n… cut; the rest is in report.json"


def state_markdown(state: RunState) -> str:
    """Return the state of a run without a report."""
    head = f"**{state.status.upper()}** run {code(state.run_id)} ({safe(state.verb)})"
    if state.error:
        log = code(f"{state.folder}/log.txt", 300)
        return f"{head}\n{error_markdown(OmgoptimError.from_dict(state.error))}\nLog: {log}"
    if state.status in ("starting", "queued", "running"):
        return f"{head}: {safe(progress_text(state))}"
    return f"{head}: {safe(state.summary or '')}\nFolder: {code(state.folder, 300)}"


def runs_markdown(states: list[RunState], total: int) -> str:
    """Return the newest runs of a project, one line each."""
    if not states:
        return "No runs yet in this project."
    lines = []
    for state in states:
        model = f" {safe(state.model, 60)}" if state.model else ""
        lines.append(
            f"- {code(state.run_id)} {safe(state.outcome or state.status, 40)}{model}: {safe(state_text(state), 140)}"
        )
    more = [f"… {total - len(states)} older ones in .omgoptim/runs"] if total > len(states) else []
    return "\n".join(lines + more)


def doctor_markdown(report: DoctorReport) -> str:
    """Return the engines and packages of the project's Python, and how to install missing ones."""
    features = f" ({safe(', '.join(report.cpu_features), 400)})" if report.cpu_features else ""
    where = [f"- target: {code(report.target)}"] if report.target else []
    memory = f", {report.memory_bytes / 2**30:.1f} GiB" if report.memory_bytes else ""
    lines = [
        f"**{report.outcome.upper()}** {safe(report.summary, 600)}",
        "",
        *where,
        f"- python: {code(report.python)} {safe(report.python_version)}, {safe(report.python_found_by)}",
        f"- cpu: {safe(report.cpu)}, {report.cores} cores{memory}{features}; gpu: {safe(report.gpu or 'none')}",
        f"- project: {code(report.project)}",
    ]
    for package in (*report.runtimes, *report.extras):
        version = f" {safe(package.version, 40)}" if package.version else ""
        fix = f"; {code(package.fix)}" if package.fix else ""
        lines.append(f"- {safe(package.name, 60)}{version}: {package.state} ({safe(package.unlocks, 120)}){fix}")
    entry = ["", f"MCP entry: {code(json.dumps(report.mcp_entry), 2000)}"] if report.mcp_entry else []
    return "\n".join([*lines, *entry])


def error_markdown(error: OmgoptimError) -> str:
    """Return an error with its cause and fix."""
    parts = [("Error", error.what), ("Why", error.why), ("Fix", error.fix)]
    lines = [f"{name}: {safe(text, LONGEST_LINE)}" for name, text in parts if text]
    log = [f"  | {code(line, 300)}" for line in error.log.splitlines() if line.strip()]
    return "\n".join([*lines, *(["Its log ends:", *log] if log else [])])


def _section(section: Section | None) -> list[str]:
    return [line for block in section.blocks for line in block_lines(block)] if section else []


def block_lines(block: Block) -> list[str]:
    """Return the lines of a block; pictures have none."""
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Items):
        left_out = block.left_out + max(0, len(block.items) - MAX_ROWS)
        more = [f"- … {left_out} more in report.json"] if left_out else []
        return [f"{_title(block.title)}:", *(f"- {_shown(item)}" for item in block.items[:MAX_ROWS]), *more]
    if isinstance(block, Line):
        head = f"{_shown(block.head)} " if block.head else ""
        return [f"{_title(block.label)}: {head}{_shown(block.text)}" if block.label else _shown(block.text)]
    return []


def _table(table: Table) -> list[str]:
    title = _title(table.title)
    head = [f"{title}: {safe(table.note, 500)}".rstrip(), ""] if title else []
    names = " | ".join(cell(column.name, 120) for column in table.columns)
    rows = [f"| {' | '.join(_cell(one) for one in row.cells)} |" for row in table.rows[:MAX_ROWS]]
    left_out = table.left_out + max(0, len(table.rows) - MAX_ROWS)
    more = ["", f"… {left_out} more in report.json"] if left_out else []
    return [*head, f"| {names} |", f"|{' --- |' * len(table.columns)}", *rows, *more]


def _cell(text: Text) -> str:
    return code_cell(text.text, text.limit) if text.code and text.text else cell(text.text, text.limit)


def _shown(text: Text) -> str:
    limit = min(text.limit, LONGEST_LINE)
    return code(text.text, limit) if text.code else safe(text.text, limit)


def _title(title: str) -> str:
    return title[:1].upper() + title[1:]


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
    if files := size_files_text(report):
        lines.append(f"Size counts {code(files, 300)}")
    if folder:
        lines.append(f"Whole report: {code(str(folder / 'report.json'), 400)}, as a page: report.html beside it")
    return lines


_MARKS = re.compile(
    r"[*~$|\\]"  # emphasis, strikethrough, a fence, mathematics, a table, an escape
    r"|<(?=[A-Za-z/!?])|&(?=#|\w+;)"  # a tag, an entity
    r"|\](?=[(:\[])|\[.*\]$|\[\^"  # an address of a link, its definition (the colon may be ours), a footnote
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; not an underscore inside a name
    r"|://|\bwww\.|\bmailto:|@[\w-]"  # what becomes a link or a mention by itself
    r"|#\d|\bGH-\d|(?<!\w)![0-9]|\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7,40}\b"  # issues and commits
    r"|:[a-z0-9_+-]+(?::|$)",  # an emoji, also with a colon of ours after it
    re.IGNORECASE,
)
"""Pattern of markup in GitHub's and Hugging Face's markdown."""
_OPENING = re.compile(r"[>=\[#]|[-+]+$|\d+[.)]$")
"""Pattern of a block marker at the beginning of a line: quote, heading, task, list, rule."""
_WORD = re.compile(r"\S+")


def safe(text: str, limit: int = 200) -> str:
    """Bounded text on one line outside of code spans, which may stand at its beginning."""
    words = _inert(text, limit)
    first, space, rest = words.partition(" ")
    return f"`{first}`{space}{rest}" if _OPENING.match(first) else words


def code(text: str, limit: int = 200) -> str:
    """Bounded text on one line as a code span, which it cannot close."""
    shown = clip(clean_exact(text), limit).replace("`", "'")
    return f"`{shown or ' '}`"


def cell(text: str, limit: int = 200) -> str:
    """`safe` text for a table."""
    return _inert(text.replace("|", "/"), limit)


def code_cell(text: str, limit: int = 200) -> str:
    """Return a code span for a table."""
    return code(text.replace("|", "/"), limit)


def _inert(text: str, limit: int) -> str:
    """Bounded text on one line in which a word that holds a mark of markdown is a code span."""
    shown = clean(text, limit).replace("`", "'")
    return _WORD.sub(lambda word: f"`{word[0]}`" if _MARKS.search(word[0]) else word[0], shown)
