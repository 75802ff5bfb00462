"""Claims of a report, the same in every form: verdict, "faster", the before / after table.

"Faster" needs an interval that excludes 1, "the teacher helped" one that excludes 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from omgoptim.render.numbers import SAME, count_text, drop_text, if_known, plain, ratio_text, size_text, time_text
from omgoptim.reports import Control, EfficiencyReport, Gains, Measurement, Total
from omgoptim.reports.measured import SMALLER

Tone = Literal["better", "worse", "same", "open"]
"""`better` is for what may be claimed: a speed whose interval excludes 1, a size, memory or count that is smaller by
at least SMALLER, and only where the outcome is ok. `open`: the number is shown, but what was measured does not decide
which way it goes.
"""

TIMES = ("latency_ms_p50", "latency_ms_p90", "throughput_per_s")
"""Fields of a measurement that mean nothing where the machine was overloaded."""


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A line of the before / after table; a side that was not measured is an empty string."""

    label: str
    before: str
    after: str
    gain: str = ""
    tone: Tone = "same"


def verdict(report: EfficiencyReport) -> str:
    """Return the outcome in one or two words."""
    if report.request.get("plan"):
        return "PLAN"
    if report.outcome == "ok" and report.verb in ("profile", "compare"):
        return "MEASURED"
    return {"ok": "OK", "no_gain": "NO GAIN", "guard_failed": "GUARD FAILED"}[report.outcome]


def speed_undecided(report: EfficiencyReport) -> bool:
    """Return True if times were measured but no ratio of them is reliable."""
    return report.gains is not None and report.gains.launches is not None and report.gains.speedup is None


def shown_sides(report: EfficiencyReport) -> tuple[Measurement | None, Measurement | None]:
    """Return both sides of the comparison, without times if the machine was overloaded."""
    if not speed_undecided(report):
        return report.before, report.after
    nothing = dict.fromkeys(TIMES)
    before, after = (side.model_copy(update=nothing) if side else None for side in (report.before, report.after))
    return before, after


def sparsity_text(measured: Measurement) -> str:
    """Zeros as a share of the parameters: `90%`; empty where they were not counted."""
    if not measured.params or measured.nonzero_params is None:
        return ""
    return f"{100 * (1 - measured.nonzero_params / measured.params):.3g}%"


def packed_size_text(measured: Measurement) -> str:
    """Return the packed size, and that with zeros stored as numbers: `2.1 MB, 8.9 MB dense`."""
    if measured.size_bytes is None:
        return ""
    if measured.dense_size_bytes is None:
        return size_text(measured.size_bytes)
    return f"{size_text(measured.size_bytes)}, {size_text(measured.dense_size_bytes)} dense"


def speed_claim(gains: Gains) -> tuple[str, Tone]:
    """Return the claim on speed: faster or slower only if the interval excludes 1."""
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
    """Return the drop in quality with its interval; red only where the guard failed."""
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


def claimed(tone: Tone, report: EfficiencyReport) -> Tone:
    """Return a tone for this report: no gain is shown unless the outcome is ok."""
    return "same" if tone == "better" and report.outcome != "ok" else tone


def control_claim(control: Control) -> tuple[str, Tone]:
    """Return the claim on the effect of distillation; significant only if the interval excludes 0."""
    if control.gain is None:
        return "", "same"
    if control.gain_low is None or control.gain_high is None:
        return f"distillation {control.gain:+.4f} (point estimate)", "open"
    interval = f"95 % interval {control.gain_low:+.4f} to {control.gain_high:+.4f}"
    if control.gain_low > 0:
        return f"distillation gained {control.gain:.4f} ({interval})", "better"
    if control.gain_high < 0:
        return f"distillation lost {-control.gain:.4f} ({interval})", "worse"
    return f"no significant effect of distillation ({control.gain:+.4f}, {interval})", "open"


def sides(report: EfficiencyReport) -> tuple[str, str]:
    """Return the names of the two columns of the table."""
    return ("teacher", "student") if report.verb == "distill" else ("before", "after")


