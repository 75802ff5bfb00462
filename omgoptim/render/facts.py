"""The facts of a report in the words in which every renderer tells them: numbers, rows, claims.

The renderers differ in form only. What may be said ("faster" needs an interval that excludes 1) is decided here, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from omgoptim.render import undecided
from omgoptim.reports import Candidate, Control, EfficiencyReport, Gains, Measurement, RunState, Skip, Total
from omgoptim.reports.measured import SMALLER
from omgoptim.text import clean, clean_block

Tone = Literal["better", "worse", "same", "open"]
"""`better` is for what may be claimed: a speed whose interval excludes 1, a size, memory or count that is smaller by
at least SMALLER, and only where the outcome is ok. `open`: the number is told, but what was measured does not decide
which way it goes.
"""

SAME = 0.005
"""A ratio nearer to 1 than this is told as no change."""

_RANK = {"chosen": 0, "finalist": 1, "planned": 2, "dropped": 3, "failed": 4, "skipped": 5}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the before / after table; a side that was not measured is an empty string."""

    label: str
    before: str
    after: str
    gain: str = ""
    tone: Tone = "same"


@dataclass(frozen=True, slots=True)
class SkipGroup:
    """Layers that were left alone for one reason."""

    reason: str
    paths: tuple[str, ...]


def plain(text: str, limit: int = 400) -> str:
    """Text of a model, a log or a library on one line: no control or invisible characters, and bounded."""
    return clean(text, limit)


def block(text: str, limit: int = 2000) -> str:
    """Like `plain`, but the line breaks stay: for logs and code."""
    return clean_block(text, limit)


def progress_text(state: RunState) -> str:
    """`measuring, 40%, 12 s left`"""
    return ", ".join([stage_text(state), *progress_numbers(state)])


def stage_text(state: RunState) -> str:
    return plain(state.stage or state.status, 120)


def progress_numbers(state: RunState) -> list[str]:
    """What is known of: percent done, time left."""
    done = [] if state.progress is None else [f"{state.progress:.0%}"]
    return done if state.eta_s is None else [*done, f"{wait_text(state.eta_s)} left"]


def size_text(size: int) -> str:
    """Bytes in decimal units: 1 MB is 1,000,000 bytes."""
    return _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """A count with three digits and k, M, G or T."""
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def time_text(ms: float) -> str:
    """A duration given in milliseconds."""
    if ms >= 1000:
        return f"{ms / 1000:.2f} s"
    return f"{ms:.1f} ms" if ms >= 100 else f"{ms:.3g} ms"


