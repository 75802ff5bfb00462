"""The before / after table, and the gain against the first original of a chain."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Columns, Line, Section, Text, table_of
from omgoptim.render.claims import comparison_rows, side_title, sides, size_files_text, speed_undecided, total_text
from omgoptim.reports import EfficiencyReport


def comparison_section(report: EfficiencyReport, _full: bool) -> Section | None:
    """One row for each quantity that was measured on either side."""
    rows = comparison_rows(report)
    if not rows:
        return None
    names = sides(report)
    labels = [row.label for row in rows]
    if report.before is None or report.after is None:
        title = side_title("measured", report.before or report.after)
        values = [Text(row.before or row.after) for row in rows]
        blocks: list[Block] = [table_of({"": labels, title: values}, numeric=[title])]
        heading = "Measured"
    else:
        before, after = side_title(names[0], report.before), side_title(names[1], report.after)
        columns: Columns = {
            "": labels,
            before: [Text(row.before) for row in rows],
            after: [Text(row.after) for row in rows],
            "gain": [Text(row.gain, tone=row.tone) for row in rows],
        }
        blocks = [table_of(columns, numeric=[before, after])]
        heading = f"{names[0].capitalize()} and {names[1]}"
    if report.total is not None:
        text = f"since the original of run {report.total.from_run}: {total_text(report.total)}"
        blocks.append(Line("total", Text(text, limit=300)))
    launches = report.gains.launches if report.gains else None
    many = "launch" if launches == 1 else "launches"
    decided = launches and not speed_undecided(report)
    notes = [f"latency ratio over {launches} fresh {many} of both"] if decided else []
    notes += [f"size counts {files}"] if (files := size_files_text(report)) else []
    return Section(heading, tuple(blocks), "; ".join(notes), "comparison")
