"""The layers: the costliest, those that were changed, and those that were left alone."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Chart, Items, Line, Section, Text, table_of
from omgoptim.render.charts import layer_bars
from omgoptim.render.lists import changed_paths, changed_title, skip_groups
from omgoptim.render.numbers import count_text, path_text, paths_text, plain, plural, size_text, time_text
from omgoptim.reports import EfficiencyReport

BRIEF = {"costliest": 8, "skipped": 3}
"""Most entries of each kind in the short form."""


def costliest_section(report: EfficiencyReport, full: bool) -> Section | None:
    """The layers that take most time, MACs or bytes."""
    if not report.layers:
        return None
    shown = report.layers if full else report.layers[: BRIEF["costliest"]]
    table = table_of(
        {
            "layer": [Text(layer.path or "the model itself", code=True, limit=80) for layer in shown],
            "kind": [Text(layer.kind, limit=40) for layer in shown],
            "time": ["" if layer.time_ms is None else time_text(layer.time_ms) for layer in shown],
            "share": ["" if layer.time_share is None else f"{layer.time_share:.0%}" for layer in shown],
            "MACs": ["" if layer.macs is None else count_text(layer.macs) for layer in shown],
            "size": ["" if layer.size_bytes is None else size_text(layer.size_bytes) for layer in shown],
        },
        numeric=["time", "share", "MACs", "size"],
        title="costliest layers",
        left_out=len(report.layers) - len(shown),
        folded=True,
    )
    picture = layer_bars(report.layers)
    blocks: tuple[Block, ...] = (Chart(picture), table) if picture else (table,)
    return Section("Costliest layers", blocks, "one call at batch 1")


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
        blocks.append(table_of(columns, title=f"{title}: {plural(len(paths), 'layer')}", folded=True))
    groups = skip_groups(report.skipped)
    shown = groups if full else groups[: BRIEF["skipped"]]
    texts = tuple(
        Text(f"{plain(group.reason, 160)}: {paths_text(group.paths, len(group.paths) if full else 3)}", limit=20_000)
        for group in shown
    )
    if texts:
        blocks.append(Items(f"skipped: {plural(len(report.skipped), 'layer')}", texts, len(groups) - len(shown)))
    return Section("Layers", tuple(blocks)) if blocks else None