def wait_text(seconds: float) -> str:
    """How long something still takes, as a person says it."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def verdict(report: EfficiencyReport) -> str:
    """The outcome in one or two words."""
    if report.request.get("plan"):
        return "PLAN"
    if report.outcome == "ok" and report.verb in ("profile", "compare"):
        return "MEASURED"
    return {"ok": "OK", "no_gain": "NO GAIN", "guard_failed": "GUARD FAILED"}[report.outcome]


def changed_paths(report: EfficiencyReport) -> list[str]:
    """The layers that were changed, each once however much of it was."""
    return list(dict.fromkeys(change.path for change in report.changed))


def changed_title(report: EfficiencyReport) -> str:
    """What the list of changed layers is: done, or planned."""
    return "would change" if report.request.get("plan") else "changed"


def sparsity_text(measured: Measurement) -> str:
    """Zeros as a share of the parameters: `90%`; empty where they were not counted."""
    if not measured.params or measured.nonzero_params is None:
        return ""
    return f"{100 * (1 - measured.nonzero_params / measured.params):.3g}%"


def size_words(measured: Measurement) -> str:
    """`2.1 MB, 8.9 MB if zeros were stored as numbers`"""
    if measured.size_bytes is None:
        return ""
    if measured.dense_size_bytes is None:
        return size_text(measured.size_bytes)
    return f"{size_text(measured.size_bytes)}, {size_text(measured.dense_size_bytes)} if zeros were stored as numbers"


def speed_claim(gains: Gains) -> tuple[str, Tone]:
    """What may be said about speed: faster or slower only where the interval excludes 1."""
    if gains.speedup is None:
        return "", "same"
    if gains.speedup_low is None or gains.speedup_high is None:
        return f"{ratio_text(gains.speedup)} (point estimate)", "open"
    interval = f"{gains.speedup_low:.2f} to {gains.speedup_high:.2f}"
    if gains.speedup_low > 1:
        return f"{ratio_text(gains.speedup)} faster ({interval})", "better"
    if gains.speedup_high < 1:
        interval = f"{1 / gains.speedup_high:.2f} to {1 / gains.speedup_low:.2f}"  # in the unit of the figure before it
        return f"{ratio_text(1 / gains.speedup)} slower ({interval})", "worse"
    return f"{ratio_text(gains.speedup)}, undecided ({interval})", "open"


def quality_claim(report: EfficiencyReport) -> tuple[str, Tone]:
    """The drop in quality with its interval; red only where the guard failed."""
    gains = report.gains
    if gains is None or gains.quality_drop is None:
        return "", "same"
    text = f"drop {drop_text(gains.quality_drop)}"
    if gains.quality_drop_low is not None and gains.quality_drop_high is not None:
        text += f" ({drop_text(gains.quality_drop_low)} to {drop_text(gains.quality_drop_high)})"
    if report.outcome == "guard_failed":
        return text, "worse"
    gained = gains.quality_drop_high is not None and round(gains.quality_drop_high, 4) < 0
    return text, claimed("better" if gained else "same", report)


def drop_text(drop: float) -> str:
    """A drop with four digits; one that rounds to nothing has no sign."""
    return f"{round(drop, 4) or 0.0:.4f}"


def claimed(tone: Tone, report: EfficiencyReport) -> Tone:
    """A tone in this report: nothing is shown as a gain where the outcome is not ok."""
    return "same" if tone == "better" and report.outcome != "ok" else tone


def control_claim(control: Control) -> tuple[str, Tone]:
    """What may be said of a teacher: that it brought or cost something only where the interval excludes 0."""
    if control.gain is None:
        return "", "same"
    if control.gain_low is None or control.gain_high is None:
        return f"{control.gain:+.4f} with the teacher (point estimate)", "open"
    interval = f"({control.gain_low:+.4f} to {control.gain_high:+.4f})"
    if control.gain_low > 0:
        return f"the teacher brought {control.gain:+.4f} {interval}", "better"
    if control.gain_high < 0:
        return f"the teacher cost {-control.gain:.4f} {interval}", "worse"
    return f"{control.gain:+.4f} with the teacher, undecided {interval}", "open"


def sides(report: EfficiencyReport) -> tuple[str, str]:
    """What the two columns of the table are called."""
    return ("teacher", "student") if report.verb == "distill" else ("before", "after")


def comparison_rows(report: EfficiencyReport) -> list[Row]:
    """The before / after / gain table, one row per quantity that was measured on either side."""
    before, after = undecided.shown_sides(report)
    if before is None and after is None:
        return []
    gains = report.gains or Gains()
    known = after or before
    batch = f" (batch {known.batch})" if known and known.batch else ""
    rows = [
        _row("size", before, after, lambda m: m.size_bytes, size_text, _ratio(gains.size_ratio, "smaller", "larger")),
        *_dense_size(before, after),
        _row("parameters", before, after, lambda m: m.params, count_text, _fewer_params(before, after)),
        *_nonzero(before, after),
        _row("MACs per sample", before, after, lambda m: m.macs, count_text, _ratio(gains.macs_ratio, "fewer", "more")),
        _row("latency p50", before, after, lambda m: m.latency_ms_p50, time_text, speed_claim(gains)),
        _row("latency p90", before, after, lambda m: m.latency_ms_p90, time_text),
        _row(
            f"throughput{batch}",
            before,
            after,
            lambda m: m.throughput_per_s,
            lambda rate: f"{rate:,.0f} /s" if rate >= 10 else f"{rate:.2f} /s",
            (ratio_text(gains.throughput_ratio), "same") if gains.throughput_ratio is not None else ("", "same"),
        ),
        _row(
            "peak memory", before, after, lambda m: m.peak_memory_bytes, size_text, _ratio(gains.memory_ratio, "less")
        ),
        _row(quality_label(known), before, after, lambda m: m.quality, lambda q: f"{q:.4f}", quality_claim(report)),
    ]
    if undecided.speed_undecided(report):
        rows.append(Row("speed", "", "undecided", "the machine was overloaded", "open"))
    if gains.agreement is not None:
        rows.append(Row("agreement", "", f"{gains.agreement:.4f}", "same answers"))
    if report.control is not None and report.control.quality is not None:
        rows.append(Row("without the teacher", "", f"{report.control.quality:.4f}", *control_claim(report.control)))
    return [replace(row, tone=claimed(row.tone, report)) for row in rows if row.before or row.after]


def total_text(total: Total) -> str:
    """`7.90x smaller, 2.10x fewer parameters, drop 0.0100; speed not measured against it`"""
    told = [
        _ratio(total.size_ratio, "smaller", "larger")[0],
        _of_count(total.params_ratio, "parameters"),
        _of_count(total.macs_ratio, "MACs"),
        ratio_text(total.speedup) + " the speed" if total.speedup is not None else "",
        f"drop {drop_text(total.quality_drop)}" if total.quality_drop is not None else "",
    ]
    numbers = ", ".join(part for part in told if part and part != "same") or "the same size"
    return numbers if total.speedup is not None else f"{numbers}; speed not measured against it"


def size_files_text(report: EfficiencyReport) -> str:
    """Which files a size counts: `model.onnx`, or for both sides where they differ; empty where it is not known."""
    names = [", ".join(plain(name, 80) for name in side.size_files[:8]) for side in _sides(report)]
    if len(names) == 2 and names[0] and names[1] and names[0] != names[1]:
        return f"{names[0]} -> {names[1]}"
    return names[-1] if names else ""


def _sides(report: EfficiencyReport) -> list[Measurement]:
    return [side for side in (report.before, report.after) if side is not None]


def _of_count(ratio: float | None, what: str) -> str:
    text, _ = _ratio(ratio, "fewer")
    return "" if text in ("", "same") else f"{text} {what}"


def quality_label(measured: Measurement | None) -> str:
    """`quality (top1, 360 samples)`"""
    if measured is None or measured.metric is None:
        return "quality"
    samples = f", {measured.samples} samples" if measured.samples else ""
    return f"quality ({plain(measured.metric, 40)}{samples})"


def side_title(name: str, measured: Measurement | None) -> str:
    """`after: onnxruntime int8`"""
    return f"{name}: {measured.runtime} {measured.precision}" if measured else name


def ranked_candidates(report: EfficiencyReport) -> list[Candidate]:
    """The chosen one first, then finalists, then what was dropped or failed; the report's order within."""
    return sorted(report.candidates, key=lambda candidate: _RANK[candidate.status])


