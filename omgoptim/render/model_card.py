"""The card of an artifact, a `card.md` in its folder: what it is, how it was made, and its numbers.

The head has the metadata of Hugging Face's model cards where a report knows them; the licence is left to the user. The
same report gives the same card.
"""

from __future__ import annotations

import json
import re

from omgoptim.render.claims import verdict
from omgoptim.render.markdown_parts import code, safe
from omgoptim.render.sections.candidates import candidates_section
from omgoptim.render.sections.comparison import comparison_section
from omgoptim.render.sections.run import environment_section, warnings_section
from omgoptim.render.shared import HOW, section_markdown, without_paths
from omgoptim.reports import EfficiencyReport, Measurement
from omgoptim.text import clean

CARD = "card.md"

_HUB_METRICS = {"top1_accuracy": "accuracy", "top1": "accuracy", "perplexity": "perplexity", "r2": "r_squared"}
"""Metrics of ours by their ids on hf.co/metrics."""
_AGREEMENTS = ("top1_agreement", "cosine_agreement", "negative_kl", "agreement")
"""Metrics that compare with the original model: no result of a task."""
_LICENCE = (
    "To be filled in by whoever publishes it: it follows from the licences of the original model and of its data."
)


def card_markdown(report: EfficiencyReport, base_model: str | None = None) -> str:
    """The card of a report's artifact.

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
        "## How it was made",
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
    if measured is None or measured.quality is None or not measured.metric or measured.metric in _AGREEMENTS:
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
    """The code that opens the artifact from its own folder, as an indented block, which no text can close."""
    if report.artifact is None:
        return ""
    inside = re.escape(report.artifact.path.replace("\\", "\\\\"))
    load = re.sub(rf"{inside}(?:[\\/]+|(?=['\"]))", "./", report.artifact.load)
    return "\n".join(f"    {clean(line, 400)}" for line in load.splitlines())


def _yaml(text: str) -> str:
    """A text as a double-quoted scalar on one line: a JSON string is one."""
    return json.dumps(clean(text, 200), ensure_ascii=False)
