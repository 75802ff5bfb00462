"""Quantization: gains by cause, coverage, guard, alternatives, and the explanation of the quality loss."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Columns, Items, Line, Section, Table, Text, cells_of, charts
from omgoptim.render.charts import coverage_strip, noise_bars
from omgoptim.render.claims import Tone
from omgoptim.render.numbers import (
    SAME,
    path_text,
    paths_text,
    plain,
    ratio_text,
    size_text,
    time_text,
    wait_text,
)
from omgoptim.reports import (
    Alternative,
    Coverage,
    EfficiencyReport,
    Explanation,
    Finding,
    Gain,
    GainsBy,
    Guard,
    LayerPrecision,
    TimeShare,
)
from omgoptim.text import plural

BRIEF = {"alternatives": 5, "findings": 3, "layers": 5, "times": 4}
"""Most entries of each kind in the short form. Chosen: what fits a screen."""

_TONES: dict[str, Tone] = {"REAL": "better", "SIMULATED": "open", "NO-OP": "worse"}


def quantization_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Gains by their cause, coverage, guard, alternatives; in full every layer with weights."""
    blocks: list[Block] = []
    if report.gains_by is not None and (parts := parts_text(report.gains_by)):
        blocks.append(Line("speedup", Text(parts, limit=300)))
    if report.coverage is not None:
        verdict = Text(f"{report.coverage.verdict}.", tone=coverage_tone(report.coverage))
        blocks.append(Line("coverage", Text(plain(report.coverage.why, 300), limit=500), verdict))
    blocks += charts(coverage_strip(report.coverage) if full else None)
    if report.guard is not None:
        first, *kept = guard_texts(report.guard)
        blocks.append(Line("guard", Text(first, tone="same" if report.guard.holds else "worse", limit=600)))
        blocks += [Line("", Text(line, limit=600)) for line in kept]
    if alternatives := alternative_texts(report):
        shown = alternatives if full else alternatives[: BRIEF["alternatives"]]
        texts = tuple(Text(text, limit=300) for text in shown)
        blocks.append(Items("other finalists", texts, len(alternatives) - len(shown)))
    if full and report.coverage is not None and report.coverage.layers:
        cells = [precision_cells(layer) for layer in report.coverage.layers]
        columns = {name: [Text(cell[name], code=name == "layer") for cell in cells] for name in cells[0]}
        title = f"layers with weights ({len(cells)})"
        blocks.append(Table(*cells_of(columns, numeric=["bytes"]), title=title, folded=True))
    return Section("Coverage and guard" if report.guard else "Coverage", tuple(blocks)) if blocks else None


def parts_text(parts: GainsBy) -> str:
    """`engine alone 3.10x (3.00 to 3.21), lower precision on it 1.42x (1.38 to 1.46)`; empty if speed is undecided."""
    if parts.engine.speedup is None or parts.precision.speedup is None:
        return ""
    return f"engine alone {_gain_text(parts.engine)}, lower precision on it {_gain_text(parts.precision)}"


def _gain_text(gain: Gain) -> str:
    ratio = ratio_text(gain.speedup or 0.0)
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
    numbers += [f"{ratio_text(one.speedup)} the speed"] if one.speedup is not None else []
    numbers += [f"drop {one.quality_drop:.4f}"] if one.quality_drop is not None else []
    status = f"best {' and '.join(one.best_for)}" if one.best_for else ""
    status = status if one.holds else "fails the guard"
    return "; ".join(filter(None, [f"{one.name}: {', '.join(numbers)}", status, one.command]))


def _size_text(ratio: float) -> str:
    if abs(ratio - 1) < SAME:
        return "same size"
    return f"{ratio_text(ratio)} smaller" if ratio > 1 else f"{ratio_text(1 / ratio)} larger"


def coverage_tone(coverage: Coverage) -> Tone:
    """Return the tone of the verdict."""
    return _TONES[coverage.verdict]


def precision_cells(layer: LayerPrecision) -> dict[str, str]:
    """Return the table of layers, column by column, for one of them."""
    return {
        "layer": path_text(layer.path),
        "operator": _then(plain(layer.op, 40), plain(layer.op_after, 40)),
        "shape": "x".join(map(str, layer.shape)),
        "stored in": _then(plain(layer.dtype, 20), plain(layer.dtype_after, 20)),
        "bytes": _then(size_text(layer.bytes), size_text(layer.bytes_after)),
        "computed in": plain(layer.computed_in or "", 20),
        "why unchanged": plain(layer.reason or "", 160),
    }


