"""Sensitivity of quality to the compression of single layers or groups."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Chart, Section, Text, table_of
from omgoptim.render.curves import MOST_LAYERS, sensitivity_multiples
from omgoptim.render.lists import Sensitivity, extremes, sensitivities
from omgoptim.render.numbers import amount_text, bars
from omgoptim.reports import EfficiencyReport


def sensitivity_section(report: EfficiencyReport, full: bool) -> Section | None:
    """The most sensitive layers first; the short form has the five most and the five least sensitive."""
    found = sensitivities(report)
    if not found:
        return None
    highest = max(one.worst.quality_drop for one in found)
    shown = found if full else extremes(found)
    amounts = ", ".join(amount_text(point.amount) for point in found[0].points)
    left_out = len(found) - len(shown)
    between = f"; {left_out} between the fifth and the last five are left out" if left_out else ""
    table = table_of(
        {
            "layer or group": [Text(one.path or "the model itself", code=True, limit=80) for one in shown],
            "drop": [drop_bars(one, highest) for one in shown],
            "largest": [f"{one.worst.quality_drop:.4f}" for one in shown],
            "at": [amount_text(one.worst.amount) for one in shown],
            "within the guard up to": [within_text(one) for one in shown],
        },
        numeric=["largest", "at", "within the guard up to"],
        title=f"sensitivity ({len(found)} layers or groups)",
        note=f"each alone, at {amounts}: one bar for each{between}",
        folded=True,
    )
    guard = report.request.get("max_quality_drop")
    picture = sensitivity_multiples(found, float(guard) if isinstance(guard, (int, float)) else None)
    most = f"the {MOST_LAYERS} most sensitive of {len(found)}; " if len(found) > MOST_LAYERS else ""
    note = f"{most}drop in quality when this alone is compressed; dashes: the guard"
    blocks: tuple[Block, ...] = (Chart(picture), table) if picture else (table,)
    return Section("Sensitivity", blocks, note)


def drop_bars(one: Sensitivity, highest: float) -> str:
    """The drops of one layer as a row of bars; `highest` is the drop of a full bar."""
    top = max(highest, 1e-12)
    return bars([point.quality_drop / top for point in one.points])


def within_text(one: Sensitivity) -> str:
    """`75%`: how much may be taken from this layer alone; `nothing` where the smallest amount is too much."""
    return "" if one.within is None else amount_text(one.within) if one.within else "nothing"
