"""Coverage, guard and explanation of a quantization in the structured answer: the head in short, the whole bounded."""

from __future__ import annotations

from typing import Any

from omgoptim.render import facts, precision
from omgoptim.reports import EfficiencyReport, Explanation, Finding, Guard, LayerNoise

Json = dict[str, Any]

NESTED = (
    ("coverage", "layers"),
    ("guard", "kept_in_float"),
    ("explanation", "layers"),
    ("explanation", "findings"),
    ("explanation", "times"),
)
"""Lists inside of a report's records that grow with the model."""


def precision_head(report: EfficiencyReport) -> Json:
    """What a next decision needs; None or empty where a report has none of it. Lists are bounded."""
    coverage, explanation = report.coverage, report.explanation
    head: Json = {"coverage": None, "guard": _guard(report.guard) if report.guard else None}
    parts = report.gains_by
    head["gains_by"] = parts.model_dump(mode="json", exclude_none=True) if parts else None
    head["delivered"] = report.delivered
    left_out = {"path", "candidate", "runtime", "speedup_low", "speedup_high", "quality"}
    head["alternatives"] = [
        one.model_dump(mode="json", exclude=left_out, exclude_none=True) for one in report.alternatives[:5]
    ]
    if coverage is not None:
        head["coverage"] = coverage.model_dump(mode="json", exclude={"layers"}, exclude_none=True) | {
            "why": facts.plain(coverage.why, 300),
        }
    if explanation is not None:
        head |= _explanation(explanation)
    return head


def trimmed(answer: Json, keep: int) -> Json:
    """A whole report with the lists inside of its records cut to so many entries; each says how many there were."""
    for outer, inner in NESTED:
        record = answer.get(outer)
        if record and len(record[inner]) > keep:
            cut = {inner: record[inner][:keep], f"{inner}_in_all": len(record[inner])}
            answer = answer | {outer: record | cut}
    return answer


def _guard(guard: Guard) -> Json:
    return {
        "holds": guard.holds,
        "quality_drop": guard.quality_drop,
        "evaluations": guard.evaluations,
        "layers_in_float": len(guard.kept_in_float),
        "float_bytes": guard.float_bytes,
        "first": [precision.path_text(path, 60) for path in guard.kept_in_float[:3]],
        "told": facts.plain(precision.guard_texts(guard)[0], 400),
    }


def _explanation(explanation: Explanation) -> Json:
    numbers = {
        "metric": facts.plain(explanation.metric, 60),
        "samples": explanation.samples,
        "sqnr_db": explanation.sqnr_db,
        "speedup_bound": explanation.speedup_bound,
    }
    known = {key: value for key, value in numbers.items() if value is not None}
    return {
        "explanation": {"summary": facts.plain(explanation.summary, 600)} | known,
        "findings": [_finding(finding) for finding in explanation.findings[:4]],
        "noisiest_layers": [_noise(layer) for layer in explanation.layers[:5]],
        "times": [precision.time_text(time) for time in explanation.times[:4]],
    }


def _finding(finding: Finding) -> Json:
    told: Json = {
        "name": facts.plain(finding.name, 60),
        "paths": [precision.path_text(path) for path in finding.paths[:3]],
        "evidence": facts.plain(finding.evidence, 160),
        "fix": facts.plain(finding.fix, 160),
    }
    return told if finding.recovered is None else told | {"recovered": finding.recovered}


def _noise(layer: LayerNoise) -> Json:
    values = layer.model_dump(mode="json", exclude_none=True)
    return values | {"path": precision.path_text(layer.path), "kind": facts.plain(layer.kind, 40)}