def guard_texts(guard: Guard) -> list[str]:
    """Return the outcome of the quality guard, its evaluations, and the layers kept in float."""
    ended = "holds" if guard.holds else "does not hold"
    evaluations = plural(guard.evaluations, "full evaluation")
    took = (
        f"drop {guard.quality_drop:.4f} on {f'{guard.samples} ' if guard.samples else 'the '}selection samples after "
        f"{evaluations}, {wait_text(guard.seconds)}"
    )
    stopped = f" It stopped early: {plain(guard.stopped, 120).rstrip('.')}." if guard.stopped else ""
    lines = [f"{ended}, {took}. {plain(guard.why, 240)}{stopped}"]
    if guard.kept_in_float:
        kept = plural(len(guard.kept_in_float), "layer")
        lines.append(f"{kept} kept in float ({size_text(guard.float_bytes)}): {paths_text(guard.kept_in_float)}")
    return lines


def _then(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def explanation_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Findings, the most sensitive layers, and the time of one call by kind of operator."""
    explanation = report.explanation
    if explanation is None:
        return None
    blocks: list[Block] = [Line("explanation", Text(explanation.summary, limit=1200))]
    findings = explanation.findings if full else explanation.findings[: BRIEF["findings"]]
    blocks += [Line("finding", Text(finding_text(one), tone="open", limit=900)) for one in findings]
    blocks += _sensitive(explanation, full)
    times = explanation.times if full else explanation.times[: BRIEF["times"]]
    if times:
        columns: Columns = {
            "kind": [Text(one.kind, limit=60) for one in times],
            "time": [time_text(one.time_ms) for one in times],
            "share": [f"{one.share:.0%}" for one in times],
            "computed in": [arithmetic_text(one) for one in times],
        }
        note, left_out = bound_text(explanation), len(explanation.times) - len(times)
        title = "time of one call"
        blocks.append(Table(*cells_of(columns, numeric=["time", "share"]), title=title, note=note, left_out=left_out))
    return Section("Explanation", tuple(blocks))


def _sensitive(explanation: Explanation, full: bool) -> list[Block]:
    layers = explanation.layers if full else explanation.layers[: BRIEF["layers"]]
    if not layers:
        return []
    columns: Columns = {
        "layer": [Text(layer.path or "the model itself", code=True, limit=80) for layer in layers],
        "kind": [Text(layer.kind, limit=40) for layer in layers],
        "alone": [f"{layer.sqnr_db:.1f} dB" for layer in layers],
        "gain in float": ["" if layer.sqnr_gain_db is None else f"{layer.sqnr_gain_db:+.1f} dB" for layer in layers],
        "recovered": ["" if layer.recovered is None else f"{layer.recovered:+.4f}" for layer in layers],
        "float weights": [size_text(layer.bytes) for layer in layers],
    }
    numeric = ["alone", "gain in float", "recovered", "float weights"]
    table = Table(
        *cells_of(columns, numeric=numeric),
        title="most sensitive layers",
        note=noise_note(explanation),
        left_out=len(explanation.layers) - len(layers),
        folded=True,
    )
    note = "SQNR of the output with only this layer quantized; short bars: the most sensitive layers"
    return [*charts(noise_bars(explanation.layers, explanation.sqnr_db), note=note), table]


def noise_note(explanation: Explanation) -> str:
    """Return the legend of the table of sensitive layers."""
    joint = "" if explanation.sqnr_db is None else f", {explanation.sqnr_db:.1f} dB with all quantized"
    return (
        f"alone: SQNR of the output with only this layer quantized{joint}; gain in float, recovered: increase of SQNR "
        f"and {plain(explanation.metric, 40)} with only this layer in float, on {explanation.samples} samples"
    )


def finding_text(finding: Finding) -> str:
    """Return `spread channels in a, b: the ranges differ by 40x. Fix: … (recovered +0.0120)`."""
    where = f" in {paths_text(finding.paths, 3)}" if finding.paths else ""
    recovered = "" if finding.recovered is None else f" (recovered {finding.recovered:+.4f})"
    evidence = plain(finding.evidence, 200).rstrip(".")
    return f"{plain(finding.name, 60)}{where}: {evidence}. Fix: {plain(finding.fix, 200)}{recovered}"


def time_share_text(time: TimeShare) -> str:
    """Return `Conv 61% (integers)`."""
    return f"{plain(time.kind, 40)} {time.share:.0%} ({arithmetic_text(time)})"


def arithmetic_text(time: TimeShare) -> str:
    """Return the arithmetic of its kernels."""
    return "integers" if time.quantized else "float"


def bound_text(explanation: Explanation) -> str:
    """Amdahl's bound; empty where it is not known."""
    if explanation.speedup_bound is None:
        return ""
    return f"at most {ratio_text(explanation.speedup_bound)} faster if the integer layers took no time (Amdahl's law)"
