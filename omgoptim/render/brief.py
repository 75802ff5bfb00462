"""A report cut to what an agent needs for its next decision: at most about 2,000 tokens, the verdict first.

Several clients show a model only the structured answer, others only the text: this is the structured one,
`markdown.py` the text, and each stands alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omgoptim.render import arms, facts, outputs, rounds
from omgoptim.render.brief_precision import precision_head, trimmed
from omgoptim.render.undecided import shown_sides
from omgoptim.reports import Candidate, Control, EfficiencyReport, Record

MAX_CHARACTERS = 8_000
"""About 2,000 tokens."""

MAX_FULL_CHARACTERS = 40_000
"""About 10,000 tokens: the most that `detail="full"` puts into a context."""

Json = dict[str, Any]


def report_files(folder: Path) -> dict[str, str]:
    """Where the whole report is."""
    return {"report": str(folder / "report.json"), "page": str(folder / "report.html")}


def to_json(record: Record) -> Json:
    """A record as plain JSON values; what is no number becomes null."""
    values: Json = json.loads(record.model_dump_json())
    return values


def brief_report(report: EfficiencyReport, folder: Path | None = None) -> Json:
    """The head, before, after, gains, the best candidates, and where the rest is. Lists are bounded."""
    before, after = shown_sides(report)
    answer: Json = {
        "outcome": report.outcome,
        "summary": facts.plain(report.summary, 1200),
        "warnings": _bounded_texts(report.warnings, 6, 300),
        "next_steps": [_dump(step) for step in report.next_steps[:4]],
        "verb": report.verb,
        "run_id": report.run_id,
        "before": _dump(before),
        "after": _dump(after),
        "gains": _dump(report.gains),
        "total": _dump(report.total, 80),
        **({"outputs": [_dump(one, 60) for one in listed]} if (listed := outputs.shown(report)[:8]) else {}),
        **precision_head(report),
        "artifact": {"path": report.artifact.path, "load": report.artifact.load} if report.artifact else None,
        "files": report_files(folder) if folder else None,
        "rounds": [_dump(one, 120) for one in rounds.shown_rounds(report, 8)],
        "training": facts.plain(rounds.training_text(report.training), 500) if report.training else None,
        "control": _control(report.control),
        "quality_by_epoch": arms.curve_lines(report),
        "sensitivity": [_slack(slack) for slack in rounds.extremes(rounds.slacks(report))],
        "candidates": [_candidate(one) for one in facts.ranked_candidates(report)[:6]],
        "layers": [_dump(layer, 120) for layer in report.layers[:6]],
        "changed_layers": len(facts.changed_paths(report)),
        "skipped": [
            {
                "reason": facts.plain(group.reason, 160),
                "layers": len(group.paths),
                "first": facts.plain(group.paths[0], 80),
            }
            for group in facts.skip_groups(report.skipped)[:3]
        ],
        "repeat": report.repeat,
    }
    answer = {key: value for key, value in answer.items() if value not in (None, [], {})} | {
        "warnings": answer["warnings"],
        "next_steps": answer["next_steps"],
    }
    answer = _cut(
        answer,
        MAX_CHARACTERS,
        [
            *(("skipped", 0), ("layers", 0), ("times", 2), ("sensitivity", 5), ("candidates", 2), ("rounds", 4)),
            ("alternatives", 3),
            *(("noisiest_layers", 2), ("findings", 1)),
            *(("warnings", 2), ("sensitivity", 0), ("next_steps", 1)),
            *(("noisiest_layers", 0), ("times", 0), ("rounds", 1), ("candidates", 1), ("findings", 0), ("warnings", 1)),
            *(("alternatives", 0), ("candidates", 0)),
            *(("quality_by_epoch", 1), ("rounds", 0), ("candidates", 0)),
        ],
    )
    if _length(answer) > MAX_CHARACTERS:  # names without end: every text is cut
        answer |= {key: facts.plain(answer[key], 300) for key in ("summary", "training") if answer.get(key)}
    return answer


def full_report(report: EfficiencyReport, folder: Path | None = None) -> Json:
    """The whole report as in report.json; a giant one has its lists cut, and says so; the short form if that is not
    enough."""
    answer = to_json(report)
    if folder:
        answer["files"] = report_files(folder)
    lists = ("changed", "skipped", "layers", "sensitivity", "candidates", "rounds")
    if _length(answer) > MAX_FULL_CHARACTERS:
        answer["training"] = _last_epochs(answer["training"])
        if answer["control"]:
            answer["control"] = answer["control"] | {"training": _last_epochs(answer["control"]["training"])}
        answer = trimmed(answer, 100)
    answer = _cut(answer, MAX_FULL_CHARACTERS, [(key, keep) for keep in (100, 20, 5) for key in lists])
    return answer if _length(answer) <= MAX_FULL_CHARACTERS else brief_report(report, folder)


def _candidate(one: Candidate) -> Json:
    fields = ("status", "runtime", "size_bytes", "speedup", "quality_drop")
    told = {key: value for key in fields if (value := getattr(one, key)) is not None}
    return {"name": facts.plain(one.name, 80)} | told | {"why": facts.plain(one.why, 160)}


def _control(control: Control | None) -> Json | None:
    if control is None:
        return None
    told: Json = {key: value for key, value in to_json(control).items() if key != "training" and value is not None}
    return told | {"told": facts.plain(arms.control_text(control, trained=False), 400)}


def _last_epochs(training: Json | None, most: int = 20) -> Json | None:
    if training is None:
        return None
    return training | {"epochs": training["epochs"][-most:], "epochs_in_all": len(training["epochs"])}


def _slack(slack: rounds.Slack) -> Json:
    worst = slack.worst
    told = {"path": facts.plain(slack.path, 80), "largest_drop": worst.quality_drop, "at": worst.amount}
    return told | ({"within_guard_up_to": slack.within} if slack.within is not None else {})


def _dump(record: Record | None, limit: int = 600) -> Json | None:
    """A record without what was not measured; its texts on one line."""
    if record is None:
        return None
    values = {key: value for key, value in to_json(record).items() if value not in (None, [])}
    return {key: facts.plain(value, limit) if isinstance(value, str) else value for key, value in values.items()}


def _bounded_texts(texts: list[str], most: int, limit: int) -> list[str]:
    shown = [facts.plain(text, limit) for text in texts[:most]]
    return [*shown, f"and {len(texts) - most} more in report.json"] if len(texts) > most else shown


def _length(answer: Json) -> int:
    return len(json.dumps(answer, ensure_ascii=False))


def _cut(answer: Json, limit: int, cuts: list[tuple[str, int]]) -> Json:
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