def skip_groups(skipped: list[Skip]) -> list[SkipGroup]:
    """What was skipped by reason, the commonest reason first."""
    groups: dict[str, list[str]] = {}
    for skip in skipped:
        groups.setdefault(skip.reason, []).append(skip.path)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [SkipGroup(reason, tuple(paths)) for reason, paths in ordered]


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {units[-1]}"


def _ratio(ratio: float | None, better: str, worse: str = "more") -> tuple[str, Tone]:
    if ratio is None or ratio <= 0:
        return "", "same"
    if abs(ratio - 1) < SAME:
        return "same", "same"
    text = f"{ratio_text(ratio)} {better}" if ratio > 1 else f"{ratio_text(1 / ratio)} {worse}"
    if 1 / SMALLER < ratio < SMALLER:
        return text, "same"
    return text, "better" if ratio > 1 else "worse"


def _row(
    label: str,
    before: Measurement | None,
    after: Measurement | None,
    pick: Callable[[Measurement], float | None],
    show: Callable[[Any], str],
    gain: tuple[str, Tone] = ("", "same"),
) -> Row:
    sides = [pick(side) if side else None for side in (before, after)]
    shown = ["" if value is None else show(value) for value in sides]
    return Row(label, shown[0], shown[1], *gain)


def _fewer_params(before: Measurement | None, after: Measurement | None) -> tuple[str, Tone]:
    """Said only where their number changed."""
    if not before or not after or not before.params or not after.params or before.params == after.params:
        return "", "same"
    return _ratio(before.params / after.params, "fewer")


def _nonzero(before: Measurement | None, after: Measurement | None) -> list[Row]:
    """A row of its own only where zeros exist: they take storage down, not the time of a dense kernel."""
    sides = [side for side in (before, after) if side]
    if all(side.nonzero_params in (None, side.params) for side in sides):
        return []
    zeros = f"{sparsity_text(after)} zeros" if after and before and after.nonzero_params is not None else ""
    return [_row("non-zero parameters", before, after, lambda m: m.nonzero_params, count_text, (zeros, "same"))]


def _dense_size(before: Measurement | None, after: Measurement | None) -> list[Row]:
    """A row of its own only where zeros take no bytes: what the files would be if they did."""
    if not any(side and side.dense_size_bytes is not None for side in (before, after)):
        return []
    dense = [None if side is None else side.dense_size_bytes or side.size_bytes for side in (before, after)]
    shown = ["" if size is None else size_text(size) for size in dense]
    return [Row("size if zeros were numbers", shown[0], shown[1])]
