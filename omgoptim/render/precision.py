"""Coverage, guard and explanation of a quantization, in the words that every renderer uses."""

from __future__ import annotations

from collections.abc import Sequence

from omgoptim.render import facts
from omgoptim.reports import (
    Alternative,
    Coverage,
    EfficiencyReport,
    Explanation,
    Finding,
    Gain,
    GainsBy,
    Guard,
    LayerNoise,
    LayerPrecision,
    TimeShare,
)

NAMED = 4
"""How many layers a line names."""

_TONES: dict[str, facts.Tone] = {"REAL": "better", "SIMULATED": "open", "NO-OP": "worse"}


def parts_text(parts: GainsBy) -> str:
    """`engine alone 3.10x (3.00 to 3.21), fewer bits on it 1.42x (1.38 to 1.46)`; empty where speed is undecided."""
    if parts.engine.speedup is None or parts.precision.speedup is None:
        return ""
    return f"engine alone {_gain_text(parts.engine)}, fewer bits on it {_gain_text(parts.precision)}"


def _gain_text(gain: Gain) -> str:
    ratio = facts.ratio_text(gain.speedup or 0.0)
    if gain.speedup_low is None or gain.speedup_high is None:
        return f"{ratio} (point estimate)"
    return f"{ratio} ({gain.speedup_low:.2f} to {gain.speedup_high:.2f})"


def alternative_texts(report: EfficiencyReport) -> list[str]:
    """`fp32-on-openvino: same size, 3.10x the speed, drop 0.0000; best quality; omgoptim pick RUN NAME`.

    What is the best in something comes first.
    """
    ordered = sorted(report.alternatives, key=lambda alternative: not alternative.best_for)
    return [_alternative_text(alternative) for alternative in ordered]


def _alternative_text(one: Alternative) -> str:
    numbers = [_size_text(one.size_ratio)] if one.size_ratio is not None else []
    numbers += [f"{facts.ratio_text(one.speedup)} the speed"] if one.speedup is not None else []
    numbers += [f"drop {one.quality_drop:.4f}"] if one.quality_drop is not None else []
    told = f"best {' and '.join(one.best_for)}" if one.best_for else ""
    told = told if one.holds else "fails the guard"
    return "; ".join(filter(None, [f"{one.name}: {', '.join(numbers)}", told, one.command]))


def _size_text(ratio: float) -> str:
    if abs(ratio - 1) < facts.SAME:
        return "same size"
    return f"{facts.ratio_text(ratio)} smaller" if ratio > 1 else f"{facts.ratio_text(1 / ratio)} larger"


def coverage_text(coverage: Coverage) -> str:
    """`REAL. 20 of 21 layers in int8, 99 % of the weight bytes; 20 computed in integers by onnxruntime.`"""
    return f"{coverage.verdict}. {facts.plain(coverage.why, 300)}"


def coverage_tone(coverage: Coverage) -> facts.Tone:
    return _TONES[coverage.verdict]


def precision_cells(layer: LayerPrecision) -> dict[str, str]:
    """The table of layers, column by column, for one of them."""
    return {
        "layer": path_text(layer.path),
        "operator": _then(facts.plain(layer.op, 40), facts.plain(layer.op_after, 40)),
        "shape": "x".join(map(str, layer.shape)),
        "stored in": _then(facts.plain(layer.dtype, 20), facts.plain(layer.dtype_after, 20)),
        "bytes": _then(facts.size_text(layer.bytes), facts.size_text(layer.bytes_after)),
        "computed in": facts.plain(layer.computed_in or "", 20),
        "why left": facts.plain(layer.reason or "", 160),
    }


def guard_texts(guard: Guard) -> list[str]:
    """Whether it holds and what that took; and which layers were kept in float, if any was."""
    ended = "holds" if guard.holds else "does not hold"
    evaluations = _count(guard.evaluations, "full evaluation")
    took = (
        f"drop {guard.quality_drop:.4f} on {f'{guard.samples} ' if guard.samples else 'the '}selection samples after "
        f"{evaluations}, {facts.wait_text(guard.seconds)}"
    )
    stopped = f" It stopped early: {facts.plain(guard.stopped, 120).rstrip('.')}." if guard.stopped else ""
    lines = [f"{ended}, {took}. {facts.plain(guard.why, 240)}{stopped}"]
    if guard.kept_in_float:
        kept = _count(len(guard.kept_in_float), "layer")
        lines.append(f"{kept} kept in float ({facts.size_text(guard.float_bytes)}): {paths_text(guard.kept_in_float)}")
    return lines


def noise_cells(layer: LayerNoise) -> dict[str, str]:
    """The table of sensitive layers, column by column, for one of them; see `noise_note`."""
    return {
        "layer": path_text(layer.path),
        "kind": facts.plain(layer.kind, 40),
        "alone": f"{layer.sqnr_db:.1f} dB",
        "gain in float": "" if layer.sqnr_gain_db is None else f"{layer.sqnr_gain_db:+.1f} dB",
        "recovered": "" if layer.recovered is None else f"{layer.recovered:+.4f}",
        "float weights": facts.size_text(layer.bytes),
    }


def noise_note(explanation: Explanation) -> str:
    """What the columns of `noise_cells` are."""
    whole = "" if explanation.sqnr_db is None else f", {explanation.sqnr_db:.1f} dB with all quantized"
    return (
        f"alone: signal-to-noise of the output with only this layer quantized{whole}; gain in float, recovered: signal "
        f"and {facts.plain(explanation.metric, 40)} that come back with only this layer in float, "
        f"on {explanation.samples} samples"
    )


def finding_text(finding: Finding) -> str:
    """`spread channels in a, b: the ranges differ by 40x. Fix: … (recovered +0.0120)`"""
    where = f" in {paths_text(finding.paths, 3)}" if finding.paths else ""
    brought = "" if finding.recovered is None else f" (recovered {finding.recovered:+.4f})"
    evidence = facts.plain(finding.evidence, 200).rstrip(".")
    return f"{facts.plain(finding.name, 60)}{where}: {evidence}. Fix: {facts.plain(finding.fix, 200)}{brought}"


def times_text(explanation: Explanation, most: int = NAMED) -> str:
    """`Conv 61% (int8), Softmax 20% (float); at most 1.64x faster if …`; empty without times."""
    shown = ", ".join(time_text(time) for time in explanation.times[:most])
    left = sum(time.share for time in explanation.times[most:])
    rest = f", the rest {left:.0%}" if left > 0 else ""
    bound = bound_text(explanation)
    return f"{shown}{rest}{f'; {bound}' if bound else ''}" if shown else ""


def time_text(time: TimeShare) -> str:
    return f"{facts.plain(time.kind, 40)} {time.share:.0%} ({numbers_text(time)})"


def numbers_text(time: TimeShare) -> str:
    return "integers" if time.quantized else "float"


def bound_text(explanation: Explanation) -> str:
    if explanation.speedup_bound is None:
        return ""
    return f"at most {facts.ratio_text(explanation.speedup_bound)} faster if what computes in integers took no time"


def path_text(path: str, limit: int = 80) -> str:
    return facts.plain(path, limit) or "the model itself"


def paths_text(paths: Sequence[str], most: int = NAMED) -> str:
    """The first few paths, and how many more there are."""
    shown = ", ".join(path_text(path, 60) for path in paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown


def _then(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
