"""Pictures of the HTML report as inline SVG: candidates as a scatter, layers by their cost or noise as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from omgoptim.render.lists import ranked_candidates
from omgoptim.render.numbers import count_text, path_text, plain, ratio_text, size_text, time_text
from omgoptim.reports import Candidate, EfficiencyReport, Layer, LayerNoise, Step

WIDTH, HEIGHT = 760, 360
MOST_BARS = 15
"""Most layers in a bar chart; the table has all."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 18, 46
_ROW = 30


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps a value range to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round values inside the range."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** _exponent(rough)
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = -(-self.low // step)
        return [(first + i) * step for i in range(20) if (first + i) * step <= self.high + step * 1e-9]


def candidate_scatter(report: EfficiencyReport) -> str:
    """Speedup against quality, both as screened; the chosen one ringed, the guard as a line. Empty if too few.

    The numbers at the points are the places of `ranked_candidates`, from 1.
    """
    numbered = list(enumerate(ranked_candidates(report), start=1))
    points = [(number, one) for number, one in numbered if one.speedup is not None and one.quality is not None]
    if len(points) < 2:
        return ""
    base = _quality_of_original(report.candidates)
    guard = _guard(report, base)
    x, y = _axes([one for _, one in points], base, guard)
    parts = [_grid(x, y), _axis_titles()]
    if guard is not None:
        at = y.at(guard)
        parts.append(f'<line class="guard" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="guardtext" x="{WIDTH - _RIGHT}" y="{at - 6:.1f}" text-anchor="end">guard</text>')
    taken = [(x.at(one.speedup or 0), y.at(one.quality or 0)) for _, one in points]
    if base is not None:
        original = "teacher" if report.verb == "distill" else "original"
        parts.append(_point("base", f"{original}, speedup 1", x.at(1), y.at(base)))
        taken.append((x.at(1), y.at(base)))
        parts.append(_label(original, x.at(1), y.at(base), taken, "label"))
    parts += [_candidate_mark(number, one, x, y, guard, taken) for number, one in points]
    name = escape("Candidates: speedup against quality")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def step_scatter(report: EfficiencyReport) -> str:
    """Speedup against quality of every measured step; the front as a line, the guard as another. Empty if too few.

    The numbers at the points are the places of the steps in the report, from 1.
    """
    numbered = list(enumerate(report.steps, start=1))
    points = [(number, one) for number, one in numbered if one.speedup is not None and one.quality is not None]
    if len(points) < 2:
        return ""
    base = _quality_of_original([one for _, one in points])
    guard = _guard(report, base)
    x, y = _axes([one for _, one in points], base, guard)
    parts = [_grid(x, y), _axis_titles()]
    if guard is not None:
        at = y.at(guard)
        parts.append(f'<line class="guard" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="guardtext" x="{WIDTH - _RIGHT}" y="{at - 6:.1f}" text-anchor="end">guard</text>')
    front = sorted((one.speedup or 0.0, one.quality or 0.0) for _, one in points if one.on_front)
    if len(front) > 1:
        line = " ".join(f"{x.at(speed):.1f},{y.at(quality):.1f}" for speed, quality in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    taken = [(x.at(one.speedup or 0), y.at(one.quality or 0)) for _, one in points]
    if base is not None:
        parts.append(_point("base", "original, speedup 1", x.at(1), y.at(base)))
        taken.append((x.at(1), y.at(base)))
        parts.append(_label("original", x.at(1), y.at(base), taken, "label"))
    parts += [_step_mark(number, one, x, y, guard, taken) for number, one in points]
    name = escape("Steps: speedup against quality")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def layer_bars(layers: list[Layer]) -> str:
    """The costliest layers by time, else by MACs, else by bytes. Empty if none of the three is known."""
    value = _layer_value(layers)
    if value is None:
        return ""
    costs = [(layer, getattr(layer, value) or 0) for layer in layers[:MOST_BARS]]
    most = max(cost for _, cost in costs)
    height = _ROW * len(costs) + 6
    longest = max(len(tail(plain(layer.path, 200), 38)) for layer, _ in costs)
    start = 24 + round(6.6 * longest)
    room = WIDTH - start - 150
    rows = []
    for index, (layer, cost) in enumerate(costs):
        top = index * _ROW + 6
        width = max(1.0, room * cost / most) if most else 1.0
        name = escape(tail(plain(layer.path, 200), 38))
        whole = escape(f"{plain(layer.path, 200)} ({plain(layer.kind, 60)})")
        rows.append(
            f'<text class="label" x="{start - 12}" y="{top + 15}" text-anchor="end">{name}<title>{whole}</title></text>'
            f'<rect class="bar" x="{start}" y="{top + 2}" width="{width:.1f}" height="18" rx="4"/>'
            f'<text x="{start + width + 8:.1f}" y="{top + 15}">{escape(_layer_text(layer))}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Costliest layers">{"".join(rows)}</svg>'


def noise_bars(layers: Sequence[LayerNoise], whole_db: float | None = None) -> str:
    """The signal-to-noise ratio of each layer as a bar, the most sensitive first. Empty without layers.

    Args:
        whole_db: that of the model with all layers quantized, drawn as a line where it is within the picture.
    """
    shown = list(layers[:MOST_BARS])
    if not shown:
        return ""
    names = [tail(path_text(layer.path, 200), 38) for layer in shown]
    start = 24 + round(6.6 * max(map(len, names)))
    most = max((layer.sqnr_db for layer in shown if math.isfinite(layer.sqnr_db)), default=0.0)
    most = max(most, whole_db or 0.0, 1e-9)
    per_db = (WIDTH - start - 90) / most
    height = _ROW * len(shown) + 6
    parts = [
        _bar(layer, name, index, start, per_db) for index, (layer, name) in enumerate(zip(shown, names, strict=True))
    ]
    if whole_db is not None and whole_db > 0:
        at = start + per_db * whole_db
        label = f"<title>all layers quantized: {whole_db:.1f} dB</title>"
        parts.append(f'<line class="guard" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height}">{label}</line>')
    name = "Signal-to-noise ratio with only this layer quantized"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">{"".join(parts)}</svg>'


def _bar(layer: LayerNoise, name: str, index: int, start: int, per_db: float) -> str:
    top, db = index * _ROW + 6, layer.sqnr_db
    width = max(1.0, per_db * db) if math.isfinite(db) else 1.0
    whole = escape(f"{path_text(layer.path, 200)} ({plain(layer.kind, 60)})")
    title = f"<title>{whole}</title>"
    return (
        f'<text class="label" x="{start - 12}" y="{top + 15}" text-anchor="end">{escape(name)}{title}</text>'
        f'<rect class="bar" x="{start}" y="{top + 2}" width="{width:.1f}" height="18" rx="4"/>'
        f'<text x="{start + width + 8:.1f}" y="{top + 15}">{db:.1f} dB</text>'
    )


def _step_mark(
    number: int, one: Step, x: Scale, y: Scale, guard: float | None, taken: list[tuple[float, float]]
) -> str:
    at_x, at_y = x.at(one.speedup or 0), y.at(one.quality or 0)
    outside = guard is not None and (one.quality or 0) < guard
    size = f", {size_text(one.size_bytes)}" if one.size_bytes else ""
    said = f"{one.name}: {ratio_text(one.speedup or 0)}{size}, quality {one.quality:.4f}. {one.status}: {one.why}"
    kept = one.status == "kept"
    mark = _point("pick" if kept else "out" if outside else "dot", said, at_x, at_y)
    return mark + _label(str(number), at_x, at_y, taken, "strong" if kept else "label")


def _quality_of_original(candidates: Sequence[Candidate | Step]) -> float | None:
    for one in candidates:
        if one.quality is not None and one.quality_drop is not None:
            return one.quality + one.quality_drop
    return None


def _guard(report: EfficiencyReport, base: float | None) -> float | None:
    """The quality at which the guard is; students after a trial are not held to it."""
    if report.verb == "distill":
        return None
    allowed = report.request.get("max_quality_drop")
    return base - float(allowed) if base is not None and isinstance(allowed, (int, float)) else None


def _axes(points: Sequence[Candidate | Step], base: float | None, guard: float | None) -> tuple[Scale, Scale]:
    speeds = [1.0, *(one.speedup for one in points if one.speedup is not None)]
    qualities = [one.quality for one in points if one.quality is not None]
    qualities += [value for value in (base, guard) if value is not None]
    low, high = min(qualities), max(qualities)
    margin = max(0.12 * (high - low), 0.002)
    x = Scale(0, max(speeds) * 1.12, _LEFT, WIDTH - _RIGHT)
    return x, Scale(low - margin, high + margin, HEIGHT - _BOTTOM, _TOP)


def _grid(x: Scale, y: Scale) -> str:
    steps = y.ticks()
    digits = next((d for d in range(5) if len({f"{t:.{d}f}" for t in steps}) == len(steps)), 5)
    lines = [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y.at(t):.1f}" y2="{y.at(t):.1f}"/>'
        f'<text x="{_LEFT - 10}" y="{y.at(t) + 4:.1f}" text-anchor="end">{t:.{digits}f}</text>'
        for t in steps
    ]
    lines += [
        f'<text x="{x.at(t):.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">{t:g}x</text>' for t in x.ticks()
    ]
    return "".join(lines)


def _axis_titles() -> str:
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    return (
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">speedup</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">quality</text>'
    )


def _candidate_mark(
    number: int, one: Candidate, x: Scale, y: Scale, guard: float | None, taken: list[tuple[float, float]]
) -> str:
    at_x, at_y = x.at(one.speedup or 0), y.at(one.quality or 0)
    outside = guard is not None and (one.quality or 0) < guard
    label = f"{one.name}: {ratio_text(one.speedup or 0)}, quality {one.quality:.4f}. {one.status}: {one.why}"
    chosen = one.status == "chosen"
    mark = _point("pick" if chosen else "out" if outside else "dot", label, at_x, at_y)
    ring = f'<circle class="ring" cx="{at_x:.1f}" cy="{at_y:.1f}" r="12"/>' if chosen else ""
    return mark + ring + _label(str(number), at_x, at_y, taken, "strong" if chosen else "label")


def _point(kind: str, label: str, at_x: float, at_y: float) -> str:
    title = f"<title>{escape(plain(label))}</title>"
    return f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="6.5">{title}</circle>'


def _label(text: str, at_x: float, at_y: float, taken: list[tuple[float, float]], kind: str) -> str:
    """A number or word around its point, where it lies on no point and no other label."""
    wide = 12 + 3.5 * len(text)
    places = ((0, -20), (wide + 8, 0), (-wide - 8, 0), (0, 20), (14, -18), (-14, -18), (14, 18), (-14, 18))
    spots = ((at_x + dx, at_y + dy) for dx, dy in places)
    free = (spot for spot in spots if all(abs(spot[0] - tx) > wide or abs(spot[1] - ty) > 13 for tx, ty in taken))
    x, y = next(free, (at_x, at_y - 20))
    taken.append((x, y))
    return f'<text class="{kind}" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{escape(text)}</text>'


def _layer_value(layers: list[Layer]) -> str | None:
    return next((v for v in ("time_ms", "macs", "size_bytes") if any(getattr(layer, v) for layer in layers)), None)


def _layer_text(layer: Layer) -> str:
    if layer.time_ms is not None:
        return time_text(layer.time_ms) + (f", {layer.time_share:.0%}" if layer.time_share is not None else "")
    return f"{count_text(layer.macs)} MACs" if layer.macs else size_text(layer.size_bytes or 0)


def tail(text: str, limit: int) -> str:
    """The end of a path says most."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])
