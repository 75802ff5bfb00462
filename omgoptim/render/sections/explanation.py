"""Section of `--explain`: causes of the quality drop, and time by kind of operator."""

from __future__ import annotations

from omgoptim.render.blocks import Block, Chart, Columns, Line, Section, Text, table_of
from omgoptim.render.charts import noise_bars
from omgoptim.render.numbers import paths_text, plain, ratio_text, size_text
from omgoptim.render.numbers import time_text as duration_text
from omgoptim.reports import EfficiencyReport, Explanation, Finding, TimeShare

BRIEF = {"findings": 3, "layers": 5, "times": 4}
"""Most entries of each kind in the short form."""


def explanation_section(report: EfficiencyReport, full: bool) -> Section | None:
    """Findings, the most sensitive layers, and the time of one call by kind of operator."""
    explanation = report.explanation
    if explanation is None:
        return None
    blocks: list[Block] = [Line("explained", Text(explanation.summary, limit=1200))]
    findings = explanation.findings if full else explanation.findings[: BRIEF["findings"]]
    blocks += [Line("found", Text(finding_text(one), tone="open", limit=900)) for one in findings]
    blocks += _sensitive(explanation, full)
    times = explanation.times if full else explanation.times[: BRIEF["times"]]
    if times:
        columns: Columns = {
            "kind": [Text(one.kind, limit=60) for one in times],
            "time": [duration_text(one.time_ms) for one in times],
            "share": [f"{one.share:.0%}" for one in times],
            "computed in": [numbers_text(one) for one in times],
        }
        note, left_out = bound_text(explanation), len(explanation.times) - len(times)
        title = "time of one call"
        blocks.append(table_of(columns, numeric=["time", "share"], title=title, note=note, left_out=left_out))
    return Section("Explanation", tuple(blocks))


def _sensitive(explanation: Explanation, full: bool) -> list[Block]:
    layers = explanation.layers if full else explanation.layers[: BRIEF["layers"]]
    if not layers:
        return []
    columns: Columns = {
        "layer": [Text(layer.path or "the model itself", code=True, limit=80) for layer in layers],
        "kind": [Text(layer.kind, limit=40) for layer in layers],
        "alone": [f"{layer.sqnr_db:.1f} dB" for layer in layers],
        "gain in float": ["" if layer.sqnr_gain_db is None else f"{layer.sqnr_gain_db:+.1f} dB" for layer in layers],
        "recovered": ["" if layer.recovered is None else f"{layer.recovered:+.4f}" for layer in layers],
        "float weights": [size_text(layer.bytes) for layer in layers],
    }
    numeric = ["alone", "gain in float", "recovered", "float weights"]
    table = table_of(
        columns,
        numeric=numeric,
        title="most sensitive layers",
        note=noise_note(explanation),
        left_out=len(explanation.layers) - len(layers),
        folded=True,
    )
    picture = noise_bars(explanation.layers, explanation.sqnr_db)
    note = "SQNR of the output with only this layer quantized; short bars hurt"
    return [Chart(picture, note), table] if picture else [table]


def noise_note(explanation: Explanation) -> str:
    """Return the legend of the table of sensitive layers."""
    whole = "" if explanation.sqnr_db is None else f", {explanation.sqnr_db:.1f} dB with all quantized"
    return (
        f"alone: signal-to-noise of the output with only this layer quantized{whole}; gain in float, recovered: signal "
        f"and {plain(explanation.metric, 40)} that come back with only this layer in float, "
        f"on {explanation.samples} samples"
    )


def finding_text(finding: Finding) -> str:
    """Return `spread channels in a, b: the ranges differ by 40x. Fix: … (recovered +0.0120)`."""
    where = f" in {paths_text(finding.paths, 3)}" if finding.paths else ""
    brought = "" if finding.recovered is None else f" (recovered {finding.recovered:+.4f})"
    evidence = plain(finding.evidence, 200).rstrip(".")
    return f"{plain(finding.name, 60)}{where}: {evidence}. Fix: {plain(finding.fix, 200)}{brought}"


def time_text(time: TimeShare) -> str:
    """Return `Conv 61% (integers)`."""
    return f"{plain(time.kind, 40)} {time.share:.0%} ({numbers_text(time)})"


def numbers_text(time: TimeShare) -> str:
    """Return the arithmetic of its kernels."""
    return "integers" if time.quantized else "float"


def bound_text(explanation: Explanation) -> str:
    """Amdahl's bound; empty where it is not known."""
    if explanation.speedup_bound is None:
        return ""
    return f"at most {ratio_text(explanation.speedup_bound)} faster if what computes in integers took no time"
