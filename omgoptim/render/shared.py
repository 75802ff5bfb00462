"""Reports for sharing: markdown for a pull request, a badge, and the model card of an artifact.

No paths of the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from omgoptim.errors import OmgoptimError
from omgoptim.render.blocks import Line, Section
from omgoptim.render.claims import speed_claim, verdict
from omgoptim.render.markdown import block_lines, code, error_markdown, safe
from omgoptim.render.numbers import size_text, time_text
from omgoptim.render.sections.candidates import candidates_section, steps_section
from omgoptim.render.sections.layers import changed_section, costliest_section, sensitivity_section
from omgoptim.render.sections.quantization import explanation_section, quantization_section
from omgoptim.render.sections.results import comparison_section, environment_section, outputs_section, warnings_section
from omgoptim.render.sections.training import rounds_section, training_section
from omgoptim.reports import EfficiencyReport, Gains, Measurement
from omgoptim.reports.measured import AGREEMENT_METRICS, SMALLER
from omgoptim.requests.command import in_shell
from omgoptim.text import clean

MAX_CHARACTERS = 60_000
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
    """Return a report for GitHub: verdict, table and warnings, then collapsed details."""
    report = without_paths(report)
    for full in (True, False):
        text = _markdown(report, full)
        if len(text) <= MAX_CHARACTERS:
            return text
    whole_lines = text[: MAX_CHARACTERS - 60].rpartition("\n")[0]
    still_open = whole_lines.count("\n<details>") - whole_lines.count("\n</details>")
    end = "\n\n</details>" * still_open
    return f"{whole_lines}{end}\n\n… cut; the rest is in report.json\n"


def error_to_share(error: OmgoptimError) -> str:
    """Return an error as markdown, without paths of the machine and without the log."""
    shown = OmgoptimError(*(without_paths_in(text) for text in (error.what, error.why, in_shell(error.fix))))
    return f"**FAILED** omgoptim\n\n{error_markdown(shown)}"


def without_paths(report: EfficiencyReport) -> EfficiencyReport:
    """Return a report with paths relative to the project; other paths are cut to their last part."""
    folders = project_folders(report)
    return EfficiencyReport.model_validate(
        _with_texts(report.model_dump(mode="json"), lambda text: without_paths_in(text, folders))
    )


def project_folders(report: EfficiencyReport) -> list[str]:
    """Return the folders of the project as the report names them, the longest first."""
    places = [report.artifact.path] if report.artifact else []
    places += [one.path for one in report.alternatives]
    found = [re.split(r"[\\/]\.omgoptim[\\/]runs[\\/]", place)[0] for place in places if ".omgoptim" in place]
    project = report.request.get("project")
    found += [project.rstrip("\\/")] if isinstance(project, str) else []
    return sorted({folder for folder in found if _ABSOLUTE.match(folder)}, key=len, reverse=True)


def details(summary: str, parts: Iterable[str]) -> str:
    """Return a collapsed part; empty without content. `summary` is trusted text."""
    shown = "\n\n".join(part for part in parts if part)
    return f"<details><summary>{summary}</summary>\n\n{shown}\n\n</details>" if shown else ""


def section_markdown(section: Section | None, *, noted: bool = False) -> str:
    """Return a section as blocks of markdown, its labelled lines as a list; empty where there is none.

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
        details("How it was created", of(HOW)),
        details("Outputs and layers", of(MORE)),
        details("Machine and next steps", [section_markdown(environment_section(report, True)), _calls(report)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _calls(report: EfficiencyReport) -> str:
    lines = [f"- Next: {code(step.command, 800)} {safe(step.why)}" for step in report.next_steps[:4]]
    lines += [f"- Repeat: {code(report.repeat, 800)}"] if report.repeat else []
    return "\n".join([*lines, f"- Run: {code(report.run_id)}"])


def without_paths_in(text: str, folders: Sequence[str] = ()) -> str:
    """Return a text with paths relative to these folders; of any other path only its last part is left."""
    for folder in folders:
        text = re.sub(rf"{re.escape(folder)}[\\/]+", "", text)
        text = re.sub(rf"{re.escape(folder)}(?![\w-])", ".", text)
    return _PATH.sub("…/", text)


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with a function applied to each of its texts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_texts(item, change) for key, item in value.items()}
    return [_with_texts(item, change) for item in value] if isinstance(value, list) else value


NAME = "omgoptim"
_COLOURS = {"OK": "#2e7d32", "NO GAIN": "#8a6100", "GUARD FAILED": "#b3261e"}
_OTHER = "#44546a"
_LETTER, _MARGIN, _HEIGHT = 6.6, 8, 20
"""Mean width of a letter of 11 px, space beside a text, and height, in px. As the badges of shields.io, whose font is
Verdana 11."""


def badge_text(report: EfficiencyReport) -> str:
    """Return the claim of a badge: gains where the outcome is ok, else the verdict."""
    title = verdict(report)
    if title not in ("OK", "MEASURED"):
        return title.lower()
    gains = report.gains or Gains()
    claims = []
    if gains.size_ratio is not None and gains.size_ratio >= SMALLER:
        claims.append(f"{_ratio(gains.size_ratio)} smaller")
    if gains.speedup is not None and speed_claim(gains)[1] == "better":
        claims.append(f"{_ratio(gains.speedup)} faster")
    known = report.after or report.before
    if not claims and report.gains is None and known is not None:
        claims += [size_text(known.size_bytes)] if known.size_bytes is not None else []
        claims += [time_text(known.latency_ms_p50)] if known.latency_ms_p50 is not None else []
    return ", ".join(claims) or title.lower()


def badge_svg(report: EfficiencyReport) -> str:
    """Return the badge as an SVG that loads nothing; it holds no name of a model."""
    text = badge_text(report)
    left, right = (round(len(part) * _LETTER + 2 * _MARGIN) for part in (NAME, text))
    label, colour = escape(f"{NAME}: {text}"), _COLOURS.get(verdict(report), _OTHER)
    font = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="{_HEIGHT}" role="img" '
        f'aria-label="{label}"><title>{label}</title>'
        f'<clipPath id="r"><rect width="{left + right}" height="{_HEIGHT}" rx="3"/></clipPath>'
        f'<g clip-path="url(#r)"><rect width="{left}" height="{_HEIGHT}" fill="#333"/>'
        f'<rect x="{left}" width="{right}" height="{_HEIGHT}" fill="{colour}"/></g>'
        f'<g {font}><text x="{left / 2:g}" y="14">{NAME}</text>'
        f'<text x="{left + right / 2:g}" y="14">{escape(text)}</text></g></svg>\n'
    )


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 1.1 else f"{ratio:.1f}x"


