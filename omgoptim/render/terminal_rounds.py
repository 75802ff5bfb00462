"""Rounds, training and sensitivity of a report as rich renderables."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from omgoptim.render import arms, facts, rounds
from omgoptim.reports import EfficiencyReport

MOST_ROUNDS = 8
"""How many rounds the short form shows; the full form shows all."""


def rounds_table(report: EfficiencyReport, full: bool) -> RenderableType | None:
    """What each round was to reach, and the quality at each of its steps."""
    shown = rounds.shown_rounds(report, None if full else MOST_ROUNDS)
    if not shown:
        return None
    columns = rounds.round_columns(shown)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text("rounds", "bold"), title_justify="left")
    for header in columns:
        table.add_column(header, justify="left" if header == "kept" else "right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row, one in enumerate(shown):
        style = "bold green" if one.kept else ""
        cells = (Text(column[row], style) for column in columns.values())
        table.add_row(*cells, Text(facts.plain(one.why, 400 if full else 110)))
    note = rounds.rounds_note(shown)
    notes = [Text(f"  {note}", "dim")] if note else []
    left_out = len(rounds.shown_rounds(report)) - len(shown)
    if left_out:
        notes.append(Text(f"  and {left_out} more: --detail full", "dim"))
    return Group(table, *notes, "")


def training_line(report: EfficiencyReport) -> RenderableType | None:
    """How training went, in one line; of a distillation also its control and its curves."""
    if report.training is None:
        return None
    lines = [Text.assemble(("training  ", "bold"), facts.plain(rounds.training_text(report.training), 600))]
    if report.control is not None:
        lines.append(Text.assemble(("control   ", "bold"), facts.plain(arms.control_text(report.control), 600)))
    curves = arms.curve_lines(report)
    if curves:
        lines.append(Text.assemble(("quality   ", "bold"), "by epoch, on the selection samples"))
        lines += [
            Text.assemble("          ", (bars, "cyan"), f" {rest}")
            for bars, _, rest in (line.partition(" ") for line in curves)
        ]
    return Padding(Group(*lines), (0, 0, 1, 0))


def sensitivity_table(report: EfficiencyReport, full: bool) -> RenderableType | None:
    """What each layer or group costs in quality when it alone is compressed, the most sensitive first."""
    found = rounds.slacks(report)
    if not found:
        return None
    highest = rounds.highest_drop(found)
    shown = found if full else rounds.extremes(found)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text("sensitivity", "bold"), title_justify="left")
    table.add_column("layer or group", overflow="fold")
    table.add_column("drop")
    table.add_column("largest", justify="right", no_wrap=True)
    table.add_column("at", justify="right")
    guarded = any(slack.within is not None for slack in shown)
    if guarded:
        table.add_column("within the guard up to", justify="right")
    for slack in shown:
        cells = [
            Text(facts.plain(slack.path, 80)),
            Text(rounds.spark(slack, highest), "cyan"),
            Text(f"{slack.worst.quality_drop:.4f}"),
            Text(rounds.amount_text(slack.worst.amount)),
        ]
        table.add_row(*cells, *([Text(rounds.within_text(slack))] if guarded else []))
    notes = [Text(f"  each alone, at {rounds.amounts_text(found[0])}; one bar for each", "dim")]
    if len(shown) < len(found):
        left_out = len(found) - len(shown)
        notes.append(Text(f"  and {left_out} between the fifth and the last five: --detail full", "dim"))
    return Group(table, *notes, "")
