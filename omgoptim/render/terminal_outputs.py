"""The outputs of a model as a rich table."""

from __future__ import annotations

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from omgoptim.render import facts
from omgoptim.render.outputs import HEADER, agreement_text, kind_text, reopened_text, shape_text, shown
from omgoptim.reports import EfficiencyReport


def outputs_table(report: EfficiencyReport, full: bool) -> RenderableType | None:
    """The outputs for a terminal."""
    outputs = shown(report, full)
    if not outputs:
        return None
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text("outputs", "bold"), title_justify="left")
    for header in (*HEADER, "fresh process") if full else HEADER:
        found.add_column(header, overflow="fold")
    for output in outputs:
        style = "red" if output.ruined else ""
        found.add_row(
            Text(facts.plain(output.name, 60)),
            Text(facts.plain(shape_text(output), 60)),
            Text(kind_text(output)),
            Text(agreement_text(output), style),
            *([Text(reopened_text(output))] if full else []),
        )
    return found
