"""Coverage, guard and explanation of a quantization as markdown."""

from __future__ import annotations

from omgoptim.render import precision
from omgoptim.render.markdown_parts import bulleted, code, safe
from omgoptim.reports import EfficiencyReport, LayerNoise, LayerPrecision


def coverage_lines(report: EfficiencyReport) -> list[str]:
    """What the gain comes from, what was quantized, the search for the guard, and what else was kept."""
    lines = []
    if report.gains_by is not None and (parts := precision.parts_text(report.gains_by)):
        lines.append(f"Speedup: {parts}")
    if report.coverage is not None:
        lines.append(f"Coverage: {safe(precision.coverage_text(report.coverage), 500)}")
    if report.guard is not None:
        first, *kept = precision.guard_texts(report.guard)
        lines += [f"Guard: {safe(first, 600)}", *(safe(line, 400) for line in kept)]
    return lines + bulleted("Kept beside it", [safe(text, 300) for text in precision.alternative_texts(report)], 5)


def precision_lines(report: EfficiencyReport, most: int) -> list[str]:
    """What every layer is stored and computed in."""
    layers = report.coverage.layers if report.coverage else []
    return bulleted(f"Layers with weights ({len(layers)})", [_layer(layer) for layer in layers], most)


def explanation_lines(report: EfficiencyReport, most: int) -> list[str]:
    """Why quality fell and why it is not faster, with the first few layers and findings, or all."""
    explanation = report.explanation
    if explanation is None:
        return []
    lines = [f"Explanation: {safe(explanation.summary, 900)}"]
    lines += bulleted("Found", [safe(precision.finding_text(one), 700) for one in explanation.findings], most)
    title = f"Most sensitive layers ({safe(precision.noise_note(explanation), 400)})"
    lines += bulleted(title, [_noise(layer) for layer in explanation.layers], most)
    times = precision.times_text(explanation, most)
    return [*lines, f"Time of one call: {safe(times, 600)}"] if times else lines


def _layer(layer: LayerPrecision) -> str:
    cells = precision.precision_cells(layer)
    computed = f", computed in {safe(cells['computed in'])}" if layer.computed_in else ""
    left = f"; {safe(cells['why left'])}" if layer.reason else ""
    told = f"{safe(cells['operator'])} {cells['shape']}: {safe(cells['stored in'])}, {cells['bytes']}"
    return f"{code(cells['layer'])} {told}{computed}{left}"


def _noise(layer: LayerNoise) -> str:
    cells = precision.noise_cells(layer)
    gain = f", {cells['gain in float']} in float" if cells["gain in float"] else ""
    recovered = f", recovered {cells['recovered']}" if cells["recovered"] else ""
    numbers = f"{cells['alone']} alone{gain}{recovered}, {cells['float weights']}"
    return f"{code(cells['layer'])} {safe(cells['kind'])}: {numbers}"