def comparison_rows(report: EfficiencyReport) -> list[ComparisonRow]:
    """Return the before / after / gain table, one row per quantity that was measured on either side."""
    before, after = shown_sides(report)
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
    if speed_undecided(report):
        rows.append(ComparisonRow("speed", "", "undecided", "the machine was overloaded", "open"))
    if gains.agreement is not None:
        rows.append(ComparisonRow("agreement", "", f"{gains.agreement:.4f}", "same outputs"))
    if report.control is not None and report.control.quality is not None:
        rows.append(
            ComparisonRow("without the teacher", "", f"{report.control.quality:.4f}", *control_claim(report.control))
        )
    return [replace(row, tone=claimed(row.tone, report)) for row in rows if row.before or row.after]


def total_text(total: Total) -> str:
    """Return `7.90x smaller, 2.10x fewer parameters, drop 0.0100; total speedup not measured`."""
    parts = [
        _ratio(total.size_ratio, "smaller", "larger")[0],
        _of_count(total.params_ratio, "parameters"),
        _of_count(total.macs_ratio, "MACs"),
        ratio_text(total.speedup) + " the speed" if total.speedup is not None else "",
        f"drop {drop_text(total.quality_drop)}" if total.quality_drop is not None else "",
    ]
    numbers = ", ".join(part for part in parts if part and part != "same") or "the same size"
    return numbers if total.speedup is not None else f"{numbers}; total speedup not measured"


def size_files_text(report: EfficiencyReport) -> str:
    """Return the files that a size counts: `model.onnx`, or both sides if they differ; empty if unknown."""
    names = [
        ", ".join(plain(name, 80) for name in side.size_files[:8]) for side in (report.before, report.after) if side
    ]
    if len(names) == 2 and names[0] and names[1] and names[0] != names[1]:
        return f"{names[0]} -> {names[1]}"
    return names[-1] if names else ""


def _of_count(ratio: float | None, what: str) -> str:
    text, _ = _ratio(ratio, "fewer")
    return "" if text in ("", "same") else f"{text} {what}"


def quality_label(measured: Measurement | None) -> str:
    """Return `quality (top1, 360 samples)`."""
    if measured is None or measured.metric is None:
        return "quality"
    samples = f", {measured.samples} samples" if measured.samples else ""
    return f"quality ({plain(measured.metric, 40)}{samples})"


def side_title(name: str, measured: Measurement | None) -> str:
    """Return `after: onnxruntime int8`."""
    return f"{name}: {measured.runtime} {measured.precision}" if measured else name


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
) -> ComparisonRow:
    sides = [pick(side) if side else None for side in (before, after)]
    shown = ["" if value is None else show(value) for value in sides]
    return ComparisonRow(label, shown[0], shown[1], *gain)


def _fewer_params(before: Measurement | None, after: Measurement | None) -> tuple[str, Tone]:
    """Return the ratio of parameters; empty if their number is unchanged."""
    if not before or not after or not before.params or not after.params or before.params == after.params:
        return "", "same"
    return _ratio(before.params / after.params, "fewer")


def _nonzero(before: Measurement | None, after: Measurement | None) -> list[ComparisonRow]:
    """Return the row of non-zero parameters, if there are zeros."""
    sides = [side for side in (before, after) if side]
    if all(side.nonzero_params in (None, side.params) for side in sides):
        return []
    zeros = f"{sparsity_text(after)} zeros" if after and before and after.nonzero_params is not None else ""
    return [_row("non-zero parameters", before, after, lambda m: m.nonzero_params, count_text, (zeros, "same"))]


def _dense_size(before: Measurement | None, after: Measurement | None) -> list[ComparisonRow]:
    """Return the row of the dense size, if zeros are packed."""
    if not any(side and side.dense_size_bytes is not None for side in (before, after)):
        return []
    dense = [None if side is None else side.dense_size_bytes or side.size_bytes for side in (before, after)]
    shown = [if_known(size_text, size) for size in dense]
    return [ComparisonRow("dense size", shown[0], shown[1])]