CARD = "card.md"

_HUB_METRICS = {"top1_accuracy": "accuracy", "top1": "accuracy", "perplexity": "perplexity", "r2": "r_squared"}
"""Metrics of ours by their ids on hf.co/metrics."""
_LICENCE = "Fill in before publishing: it depends on the licences of the original model and its data."


def card_markdown(report: EfficiencyReport, base_model: str | None = None) -> str:
    """Return the card of a report's artifact.

    Args:
        report: of the run that saved it.
        base_model: id of the original on the Hugging Face hub, if it is there.
    """
    load = _load_lines(report)
    report = without_paths(report).model_copy(update={"alternatives": []})
    measured = report.after or report.before
    model = str(report.request.get("model") or "model")
    version = report.environment.versions.get("omgoptim", "")
    form = f": {safe(measured.precision, 40)} on {safe(measured.runtime, 40)}" if measured else ""
    parts = [
        _front_matter(report, measured, model, base_model),
        f"# {code(model, 120)}{form}",
        f"**{verdict(report)}** {safe(report.summary, 1200)}",
        "## How it was created",
        f"By `omgoptim {clean(report.verb, 40)}`, version {safe(version, 40)}: {code(report.repeat, 800)}",
        *(section_markdown(section(report, False)) for section in HOW if section is not candidates_section),
        "## Numbers",
        "Measured on this artifact, opened again in a fresh process. Ratios are before / after.",
        section_markdown(comparison_section(report, True), noted=True),
        section_markdown(warnings_section(report, True)),
        "## Machine",
        section_markdown(environment_section(report, True)),
        *(["## How to open it", "In this folder:", load] if load else []),
        "## Licence",
        _LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: EfficiencyReport, measured: Measurement | None, model: str, base_model: str | None) -> str:
    lines = ["---", "license:  # yours to fill in"]
    precision = measured.precision if measured else ""
    if base_model:
        lines.append(f"base_model: {_yaml(base_model)}")
        relation = "quantized" if precision.startswith("int") else "finetune" if report.training else ""
        lines += [f"base_model_relation: {relation}"] if relation else []
    files = measured.size_files if measured else []
    form = ["onnx"] if any(name.endswith(".onnx") for name in files) else []
    lines += ["tags:", *(f"- {_yaml(tag)}" for tag in ("omgoptim", *form, *([precision] if precision else [])))]
    return "\n".join([*lines, *_model_index(report, measured, model), "---"])


def _model_index(report: EfficiencyReport, measured: Measurement | None, model: str) -> list[str]:
    """The quality as a result of the hub's `model-index`; empty where it is only an agreement with the original."""
    if measured is None or measured.quality is None or not measured.metric or measured.metric in AGREEMENT_METRICS:
        return []
    metric = clean(measured.metric, 80)
    kind = _HUB_METRICS.get(metric) or re.sub(r"[^\w.-]+", "_", metric)
    data = str(report.request.get("data") or "evaluation data")
    samples = f" ({measured.samples} samples)" if measured.samples else ""
    return [
        "model-index:",
        f"- name: {_yaml(model)}",
        "  results:",
        "  - task:",
        "      type: other  # of hf.co/tasks",
        "    dataset:",
        f"      name: {_yaml(f'{data}{samples}')}",
        "      type: custom  # an id of hf.co/datasets if it is one",
        "    metrics:",
        f"    - type: {_yaml(kind)}",
        f"      value: {measured.quality:.6g}",
        f"      name: {_yaml(metric)}",
    ]


def _load_lines(report: EfficiencyReport) -> str:
    """Return the code that opens the artifact from its own folder, as an indented block, which no text can close."""
    if report.artifact is None:
        return ""
    inside = re.escape(report.artifact.path.replace("\\", "\\\\"))
    load = re.sub(rf"{inside}(?:[\\/]+|(?=['\"]))", "./", report.artifact.load)
    return "\n".join(f"    {clean(line, 400)}" for line in load.splitlines())


def _yaml(text: str) -> str:
    """Return a text as a double-quoted scalar on one line: a JSON string is one."""
    return json.dumps(clean(text, 200), ensure_ascii=False)
