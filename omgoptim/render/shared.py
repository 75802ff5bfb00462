"""A report to show to others: for a pull request, a summary of GitHub Actions or a chat, without paths of the machine.

The verdict and the table are seen at once, the rest is collapsed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.render.blocks import Line, Section
from omgoptim.render.claims import verdict
from omgoptim.render.markdown import block_lines, error_markdown
from omgoptim.render.markdown_parts import code, safe
from omgoptim.render.sections.candidates import candidates_section
from omgoptim.render.sections.comparison import comparison_section
from omgoptim.render.sections.explanation import explanation_section
from omgoptim.render.sections.layers import changed_section, costliest_section
from omgoptim.render.sections.outputs import outputs_section
from omgoptim.render.sections.quantization import quantization_section
from omgoptim.render.sections.run import environment_section, warnings_section
from omgoptim.render.sections.sensitivity import sensitivity_section
from omgoptim.render.sections.steps import steps_section
from omgoptim.render.sections.training import rounds_section, training_section
from omgoptim.reports import EfficiencyReport
from omgoptim.requests.command import in_shell

MOST_CHARACTERS = 60_000
"""GitHub refuses a comment of more than 65,536."""

HOW = (steps_section, quantization_section, rounds_section, training_section, candidates_section, changed_section)
MORE = (outputs_section, sensitivity_section, explanation_section, costliest_section)
"""Sections that are collapsed."""

_PATH = re.compile(
    r"(?<![\w/.~-])(?:file://|~)?/(?:[^\s/'\"`<>|,;]+/)+"  # /home/me/project/
    r"|(?<!\w)(?:[A-Za-z]:|\\)\\+(?:[^\s\\'\"`<>|,;]+\\+)+"  # C:\Users\me\project\ and \\server\share\
)

_ABSOLUTE = re.compile(r"/.|[A-Za-z]:[\\/]|\\\\")


def shared_markdown(report: EfficiencyReport) -> str:
    """The report as GitHub shows it: verdict, table and warnings, then collapsed details."""
    report = without_paths(report)
    for full in (True, False):
        text = _markdown(report, full)
        if len(text) <= MOST_CHARACTERS:
            return text
    whole_lines = text[: MOST_CHARACTERS - 60].rpartition("\n")[0]
    still_open = whole_lines.count("\n<details>") - whole_lines.count("\n</details>")
    end = "\n\n</details>" * still_open
    return f"{whole_lines}{end}\n\n… cut; the rest is in report.json\n"


def error_to_share(error: OmgoptimError) -> str:
    """What went wrong, with neither paths of the machine nor the log."""
    shown = OmgoptimError(*(without_paths_in(text) for text in (error.what, error.why, in_shell(error.fix))))
    return f"**FAILED** omgoptim\n\n{error_markdown(shown)}"


def without_paths(report: EfficiencyReport) -> EfficiencyReport:
    """The same report with paths relative to the project; of a path elsewhere only its last part is left."""
    folders = project_folders(report)
    return EfficiencyReport.model_validate(
        _with_texts(report.model_dump(mode="json"), lambda text: without_paths_in(text, folders))
    )


def project_folders(report: EfficiencyReport) -> list[str]:
    """The folders of the project as the report names them, the longest first."""
    places = [report.artifact.path] if report.artifact else []
    places += [one.path for one in report.alternatives]
    found = [re.split(r"[\\/]\.omgoptim[\\/]runs[\\/]", place)[0] for place in places if ".omgoptim" in place]
    project = report.request.get("project")
    found += [project.rstrip("\\/")] if isinstance(project, str) else []
    return sorted({folder for folder in found if _ABSOLUTE.match(folder)}, key=len, reverse=True)


def details(summary: str, parts: Iterable[str]) -> str:
    """A collapsed part; empty where it would hold nothing. `summary` is a text of ours."""
    shown = "\n\n".join(part for part in parts if part)
    return f"<details><summary>{summary}</summary>\n\n{shown}\n\n</details>" if shown else ""


def section_markdown(section: Section | None, *, noted: bool = False) -> str:
    """A section as blocks of markdown, its labelled lines as a list; empty where there is none.

    Args:
        section: None gives an empty text.
        noted: with the note of the section, which is about its picture in most.
    """
    if section is None:
        return ""
    parts: list[str] = []
    for block in section.blocks:
        text = "\n".join(block_lines(block))
        if isinstance(block, Line):
            text = f"- {text}" if block.label else f"  {text}"
            parts[-1:] = [f"{parts[-1]}\n{text}"] if parts and parts[-1].startswith("- ") else [*parts[-1:], text]
        elif text:
            parts.append(text)
    return "\n\n".join([*parts, *([safe(section.note, 600)] if section.note and noted else [])])


def _markdown(report: EfficiencyReport, full: bool) -> str:
    def of(sections: Iterable[Callable[..., Section | None]]) -> list[str]:
        return [section_markdown(section(report, full)) for section in sections]

    model = report.request.get("model")
    parts = [
        f"### omgoptim {safe(report.verb, 40)}" + (f" {code(str(model), 120)}" if model else ""),
        f"**{verdict(report)}** {safe(report.summary, 1200)}",
        section_markdown(comparison_section(report, full), noted=True),
        *of((warnings_section,)),
        details("How it was made", of(HOW)),
        details("Outputs and layers", of(MORE)),
        details("Machine and next steps", [section_markdown(environment_section(report, True)), _calls(report)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _calls(report: EfficiencyReport) -> str:
    lines = [f"- Next: {code(step.command, 800)} {safe(step.why)}" for step in report.next_steps[:4]]
    lines += [f"- Repeat: {code(report.repeat, 800)}"] if report.repeat else []
    return "\n".join([*lines, f"- Run: {code(report.run_id)}"])


def without_paths_in(text: str, folders: Sequence[str] = ()) -> str:
    """A text with paths relative to these folders; of any other path only its last part is left."""
    for folder in folders:
        text = re.sub(rf"{re.escape(folder)}[\\/]+", "", text)
        text = re.sub(rf"{re.escape(folder)}(?![\w-])", ".", text)
    return _PATH.sub("…/", text)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list) else value
