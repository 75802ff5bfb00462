"""A report cut to what an agent needs for its next decision: at most about 2,000 tokens, the verdict first.

Several clients show a model only the structured answer, others only the text: this is the structured one,
`markdown.py` the text, and each stands alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omgoptim.render.claims import reliable_sides, verdict
from omgoptim.render.lists import (
    Sensitivity,
    SkipGroup,
    changed_paths,
    extremes,
    ranked_candidates,
    sensitivities,
    skip_groups,
)
from omgoptim.render.markdown import MAX_BRIEF, MAX_FULL
from omgoptim.render.numbers import path_text, plain
from omgoptim.render.sections.quantization import guard_texts, time_share_text
from omgoptim.render.sections.results import shown_outputs
from omgoptim.render.sections.training import control_text, curve_lines, shown_rounds, training_text
from omgoptim.reports import Candidate, Control, EfficiencyReport, Explanation, Finding, Guard, LayerNoise, Record

Json = dict[str, Any]

NESTED = (
    ("coverage", "layers"),
    ("guard", "kept_in_float"),
    ("explanation", "layers"),
    ("explanation", "findings"),
    ("explanation", "times"),
)
"""Lists inside of a report's records that grow with the model."""


def report_files(folder: Path) -> dict[str, str]:
    """Return the paths of the report and its page."""
    return {"report": str(folder / "report.json"), "page": str(folder / "report.html")}


def to_json(record: Record) -> Json:
    """Return a record as plain JSON values; NaN and infinity become null."""
    values: Json = json.loads(record.model_dump_json())
    return values


_CUTS = (
    *(("skipped", 0), ("layers", 0), ("times", 2), ("sensitivity", 5), ("candidates", 2), ("rounds", 4)),
    ("alternatives", 3),
    *(("noisiest_layers", 2), ("findings", 1)),
    *(("warnings", 2), ("sensitivity", 0), ("next_steps", 1)),
    *(("noisiest_layers", 0), ("times", 0), ("rounds", 1), ("candidates", 1), ("findings", 0), ("warnings", 1)),
    *(("alternatives", 0), ("candidates", 0)),
    *(("quality_by_epoch", 1), ("rounds", 0), ("candidates", 0)),
)
"""List and how many entries it keeps, in the order in which a report that is too long is cut: least needed first.
Chosen."""


def brief_report(report: EfficiencyReport, folder: Path | None = None) -> Json:
    """Return the head, before, after, gains, the best candidates, and where the rest is, with bounded lists."""
    before, after = reliable_sides(report)
    answer: Json = {
        "outcome": report.outcome,
        "summary": plain(report.summary, 1200),
        "warnings": _bounded_texts(report.warnings, 6, 300),
        "next_steps": [_dump(step) for step in report.next_steps[:4]],
        "verdict": verdict(report),
        "verb": report.verb,
        "run_id": report.run_id,
        "before": _dump(before),
        "after": _dump(after),
        "gains": _dump(report.gains),
        "total": _dump(report.total, 80),
        **({"outputs": [_dump(one, 60) for one in listed]} if (listed := shown_outputs(report)[:8]) else {}),
        **_quantization_head(report),
        "artifact": {"path": report.artifact.path, "load": report.artifact.load} if report.artifact else None,
        "files": report_files(folder) if folder else None,
        "rounds": [_dump(one, 120) for one in shown_rounds(report, 8)],
        "training": plain(training_text(report.training), 500) if report.training else None,
        "control": _control(report.control),
        "quality_by_epoch": curve_lines(report),
        "sensitivity": [_sensitivity(one) for one in extremes(sensitivities(report))],
        "steps": [_dump(one, 120) for one in report.steps[:12]],
        "candidates": [_candidate(one) for one in ranked_candidates(report)[:6]],
        "layers": [_dump(layer, 120) for layer in report.layers[:6]],
        "changed_layers": len(changed_paths(report)),
        "skipped": [_skips(group) for group in skip_groups(report.skipped)[:3]],
        "repeat": report.repeat,
    }
    answer = {key: value for key, value in answer.items() if value not in (None, [], {})} | {
        "warnings": answer["warnings"],
        "next_steps": answer["next_steps"],
    }
    answer = _cut(answer, MAX_BRIEF, _CUTS)
    if _length(answer) > MAX_BRIEF:  # names without end: every text is cut
        answer |= {key: plain(answer[key], 300) for key in ("summary", "training") if answer.get(key)}
    return answer


