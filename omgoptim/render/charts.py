"""Drawings of a report: candidates, steps, layers, training and sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from omgoptim.render.blocks import (
    Bar,
    Bars,
    Cell,
    Chain,
    Curve,
    Curves,
    LayerKind,
    Link,
    Multiples,
    Panel,
    PointKind,
    Scatter,
    ScatterPoint,
    Strip,
)
from omgoptim.render.claims import speed_undecided
from omgoptim.render.lists import Sensitivity, guard_of, ranked_candidates
from omgoptim.render.numbers import (
    amount_text,
    count_text,
    if_known,
    path_text,
    plain,
    ratio_text,
    size_text,
    time_text,
)
from omgoptim.reports import Candidate, Coverage, EfficiencyReport, Epoch, Layer, LayerNoise, LayerPrecision, Step

MOST_BARS = 15
"""Most layers in a bar chart; the table has all."""

SPEEDUP, QUALITY = "speedup", "quality"


def live_scatter(records: Sequence[Candidate | Step], verb: str, allowed: float | None) -> Scatter | None:
    """Speedup against quality of the measurements of a running run. None below two points.

    Args:
        records: candidates or steps so far.
        verb: of the run.
        allowed: largest drop in quality that the guard lets pass; None without a guard.
    """
    base = _quality_of_original(records)
    guard = None if base is None or allowed is None or verb == "distill" else base - allowed
    points = [point for number, one in enumerate(records, start=1) for point in _point(one, number, "point", guard)]
    return _scatter("Measured so far: speedup against quality", points, base, guard, _original(verb))


def candidate_scatter(report: EfficiencyReport) -> Scatter | None:
    """Speedup against quality, both as screened; the chosen one marked, the guard as a band. None below two points.

    The points are numbered as in `ranked_candidates`, from 1. Intervals are those of the final measurement.
    """
    intervals = {one.candidate: (one.speedup_low, one.speedup_high) for one in report.alternatives}
    base = _quality_of_original(report.candidates)
    guard = _guard(report, base)
    points = []
    for number, one in enumerate(ranked_candidates(report), start=1):
        chosen = one.status == "chosen"
        low, high = intervals.get(one.name, (None, None))
        if chosen and report.gains is not None:
            low, high = report.gains.speedup_low, report.gains.speedup_high
        if low is None or high is None or one.speedup is None or not low <= one.speedup <= high:
            low = high = None  # the final measurement differs from the screening
        points += _point(one, number, "kept" if chosen else "point", guard, (low, high))
    picture = _scatter("Candidates: speedup against quality", points, base, guard, _original(report.verb))
    return replace(picture, original_ms=_original_ms(report)) if picture else None


def step_scatter(report: EfficiencyReport) -> Scatter | None:
    """Speedup against quality of every measured step; the front as a line, the guard as a band. None below two points.

    The numbers at the points are the places of the steps in the report, from 1.
    """
    base = _quality_of_original([one for one in report.steps if one.speedup is not None])
    guard = _guard(report, base)
    points = []
    for number, one in enumerate(report.steps, start=1):
        points += _point(one, number, "kept" if one.status == "kept" else "point", guard)
    front = sorted((one.speedup or 0.0, one.quality or 0.0) for one in report.steps if one.on_front)
    picture = _scatter("Steps: speedup against quality", points, base, guard, _original(report.verb))
    if picture is None:
        return None
    return replace(
        picture, front=tuple(front), original_ms=_original_ms(report)
    )  # the steps' own: size counts in it too


def step_chain(report: EfficiencyReport) -> Chain:
    """Return the steps with their speedup, size and drop, and whether each was kept."""
    links = []
    for step in report.steps:
        speed = if_known(ratio_text, step.speedup)
        drop = "" if step.quality_drop is None else f"drop {step.quality_drop:.4f}"
        text = ", ".join(filter(None, [speed, size_text(step.size_bytes) if step.size_bytes else "", drop]))
        status = step.status.replace("_", " ")
        links.append(Link(step.name, status, step.status == "kept", text, step.parent or ""))
    return Chain("Steps in order: what was kept and what was rolled back", tuple(links))


def expected_bars(report: EfficiencyReport) -> Bars | None:
    """Return the speedup that was expected of each step beside the measured one. None where no step has both."""
    bars = tuple(
        Bar(
            step.name,
            step.speedup,
            f"{ratio_text(step.speedup)}, expected {ratio_text(step.expected_speedup)}",
            expected=step.expected_speedup,
        )
        for step in report.steps
        if step.speedup is not None and step.expected_speedup is not None
    )
    return Bars("Speedup of each step: measured and expected", bars) if bars else None


def layer_bars(layers: list[Layer]) -> Bars | None:
    """Return the costliest layers by time, else by MACs, else by bytes. None if none of the three is known."""
    value = next((v for v in ("time_ms", "macs", "size_bytes") if any(getattr(layer, v) for layer in layers)), None)
    if value is None:
        return None
    bars = tuple(
        Bar(
            path_text(layer.path, 200),
            float(getattr(layer, value) or 0),
            _layer_text(layer),
            f"{path_text(layer.path, 200)} ({plain(layer.kind, 60)})",
        )
        for layer in layers[:MOST_BARS]
    )
    return Bars("Costliest layers", bars)


def noise_bars(layers: Sequence[LayerNoise], whole_db: float | None = None) -> Bars | None:
    """Return the signal-to-noise ratio of each layer as a bar, the most sensitive first. None without layers.

    Args:
        layers: with their signal-to-noise ratio in dB.
        whole_db: that of the model with all layers quantized, a faded bar at the end.
    """
    bars = [
        Bar(
            path_text(layer.path, 200),
            max(layer.sqnr_db, 0.0) if math.isfinite(layer.sqnr_db) else 0.0,
            f"{layer.sqnr_db:.1f} dB",
            f"{path_text(layer.path, 200)} ({plain(layer.kind, 60)})",
        )
        for layer in layers[:MOST_BARS]
    ]
    if bars and whole_db is not None and whole_db > 0:
        bars.append(Bar("all layers quantized", whole_db, f"{whole_db:.1f} dB", faded=True))
    return Bars("Signal-to-noise ratio with only this layer quantized", tuple(bars)) if bars else None


def coverage_strip(coverage: Coverage | None) -> Strip | None:
    """Return all layers with weights by compute type. None without layers."""
    if coverage is None or not coverage.layers:
        return None
    layers = tuple((path_text(layer.path), layer.bytes, _kind(layer)) for layer in coverage.layers)
    return Strip(f"{coverage.changed} of {coverage.total} layers with weights were quantized", layers)


def _kind(layer: LayerPrecision) -> LayerKind:
    if layer.dtype_after == layer.dtype and layer.bytes_after >= layer.bytes:
        return "left"
    return "integer" if layer.computed_in == "int8" else "stored"


def _point(
    one: Candidate | Step,
    number: int,
    kind: PointKind,
    guard: float | None,
    interval: tuple[float | None, float | None] = (None, None),
) -> list[ScatterPoint]:
    """Return the point of a candidate or step; none where it was not measured."""
    if one.speedup is None or one.quality is None:
        return []
    size = f", {size_text(one.size_bytes)}" if one.size_bytes else ""
    text = f"{one.name}: {ratio_text(one.speedup)}{size}, quality {one.quality:.4f}. {one.status}: {one.why}"
    if kind == "point" and guard is not None and one.quality < guard:
        kind = "outside"
    return [ScatterPoint(one.speedup, one.quality, kind, str(number), text, one.size_bytes or None, *interval)]


def _scatter(
    title: str, points: list[ScatterPoint], base: float | None, guard: float | None, original: str
) -> Scatter | None:
    if len(points) < 2:
        return None
    first = [ScatterPoint(1.0, base, "original", original, f"{original}, speedup 1")] if base is not None else []
    held = [(point.x, point.y) for point in points if guard is None or point.y >= guard]
    return Scatter(title, SPEEDUP, QUALITY, (*first, *points), guard, _front(held))


def _front(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return the Pareto front of the points, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return tuple(reversed(front))


def _original(verb: str) -> str:
    return "teacher" if verb == "distill" else "original"


def _original_ms(report: EfficiencyReport) -> float | None:
    """Median latency of the original in ms; None where the final measurement decided no speed."""
    return None if report.before is None or speed_undecided(report) else report.before.latency_ms_p50


def _quality_of_original(candidates: Sequence[Candidate | Step]) -> float | None:
    for one in candidates:
        if one.quality is not None and one.quality_drop is not None:
            return one.quality + one.quality_drop
    return None


def _guard(report: EfficiencyReport, base: float | None) -> float | None:
    """Return the lowest quality within the guard; None for students after a trial, which it does not apply to."""
    if report.verb == "distill":
        return None
    allowed = guard_of(report)
    return None if base is None or allowed is None else base - allowed


def _layer_text(layer: Layer) -> str:
    if layer.time_ms is not None:
        return time_text(layer.time_ms) + (f", {layer.time_share:.0%}" if layer.time_share is not None else "")
    return f"{count_text(layer.macs)} MACs" if layer.macs else size_text(layer.size_bytes or 0)


MOST_LAYERS = 24
"""Most layers or groups that get a curve, the most sensitive first."""


def learning_curve(
    epochs: Sequence[Epoch], control: Sequence[Epoch], description: str, names: tuple[str, str]
) -> Curves | None:
    """Loss and quality over all epochs, a panel each. None below two epochs.

    Args:
        epochs: of the training.
        control: epochs of a second training, drawn on the same scales.
        description: what the picture says to those who cannot see it.
        names: of both trainings, for the legend.
    """
    both = [epochs, *([control] if control else [])]
    if max(len(each) for each in both) < 2:
        return None
    panels = []
    for name in ("loss", "quality"):
        curves = tuple(
            Curve(
                tuple(_finite(getattr(epoch, name)) for epoch in each),
                tuple(epoch.round for epoch in each),
                tuple(place for place, epoch in enumerate(each) if epoch.best),
                names[place] if len(both) > 1 else "",
                place == 1,
            )
            for place, each in enumerate(both)
        )
        if name == "loss" or any(value is not None for curve in curves for value in curve.values):
            panels.append(Panel(name, curves))
    title = "Loss and quality over the epochs" if len(panels) == 2 else "Loss over the epochs"
    title += ", with the teacher and without" if len(both) > 1 else ""
    x = "epoch, over all rounds" if len({epoch.round for epoch in epochs}) > 1 else "epoch"
    return Curves(title, description, x, tuple(panels))


def sensitivity_multiples(found: Sequence[Sensitivity], guard: float | None) -> Multiples | None:
    """Return a small curve per layer or group: the drop in quality against the amount, all on the same scales."""
    cells = tuple(_cell(one, guard) for one in found[:MOST_LAYERS] if one.points)
    return Multiples("Drop in quality against the amount, for each layer alone", cells, guard) if cells else None


def _cell(one: Sensitivity, guard: float | None) -> Cell:
    worst = one.worst
    return Cell(
        path_text(one.path, 200),
        ((0.0, 0.0), *((point.amount, point.quality_drop) for point in one.points)),
        f"{worst.quality_drop:.4f} at {amount_text(worst.amount)}",
        guard is not None and worst.quality_drop > guard,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
