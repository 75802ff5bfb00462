"""A report as one self-contained page for a person: no scripts, nothing loaded, every text escaped."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape

from omgoptim.render import charts, facts
from omgoptim.render.html_parts import section, table, text
from omgoptim.render.html_precision import coverage_section, explanation_section
from omgoptim.render.html_rounds import rounds_section, sensitivity_section
from omgoptim.render.html_style import CSS
from omgoptim.render.outputs import outputs_section
from omgoptim.reports import EfficiencyReport, Gains, Measurement

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_FADED = ("dropped", "failed", "skipped")


def report_html(report: EfficiencyReport) -> str:
    """The page: verdict, big numbers, table, candidates and layers as pictures, warnings, next steps, how to repeat."""
    body = "\n".join(
        part(report)
        for part in (
            _header,
            _tiles,
            _warnings,
            _comparison,
            outputs_section,
            coverage_section,
            explanation_section,
            rounds_section,
            sensitivity_section,
            _candidates,
            _layers,
            _next_steps,
            _artifact,
            _layers_changed,
            _environment,
            _repeat,
        )
    )
    title = escape(f"omgoptim {report.verb}: {facts.verdict(report).lower()}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _header(report: EfficiencyReport) -> str:
    model = str(report.request.get("model") or " and ".join(str(report.request.get(k, "")) for k in ("a", "b")))
    badge = f'<span class="badge {report.outcome}">{facts.verdict(report)}</span>'
    kicker = f"{badge}<span>{text(report.verb)}</span><code>{text(model)}</code><span>{text(report.run_id)}</span>"
    first, stop, rest = facts.plain(report.summary, 1200).partition(". ")
    lead = f'<p class="lead">{escape(rest)}</p>' if rest else ""
    return f'<header><p class="kicker">{kicker}</p><h1>{escape(first + stop.strip())}</h1>{lead}</header>'


def _tiles(report: EfficiencyReport) -> str:
    two = report.before is not None and report.after is not None
    tiles = _gain_tiles(report) if two else _measured_tiles(report.before or report.after)
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(big: str, label: str, small: str = "", tone: str = "") -> str:
    lines = f'<b class="{tone}">{escape(big)}</b><span>{escape(label)}</span><small>{escape(small)}</small>'
    return f'<div class="tile">{lines}</div>'


def _gain_tiles(report: EfficiencyReport) -> list[str]:
    gains, before, after = report.gains or Gains(), report.before, report.after
    tiles = []
    claim, tone = facts.speed_claim(gains)
    if claim:
        big, _, rest = claim.partition(" ")
        times = _arrow(before, after, lambda m: m.latency_ms_p50, facts.time_text)
        tiles.append(_tile(big.rstrip(","), rest, times, facts.claimed(tone, report)))
    for row in facts.comparison_rows(report):
        if row.label in ("size", "peak memory") and row.gain:
            big, _, rest = row.gain.partition(" ")
            now = facts.size_words(after) if row.label == "size" and after else row.after
            tiles.append(_tile(big, f"{rest} {row.label}".strip(), f"{row.before} → {now}", row.tone))
    if after and after.quality is not None:
        drop, tone = facts.quality_claim(report)
        tiles.append(_tile(f"{after.quality:.4f}", facts.quality_label(after), drop, tone))
    if report.control is not None and report.control.quality is not None and report.control.gain is not None:
        claim, tone = facts.control_claim(report.control)
        _, _, interval = claim.partition("(")
        small = f"without it {report.control.quality:.4f} ({interval}"
        brought = _tile(f"{report.control.gain:+.4f}", "what the teacher brought", small, facts.claimed(tone, report))
        tiles.append(brought)
    return tiles


def _measured_tiles(measured: Measurement | None) -> list[str]:
    if measured is None:
        return []
    tiles = []
    if measured.latency_ms_p50 is not None:
        p90 = f"p90 {facts.time_text(measured.latency_ms_p90)}" if measured.latency_ms_p90 is not None else ""
        tiles.append(_tile(facts.time_text(measured.latency_ms_p50), f"latency on {measured.runtime}", p90))
    if measured.size_bytes is not None:
        params = f"{facts.count_text(measured.params)} parameters" if measured.params is not None else ""
        tiles.append(_tile(facts.size_text(measured.size_bytes), "on disk", params))
    if measured.macs is not None:
        tiles.append(_tile(facts.count_text(measured.macs), "MACs per sample", "1 MAC = 2 FLOPs"))
    if measured.quality is not None:
        tiles.append(_tile(f"{measured.quality:.4f}", facts.quality_label(measured)))
    return tiles


def _arrow(
    before: Measurement | None,
    after: Measurement | None,
    pick: Callable[[Measurement], float | None],
    show: Callable[[float], str],
) -> str:
    values = [pick(side) if side else None for side in (before, after)]
    return " → ".join(show(value) for value in values if value is not None)


def _warnings(report: EfficiencyReport) -> str:
    items = "".join(f"<li>{text(warning, 600)}</li>" for warning in report.warnings)
    return section("Warnings", f"<ul>{items}</ul>", kind="warnings") if items else ""


def _comparison(report: EfficiencyReport) -> str:
    rows = facts.comparison_rows(report)
    if not rows:
        return ""
    two = report.before is not None and report.after is not None
    files = facts.size_files_text(report)
    notes = [f"size counts {text(files)}"] if files else []
    if not two:
        title = facts.side_title("measured", report.before or report.after)
        cells = (f'<tr><td>{text(r.label)}</td><td class="n">{text(r.before or r.after)}</td></tr>' for r in rows)
        return section("Measured", table((("", False), (text(title), True)), cells), "; ".join(notes))
    names = facts.sides(report)
    header = (
        ("", False),
        (text(facts.side_title(names[0], report.before)), True),
        (text(facts.side_title(names[1], report.after)), True),
        ("gain", False),
    )
    cells = (
        f'<tr><td>{text(r.label)}</td><td class="n">{text(r.before)}</td><td class="n">{text(r.after)}</td>'
        f'<td class="{r.tone}">{text(r.gain)}</td></tr>'
        for r in rows
    )
    launches = report.gains.launches if report.gains else None
    many = "launch" if launches == 1 else "launches"
    ratio_note = [f"latency ratio over {launches} fresh {many} of both"] if launches else []
    note = "; ".join([*ratio_note, *notes])
    total = ""
    if report.total is not None:
        first = f"since the original of run <code>{text(report.total.from_run, 80)}</code>"
        total = f'<p class="note">{first}: {text(facts.total_text(report.total))}</p>'
    return section(f"{names[0].capitalize()} and {names[1]}", table(header, cells) + total, note)


def _candidates(report: EfficiencyReport) -> str:
    candidates = facts.ranked_candidates(report)
    if not candidates:
        return ""
    header = (
        ("", False),
        ("candidate", False),
        ("", False),
        ("speedup" if any(one.speedup is not None for one in candidates) else "", True),
        ("size", True),
        ("drop" if any(one.quality_drop is not None for one in candidates) else "", True),
        ("why", False),
    )
    rows = []
    for number, one in enumerate(candidates, start=1):
        kind = "chosen" if one.status == "chosen" else "faded" if one.status in _FADED else ""
        speedup = "" if one.speedup is None else facts.ratio_text(one.speedup)
        size = "" if one.size_bytes is None else facts.size_text(one.size_bytes)
        drop = "" if one.quality_drop is None else facts.drop_text(one.quality_drop)
        rows.append(
            f'<tr class="{kind}"><td>{number}</td><td>{text(one.name, 80)}</td><td>{one.status}</td>'
            f'<td class="n">{speedup}</td>'
            f'<td class="n">{size}</td><td class="n drop">{drop}</td><td class="why">{text(one.why)}</td></tr>'
        )
    picture = charts.candidate_scatter(report)
    trial = ", after a short trial" if report.verb == "distill" else ""
    note = f"quality on the selection split{trial}" if picture else ""
    return section("Candidates", picture + table(header, rows), note, "candidates")


def _layers(report: EfficiencyReport) -> str:
    picture = charts.layer_bars(report.layers)
    return section("Costliest layers", picture, "one call at batch 1") if picture else ""


def _next_steps(report: EfficiencyReport) -> str:
    items = "".join(f"<li>{text(step.why)}<pre>{text(step.command, 1500)}</pre></li>" for step in report.next_steps)
    return section("Next", f"<ul>{items}</ul>") if items else ""


def _artifact(report: EfficiencyReport) -> str:
    artifact = report.artifact
    if artifact is None:
        return ""
    files = ", ".join(f"{text(name, 80)} ({facts.size_text(size)})" for name, size in artifact.files.items())
    where = f'<p><code>{text(artifact.path, 600)}</code></p><p class="note">{files}</p>'
    return section("Artifact", f"{where}<pre>{escape(facts.block(artifact.load))}</pre>")


def _layers_changed(report: EfficiencyReport) -> str:
    if not report.changed and not report.skipped:
        return ""
    changed = (
        f"<tr><td><code>{text(c.path, 120)}</code></td><td>{text(c.what, 80)}</td>"
        f"<td>{text(c.before, 120)} → {text(c.after, 120)}</td></tr>"
        for c in report.changed
    )
    skipped = "".join(
        f"<li>{text(group.reason)}<br><code>{', '.join(text(path, 120) for path in group.paths[:40])}</code>"
        f"{f' and {len(group.paths) - 40} more' if len(group.paths) > 40 else ''}</li>"
        for group in facts.skip_groups(report.skipped)
    )
    body = ""
    if report.changed:
        listed = table((("layer", False), ("what", False), ("", False)), changed)
        title = f"{len(facts.changed_paths(report))} {facts.changed_title(report)}"
        body += f"<details><summary>{title}</summary>{listed}</details>"
    if report.skipped:
        body += (
            f"<details><summary>{len(report.skipped)} left as they are, and why</summary><ul>{skipped}</ul></details>"
        )
    return section("Layers", body)


def _environment(report: EfficiencyReport) -> str:
    here = report.environment
    features = f" ({', '.join(here.cpu_features)})" if here.cpu_features else ""
    facts_of = {
        "cpu": f"{here.cpu}{features}",
        "gpu": here.gpu or "none",
        "device": f"{here.device}, {here.threads} threads",
        "python": here.python,
        "versions": ", ".join(f"{name} {version}" for name, version in here.versions.items()),
        "seed": str(here.seed),
        "load before timing": "" if here.load is None else f"{here.load:.0%} of the machine",
        "lineage": " → ".join(report.lineage),
    }
    items = "".join(f"<dt>{name}</dt><dd>{text(value, 800)}</dd>" for name, value in facts_of.items() if value)
    return section("Where these numbers come from", f"<dl>{items}</dl>")


def _repeat(report: EfficiencyReport) -> str:
    request = escape(json.dumps(report.request, indent=2, ensure_ascii=True)[:8000])
    whole = f"<details><summary>the whole request</summary><pre>{request}</pre></details>"
    return section("Repeat", f"<pre>{text(report.repeat, 2000)}</pre>{whole}")