def full_report(report: EfficiencyReport, folder: Path | None = None) -> Json:
    """Return the whole report as in report.json.

    The lists of a very long one are cut, with a note; if that is not enough, the short form is returned.
    """
    answer = to_json(report)
    if folder:
        answer["files"] = report_files(folder)
    lists = ("changed", "skipped", "layers", "sensitivity", "candidates", "rounds")
    if _length(answer) > MAX_FULL:
        answer["training"] = _last_epochs(answer["training"])
        if answer["control"]:
            answer["control"] = answer["control"] | {"training": _last_epochs(answer["control"]["training"])}
        answer = _with_short_lists(answer, 100)
    answer = _cut(answer, MAX_FULL, [(key, keep) for keep in (100, 20, 5) for key in lists])
    return answer if _length(answer) <= MAX_FULL else brief_report(report, folder)


def _candidate(one: Candidate) -> Json:
    fields = ("status", "runtime", "size_bytes", "speedup", "quality_drop")
    known = {key: value for key in fields if (value := getattr(one, key)) is not None}
    return {"name": plain(one.name, 80)} | known | {"why": plain(one.why, 160)}


def _skips(group: SkipGroup) -> Json:
    return {"reason": plain(group.reason, 160), "layers": len(group.paths), "first": plain(group.paths[0], 80)}


def _control(control: Control | None) -> Json | None:
    if control is None:
        return None
    known: Json = {key: value for key, value in to_json(control).items() if key != "training" and value is not None}
    return known | {"summary": plain(control_text(control, trained=False), 400)}


def _last_epochs(training: Json | None, most: int = 20) -> Json | None:
    if training is None:
        return None
    return training | {"epochs": training["epochs"][-most:], "epochs_in_all": len(training["epochs"])}


def _sensitivity(one: Sensitivity) -> Json:
    worst = one.worst
    known = {"path": plain(one.path, 80), "largest_drop": worst.quality_drop, "at": worst.amount}
    return known | ({"within_guard_up_to": one.within} if one.within is not None else {})


def _dump(record: Record | None, limit: int = 600) -> Json | None:
    """Return a record without what was not measured; its texts on one line."""
    if record is None:
        return None
    values = {key: value for key, value in to_json(record).items() if value not in (None, [])}
    return {key: plain(value, limit) if isinstance(value, str) else value for key, value in values.items()}


def _bounded_texts(texts: list[str], most: int, limit: int) -> list[str]:
    shown = [plain(text, limit) for text in texts[:most]]
    return [*shown, f"and {len(texts) - most} more in report.json"] if len(texts) > most else shown


def _length(answer: Json) -> int:
    return len(json.dumps(answer, ensure_ascii=False))


def _cut(answer: Json, limit: int, cuts: Sequence[tuple[str, int]]) -> Json:
    """Shorten lists in the order given until the answer fits, and say what was cut."""
    cut: Json = {}
    for key, keep in cuts:
        if _length(_with_cut(answer, cut)) <= limit:
            break
        items = answer.get(key, [])
        if len(items) > keep:
            cut[key] = cut.get(key, len(items))
            answer = answer | {key: items[:keep]}
    return _with_cut(answer, cut)


def _with_cut(answer: Json, cut: Json) -> Json:
    return answer | {"cut": {"total": cut, "rest": "in report.json"}} if cut else answer


def _quantization_head(report: EfficiencyReport) -> Json:
    """Return the fields that a next decision needs; lists are bounded, absent parts are None or empty."""
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
            "why": plain(coverage.why, 300),
        }
    if explanation is not None:
        head |= _explanation(explanation)
    return head


def _with_short_lists(answer: Json, keep: int) -> Json:
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
        "first": [path_text(path, 60) for path in guard.kept_in_float[:3]],
        "summary": plain(guard_texts(guard)[0], 400),
    }


def _explanation(explanation: Explanation) -> Json:
    numbers = {
        "metric": plain(explanation.metric, 60),
        "samples": explanation.samples,
        "sqnr_db": explanation.sqnr_db,
        "speedup_bound": explanation.speedup_bound,
    }
    known = {key: value for key, value in numbers.items() if value is not None}
    return {
        "explanation": {"summary": plain(explanation.summary, 600)} | known,
        "findings": [_finding(finding) for finding in explanation.findings[:4]],
        "noisiest_layers": [_noise(layer) for layer in explanation.layers[:5]],
        "times": [time_share_text(time) for time in explanation.times[:4]],
    }


def _finding(finding: Finding) -> Json:
    known: Json = {
        "name": plain(finding.name, 60),
        "paths": [path_text(path) for path in finding.paths[:3]],
        "evidence": plain(finding.evidence, 160),
        "fix": plain(finding.fix, 160),
    }
    return known if finding.recovered is None else known | {"recovered": finding.recovered}


def _noise(layer: LayerNoise) -> Json:
    values = layer.model_dump(mode="json", exclude_none=True)
    return values | {"path": path_text(layer.path), "kind": plain(layer.kind, 40)}
