"""Layers: the costliest, the changed and the skipped ones, and their sensitivity."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Columns, Items, Line, Section, Table, Text, cells_of, charts
from omgoptim.render.charts import MAX_LAYERS, layer_bars, sensitivity_multiples
from omgoptim.render.lists import (
    Sensitivity,
    changed_paths,
    changed_title,
    extremes,
    guard_of,
    sensitivities,
    skip_groups,
)
from omgoptim.render.numbers import (
    amount_text,
    bars,
    count_text,
    if_known,
    path_text,
    paths_text,
    plain,
    size_text,
    time_text,
)
from omgoptim.reports import EfficiencyReport
from omgoptim.text import plural

BRIEF = {"costliest": 8, "skipped": 3}
"""Most entries of each kind in the short form. Chosen: what fits a screen."""


def costliest_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Return the layers that take most time, MACs or bytes."""
    if not report.layers:
        return None
    shown = report.layers if full else report.layers[: BRIEF["costliest"]]
    columns: Columns = {
        "layer": [Text(layer.path or "the model itself", code=True, limit=80) for layer in shown],
        "kind": [Text(layer.kind, limit=40) for layer in shown],
        "time": [if_known(time_text, layer.time_ms) for layer in shown],
        "share": ["" if layer.time_share is None else f"{layer.time_share:.0%}" for layer in shown],
        "MACs": [if_known(count_text, layer.macs) for layer in shown],
        "size": [if_known(size_text, layer.size_bytes) for layer in shown],
    }
    table = Table(
        *cells_of(columns, numeric=["time", "share", "MACs", "size"]),
        title="costliest layers",
        left_out=len(report.layers) - len(shown),
        folded=True,
    )
    return Section("Costliest layers", (*charts(layer_bars(report.layers)), table), "one call at batch 1")


def changed_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Changed and skipped layers with reasons; in the short form their number and the first few."""
    blocks: list[Block] = []
    paths, title = changed_paths(report), changed_title(report)
    if paths and not full:
        done = list(dict.fromkeys(change.what for change in report.changed))
        how = f" ({plain(done[0], 60)})" if len(done) == 1 and done[0] else ""
        named = ", ".join(path_text(path, 60) for path in paths[:4])
        more = ", …" if len(paths) > 4 else ""
        blocks.append(Line(title, Text(f"{plural(len(paths), 'layer')}{how}: {named}{more}")))
    elif paths:
        changes = report.changed
        columns = {
            "layer": [Text(one.path or "the model itself", code=True, limit=120) for one in changes],
            "what": [Text(one.what, limit=80) for one in changes],
            "before": [Text(one.before, limit=120) for one in changes],
            "after": [Text(one.after, limit=120) for one in changes],
        }
        blocks.append(Table(*cells_of(columns), title=f"{title}: {plural(len(paths), 'layer')}", folded=True))
    groups = skip_groups(report.skipped)
    shown = groups if full else groups[: BRIEF["skipped"]]
    texts = tuple(
        Text(f"{plain(group.reason, 160)}: {paths_text(group.paths, len(group.paths) if full else 3)}", limit=20_000)
        for group in shown
    )
    if texts:
        blocks.append(Items(f"skipped: {plural(len(report.skipped), 'layer')}", texts, len(groups) - len(shown)))
    return Section("Layers", tuple(blocks)) if blocks else None


def sensitivity_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Return the most sensitive layers first; the short form has the five most and the five least sensitive."""
    found = sensitivities(report)
    if not found:
        return None
    highest = max(one.worst.quality_drop for one in found)
    shown = found if full else extremes(found)
    amounts = ", ".join(amount_text(point.amount) for point in found[0].points)
    left_out = len(found) - len(shown)
    between = f"; {left_out} in between are not shown" if left_out else ""
    columns: Columns = {
        "layer or group": [Text(one.path or "the model itself", code=True, limit=80) for one in shown],
        "drop": [quality_drop_bars(one, highest) for one in shown],
        "largest": [f"{one.worst.quality_drop:.4f}" for one in shown],
        "at": [amount_text(one.worst.amount) for one in shown],
        "within the guard up to": [amount_within_guard(one) for one in shown],
    }
    table = Table(
        *cells_of(columns, numeric=["largest", "at", "within the guard up to"]),
        title=f"sensitivity ({len(found)} layers or groups)",
        note=f"quality drop with only this layer compressed, at {amounts}, one bar each{between}",
        folded=True,
    )
    most = f"the {MAX_LAYERS} most sensitive of {len(found)}; " if len(found) > MAX_LAYERS else ""
    note = f"{most}drop in quality when only this layer is compressed; dashes: the guard"
    return Section("Sensitivity", (*charts(sensitivity_multiples(found, guard_of(report))), table), note)


def quality_drop_bars(one: Sensitivity, highest: float) -> str:
    """Return the drops of one layer as a row of bars; `highest` is the drop of a full bar."""
    top = max(highest, 1e-12)
    return bars([point.quality_drop / top for point in one.points])


def amount_within_guard(one: Sensitivity) -> str:
    """Return the largest amount within the guard, such as `75%`; `nothing` where the smallest amount fails it."""
    return "nothing" if one.within == 0 else if_known(amount_text, one.within)
