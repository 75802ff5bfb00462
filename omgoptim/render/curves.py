"""The pictures of training and sensitivity as inline SVG: curves over epochs, and one small curve per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from omgoptim.render.charts import WIDTH, Scale, tail
from omgoptim.render.lists import Sensitivity
from omgoptim.render.numbers import amount_text, plain
from omgoptim.reports import Epoch, Training

MOST_LAYERS = 24
"""How many layers or groups get a curve of their own, the most sensitive first."""

_LEFT, _RIGHT = 72, 24
_PANEL, _GAP, _FOOT = 112, 30, 40
_COLUMNS, _CELL_HEIGHT = 4, 104
_LEGEND = 18


@dataclass(frozen=True, slots=True)
class Series:
    """One curve of a panel: a value for each epoch, None where there is no number."""

    kind: str
    """Of the line, for the style sheet: `loss`, `quality`, `loss control`, `quality control`."""
    values: list[float | None]
    epochs: Sequence[Epoch]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]


def learning_curve(training: Training, control: Training | None, description: str, names: tuple[str, str]) -> str:
    """Loss above, quality below, over all epochs; a line where a round begins. Empty below two epochs.

    Args:
        control: a second training, drawn on the same scales, dashed, with a legend.
        description: what the picture says to those who cannot see it.
        names: of both trainings, for the legend.
    """
    both = [training.epochs, *([control.epochs] if control is not None and control.epochs else [])]
    epochs = training.epochs
    if max(len(each) for each in both) < 2:
        return ""
    named = list(zip(both, ("", " control"), strict=False))
    panels = [("loss", [Series(f"loss{of}", [_finite(one.loss) for one in each], each) for each, of in named])]
    qualities = [Series(f"quality{of}", [_finite(one.quality) for one in each], each) for each, of in named]
    if any(series.known for series in qualities):
        panels.append(("quality", qualities))
    top = 14 + _LEGEND * (len(both) > 1)
    x = Scale(0.5, max(len(each) for each in both) + 0.5, _LEFT, WIDTH - _RIGHT)
    height = top + len(panels) * (_PANEL + _GAP) + _FOOT - _GAP
    parts = [_rounds(epochs, x, height - _FOOT), _legend(names) if len(both) > 1 else ""]
    for place, (name, curves) in enumerate(panels):
        parts.append(_panel(name, curves, x, top + place * (_PANEL + _GAP)))
    name = "epoch, over all rounds" if len({epoch.round for epoch in epochs}) > 1 else "epoch"
    parts.append(_epoch_axis(name, max(len(each) for each in both), x, height))
    label = "Loss and quality over the epochs" if len(panels) == 2 else "Loss over the epochs"
    label += ", with the teacher and without" if len(both) > 1 else ""
    described = escape(description)
    return _svg(WIDTH, height, label, f"<title>{label}: {described}</title>{''.join(parts)}")


def sensitivity_multiples(found: Sequence[Sensitivity], guard: float | None) -> str:
    """One small curve per layer or group: the drop in quality against the amount, all on the same scales."""
    shown = found[:MOST_LAYERS]
    drops = [point.quality_drop for one in shown for point in one.points]
    if not drops:
        return ""
    amounts = [point.amount for one in shown for point in one.points]
    low, high = min(0.0, *drops), max(*drops, guard or 0.0, 1e-6)
    width = WIDTH / _COLUMNS
    cells = []
    for place, one in enumerate(shown):
        left, top = (place % _COLUMNS) * width, (place // _COLUMNS) * _CELL_HEIGHT
        x = Scale(0, max(amounts), left + 8, left + width - 16)
        y = Scale(low, high, top + _CELL_HEIGHT - 26, top + 28)
        cells.append(_cell(one, guard, x, y))
    height = math.ceil(len(shown) / _COLUMNS) * _CELL_HEIGHT
    return _svg(WIDTH, height, "Drop in quality against the amount, for each layer alone", "".join(cells))


def _panel(name: str, curves: Sequence[Series], x: Scale, top: float) -> str:
    """Curves on one axis; an epoch without a number is a gap."""
    known = [value for series in curves for value in series.known]
    if not known:
        return ""
    margin = max(0.12 * (max(known) - min(known)), 1e-3 * max(abs(max(known)), 1e-3))
    y = Scale(min(known) - margin, max(known) + margin, top + _PANEL, top)
    ticks = y.ticks()
    digits = next((d for d in range(6) if len({f"{t:.{d}f}" for t in ticks}) == len(ticks)), 6)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y.at(t):.1f}" y2="{y.at(t):.1f}"/>'
        f'<text x="{_LEFT - 10}" y="{y.at(t) + 4:.1f}" text-anchor="end">{t:.{digits}f}</text>'
        for t in ticks
    ]
    middle = top + _PANEL / 2
    parts.append(f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{name}</text>')
    for series in reversed(curves):
        parts.append(_curve(series, name, x, y))
    return "".join(parts)


def _curve(series: Series, name: str, x: Scale, y: Scale) -> str:
    points = [(x.at(i), None if value is None else y.at(value)) for i, value in enumerate(series.values, start=1)]
    parts = [_line(run, f"curve {series.kind}") for run in _runs(points, [epoch.round for epoch in series.epochs])]
    of = "control, " if series.kind.endswith("control") else ""
    for (at_x, at_y), value, epoch in zip(points, series.values, series.epochs, strict=True):
        if at_y is not None and value is not None:
            parts.append(_mark(epoch, f"{of}{name} {value:.4g}", at_x, at_y))
    return "".join(parts)


def _legend(names: tuple[str, str]) -> str:
    """Return the legend of the solid and the dashed line."""
    parts = []
    for at, kind, name in ((_LEFT, "", names[0]), (_LEFT + 170, "control", names[1])):
        parts.append(_line([(at, 10), (at + 28, 10)], f"key {kind}".strip()))
        parts.append(f'<text class="label" x="{at + 36}" y="14">{name}</text>')
    return "".join(parts)


def _mark(epoch: Epoch, text: str, at_x: float, at_y: float) -> str:
    kept = ", kept" if epoch.best else ""
    title = f"<title>round {epoch.round}, epoch {epoch.epoch}: {text}{kept}</title>"
    kind = "pick" if epoch.best else "dot"
    return f'<circle class="{kind}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="{5 if epoch.best else 3.5}">{title}</circle>'


def _rounds(epochs: Sequence[Epoch], x: Scale, bottom: float) -> str:
    """A line where a round begins, and its number above."""
    if len({epoch.round for epoch in epochs}) < 2:
        return ""
    parts = []
    for place, epoch in enumerate(epochs):
        if place == 0 or epoch.round != epochs[place - 1].round:
            at = x.at(place + 0.5)
            if place:
                parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{bottom:.1f}"/>')
            parts.append(f'<text x="{at + 5:.1f}" y="11">round {epoch.round}</text>')
    return "".join(parts)


def _epoch_axis(name: str, count: int, x: Scale, height: float) -> str:
    step = max(1, math.ceil(count / 12))
    ticks = "".join(
        f'<text x="{x.at(epoch):.1f}" y="{height - 22:.1f}" text-anchor="middle">{epoch}</text>'
        for epoch in range(step, count + 1, step)
    )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return f'{ticks}<text x="{middle}" y="{height - 4:.1f}" text-anchor="middle">{name}</text>'


def _cell(one: Sensitivity, guard: float | None, x: Scale, y: Scale) -> str:
    name = escape(tail(plain(one.path, 200), 24))
    amounts = ", ".join(f"{amount_text(p.amount)}: drop {p.quality_drop:.4f}" for p in one.points)
    title = f"<title>{escape(plain(one.path, 200))}. {amounts}</title>"
    worst = one.worst
    points: list[tuple[float, float | None]] = [(x.at(0), y.at(0))]
    points += [(x.at(point.amount), y.at(point.quality_drop)) for point in one.points]
    parts = [
        f'<text class="label" x="{x.start:.1f}" y="{y.end - 12:.1f}">{name}</text>',
        f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y.at(0):.1f}" y2="{y.at(0):.1f}"/>',
    ]
    if guard is not None:
        at = y.at(guard)
        parts.append(f'<line class="guard" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
    over = guard is not None and worst.quality_drop > guard
    parts += [_line(run, "curve drop") for run in _runs(points, [0] * len(points))]
    last_x, last_y = x.at(worst.amount), y.at(worst.quality_drop)
    parts.append(f'<circle class="{"out" if over else "pick"}" cx="{last_x:.1f}" cy="{last_y:.1f}" r="4"/>')
    foot = f"{worst.quality_drop:.4f} at {amount_text(worst.amount)}"
    parts.append(f'<text x="{x.start:.1f}" y="{y.start + 16:.1f}">{foot}</text>')
    return f"<g>{title}{''.join(parts)}</g>"


def _runs(points: Sequence[tuple[float, float | None]], rounds_of: Sequence[int]) -> list[list[tuple[float, float]]]:
    """The points as unbroken lines: a round or a gap ends one."""
    runs: list[list[tuple[float, float]]] = []
    before: int | None = None
    for (at_x, at_y), of_round in zip(points, rounds_of, strict=True):
        if at_y is None:
            before = None
            continue
        if before != of_round:
            runs.append([])
        runs[-1].append((at_x, at_y))
        before = of_round
    return runs


def _line(points: Sequence[tuple[float, float]], kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _svg(width: float, height: float, label: str, body: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
