"""Quantization: what the gain comes from, which layers were quantized, the guard, and what else was kept."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Chart, Items, Line, Section, Text, table_of
from omgoptim.render.charts import coverage_strip
from omgoptim.render.claims import Tone
from omgoptim.render.numbers import SAME, path_text, paths_text, plain, plural, ratio_text, size_text, wait_text
from omgoptim.reports import Alternative, Coverage, EfficiencyReport, Gain, GainsBy, Guard, LayerPrecision

BRIEF = 5
"""Alternatives that the short form shows."""

_TONES: dict[str, Tone] = {"REAL": "better", "SIMULATED": "open", "NO-OP": "worse"}


def quantization_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Gains by their cause, coverage, guard, alternatives; in full every layer with weights."""
    blocks: list[Block] = []
    if report.gains_by is not None and (parts := parts_text(report.gains_by)):
        blocks.append(Line("speedup", Text(parts, limit=300)))
    if report.coverage is not None:
        verdict, _, why = coverage_text(report.coverage).partition(" ")
        blocks.append(Line("coverage", Text(why, limit=500), Text(verdict, tone=coverage_tone(report.coverage))))
    if full and (strip := coverage_strip(report.coverage)):
        blocks.append(Chart(strip))
    if report.guard is not None:
        first, *kept = guard_texts(report.guard)
        blocks.append(Line("guard", Text(first, tone="same" if report.guard.holds else "worse", limit=600)))
        blocks += [Line("", Text(line, limit=600)) for line in kept]
    if alternatives := alternative_texts(report):
        shown = alternatives if full else alternatives[:BRIEF]
        texts = tuple(Text(text, limit=300) for text in shown)
        blocks.append(Items("kept beside it", texts, len(alternatives) - len(shown)))
    if full and report.coverage is not None and report.coverage.layers:
        cells = [precision_cells(layer) for layer in report.coverage.layers]
        columns = {name: [Text(cell[name], code=name == "layer") for cell in cells] for name in cells[0]}
        title = f"layers with weights ({len(cells)})"
        blocks.append(table_of(columns, numeric=["bytes"], title=title, folded=True))
    return Section("Coverage and guard" if report.guard else "Coverage", tuple(blocks)) if blocks else None


def parts_text(parts: GainsBy) -> str:
    """`engine alone 3.10x (3.00 to 3.21), fewer bits on it 1.42x (1.38 to 1.46)`; empty where speed is undecided."""
    if parts.engine.speedup is None or parts.precision.speedup is None:
        return ""
    return f"engine alone {_gain_text(parts.engine)}, fewer bits on it {_gain_text(parts.precision)}"


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


def coverage_text(coverage: Coverage) -> str:
    """Return `REAL. 20 of 21 layers in int8, 99 % of the weight bytes; 20 computed in integers by onnxruntime.`."""
    return f"{coverage.verdict}. {plain(coverage.why, 300)}"


def coverage_tone(coverage: Coverage) -> Tone:
    """Return the tone of the verdict."""
    return _TONES[coverage.verdict]


def precision_cells(layer: LayerPrecision) -> dict[str, str]:
    """The table of layers, column by column, for one of them."""
    return {
        "layer": path_text(layer.path),
        "operator": _then(plain(layer.op, 40), plain(layer.op_after, 40)),
        "shape": "x".join(map(str, layer.shape)),
        "stored in": _then(plain(layer.dtype, 20), plain(layer.dtype_after, 20)),
        "bytes": _then(size_text(layer.bytes), size_text(layer.bytes_after)),
        "computed in": plain(layer.computed_in or "", 20),
        "why left": plain(layer.reason or "", 160),
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
