"""Tests of coverage, guard and explanation of a quantization in every form of a report."""

from __future__ import annotations

import json
import math
from io import StringIO
from typing import Any

from pages import blocks_of, drawings_of, page_text
from rich.console import Console

from omgoptim.render import brief
from omgoptim.render.charts import noise_bars
from omgoptim.render.html import report_html
from omgoptim.render.markdown import MAX_BRIEF, MAX_FULL, report_markdown
from omgoptim.render.sections.quantization import alternative_texts, coverage_tone, guard_texts, parts_text
from omgoptim.render.terminal import report_view
from omgoptim.reports import Alternative, Coverage, EfficiencyReport, Gain, GainsBy, Guard, LayerNoise

LINE = "REAL. 2 of 3 layers in int8, 98.8 % of the weight bytes; 2 computed in integers by onnxruntime."


def shown(report: EfficiencyReport, *, full: bool = False) -> str:
    console = Console(file=StringIO(), width=160, no_color=True)
    console.print(report_view(report, full=full))
    assert isinstance(console.file, StringIO)
    return " ".join(console.file.getvalue().split())


def changed(report: EfficiencyReport, record: str, **values: Any) -> EfficiencyReport:
    part = getattr(report, record).model_copy(update=values)
    return report.model_copy(update={record: part})


def test_the_short_answer_has_the_verdict_of_the_coverage_without_its_layers(explained: EfficiencyReport) -> None:
    answer = brief.brief_report(explained)
    assert answer["coverage"] == {
        "verdict": "REAL",
        "why": LINE.removeprefix("REAL. "),
        "changed": 2,
        "total": 3,
        "integer": 2,
        "weight_share": 0.988,
    }
    assert answer["guard"]["layers_in_float"] == 2
    assert answer["guard"]["first"] == ["body.2", "head"]
    assert answer["findings"][0]["recovered"] == 0.01
    assert [layer["path"] for layer in answer["noisiest_layers"]] == [f"block.{index}" for index in range(5)]
    assert answer["explanation"]["speedup_bound"] == 2.5
    assert answer["times"] == ["QLinearConv 60% (integers)", "Softmax 40% (float)"]
    assert len(json.dumps(answer)) <= MAX_BRIEF


def test_a_report_without_any_of_it_says_nothing_of_it(quantized: EfficiencyReport) -> None:
    nothing = {"coverage", "guard", "explanation", "findings", "noisiest_layers", "times"}
    assert nothing.isdisjoint(brief.brief_report(quantized))
    for text in (report_markdown(quantized, "full"), shown(quantized, full=True), page_text(quantized)):
        assert "Coverage" not in text
        assert "Explanation" not in text
        assert "coverage" not in text


def test_the_whole_answer_of_a_model_with_many_layers_keeps_a_hundred_and_says_how_many_there_were(
    explained: EfficiencyReport,
) -> None:
    coverage = explained.coverage
    assert coverage is not None
    answer = brief.full_report(changed(explained, "coverage", layers=list(coverage.layers) * 200))
    assert len(answer["coverage"]["layers"]) == 100
    assert answer["coverage"]["layers_in_all"] == 600
    assert answer["explanation"] == json.loads(explained.model_dump_json())["explanation"]
    assert len(json.dumps(answer)) <= MAX_FULL


def test_markdown_has_one_line_on_coverage_and_in_full_every_layer(explained: EfficiencyReport) -> None:
    text = report_markdown(explained)
    assert f"Coverage: {LINE}" in text.splitlines()
    assert "Guard: holds, drop 0.0031 on the selection samples after 4 full evaluations, 12 s." in text
    assert "2 layers kept in float (2.3 kB): body.2, head" in text.splitlines()
    assert "| `block.0` | Conv | 15.5 dB | +3.0 dB | +0.0125 | 288 B |" in text
    assert "spread channels in block.0, block.1: channel ranges differ by 41x. Fix: effort balanced" in text
    assert "at most 2.50x faster if the integer layers took no time (Amdahl's law)" in text
    assert "block.6" not in text
    assert "stored" not in text
    assert len(text) <= MAX_BRIEF
    full = report_markdown(explained, "full")
    assert "| `body.0` | Conv | 8x8x3x3 | float32 -> int8 | 2.3 kB -> 616 B | int8 |  |" in full.splitlines()
    assert "| 2.3 kB | float32 | left in float by targets or ignore |" in full
    assert "block.6" in full


def test_the_terminal_has_the_same_facts_and_the_layers_only_in_full(explained: EfficiencyReport) -> None:
    text = shown(explained)
    assert f"coverage {LINE}" in text
    assert "guard holds, drop 0.0031 on the selection samples after 4 full evaluations" in text
    assert "finding spread channels in block.0, block.1" in text
    assert "and 2 more: --detail full" in text
    assert "body.0" not in text
    full = shown(explained, full=True)
    assert "layers with weights" in full
    assert "body.0" in full
    assert "float32 -> int8" in full


def test_the_page_has_every_layer_every_finding_and_a_bar_for_each_sensitive_layer(explained: EfficiencyReport) -> None:
    coverage = next(block for block in blocks_of(explained, "Coverage and guard") if block.get("label") == "coverage")
    assert coverage["head"] == {"text": "REAL.", "tone": "better"}
    assert coverage["text"] == LINE.removeprefix("REAL. ")
    text = page_text(explained)
    assert text.splitlines().count("2.3 kB -> 616 B") == 2
    assert "channel ranges differ by 41x" in text
    assert explained.explanation is not None
    (bars,) = drawings_of(explained, "bars")
    assert len(bars["bars"]) == len(explained.explanation.layers) + 1
    assert bars["bars"][-1]["text"] == "14.2 dB"
    (strip,) = drawings_of(explained, "strip")
    assert [kind for _, _, kind in strip["layers"]] == ["integer", "integer", "left"]


def test_a_simulated_quantization_and_a_failed_guard_are_not_successes(explained: EfficiencyReport) -> None:
    coverage = changed(explained, "coverage", verdict="SIMULATED", why="4 layers in int8, but only in storage.")
    assert "Coverage: SIMULATED. 4 layers in int8, but only in storage." in report_markdown(coverage)
    assert {"text": "SIMULATED.", "tone": "open"} in [b.get("head") for b in blocks_of(coverage, "Coverage and guard")]
    failed = changed(explained, "guard", holds=False, kept_in_float=[], stopped="its time of 600 s is over")
    assert failed.guard is not None
    (only,) = guard_texts(failed.guard)
    assert only.startswith("does not hold, drop 0.0031")
    assert only.endswith("It stopped early: its time of 600 s is over.")


def test_of_many_layers_in_float_the_first_are_named(explained: EfficiencyReport) -> None:
    guard = explained.guard
    assert isinstance(guard, Guard)
    many = guard.model_copy(update={"kept_in_float": [f"layer.{index}" for index in range(30)], "evaluations": 1})
    first, second = guard_texts(many)
    assert "after 1 full evaluation," in first
    assert second.endswith("layer.0, layer.1, layer.2, layer.3 and 26 more")


def test_the_length_of_a_bar_is_its_signal_to_noise_ratio_and_one_without_noise_has_its_row() -> None:
    layers = [LayerNoise(path=name, kind="Conv", sqnr_db=db, bytes=4) for name, db in (("a", 10.0), ("<b>", math.inf))]
    bars = noise_bars(layers, whole_db=20.0)
    assert bars is not None
    assert [(bar.label, bar.value) for bar in bars.bars] == [("a", 10.0), ("<b>", 0.0), ("all layers quantized", 20.0)]
    assert noise_bars([]) is None


def test_hostile_names_reach_neither_tags_nor_code_spans_nor_a_long_answer(hostile: EfficiencyReport) -> None:
    page = report_html(hostile)
    assert "<script>alert" not in page
    assert "\u202e" not in page
    for detail in ("brief", "full"):
        text = report_markdown(hostile, detail)  # type: ignore[arg-type]
        assert "\x1b" not in text
        assert all(line.count("`") % 2 == 0 for line in text.splitlines())
    answer = brief.brief_report(hostile)
    assert len(json.dumps(answer, ensure_ascii=False)) <= MAX_BRIEF


def test_each_verdict_has_a_tone_of_its_own() -> None:
    common: dict[str, Any] = {"why": "", "changed": 0, "total": 0, "weight_share": 0.0}
    verdicts = ("REAL", "SIMULATED", "NO-OP")
    tones = [coverage_tone(Coverage(verdict=verdict, **common)) for verdict in verdicts]
    assert tones == ["better", "open", "worse"]


def test_what_a_gain_comes_from_and_what_else_was_kept_is_told_with_the_call_that_delivers_it(
    quantized: EfficiencyReport,
) -> None:
    parts = GainsBy(
        engine=Gain(speedup=3.1, speedup_low=3.0, speedup_high=3.21), precision=Gain(speedup=1.42, size_ratio=3.9)
    )
    kept = [
        Alternative(name="bf16-on-x", candidate="bf16 on x", runtime="openvino", precision="bfloat16", size_ratio=1.9,
                    speedup=2.0, quality_drop=0.0, holds=True, path="p", command="omgoptim pick r bf16-on-x"),
        Alternative(name="fp32-on-x", candidate="fp32 on x", runtime="openvino", precision="float32", size_ratio=0.92,
                    best_for=["speed", "quality"], quality_drop=0.0, holds=True, path="p", command="omgoptim pick r f"),
    ]  # fmt: skip
    report = quantized.model_copy(update={"gains_by": parts, "alternatives": kept})
    expected = "engine alone 3.10x (3.00 to 3.21), lower precision on it 1.42x (point estimate)"
    assert parts_text(parts) == expected
    assert alternative_texts(report) == [
        "fp32-on-x: 1.09x larger, drop 0.0000; best speed and quality; omgoptim pick r f",
        "bf16-on-x: 1.90x smaller, 2.00x the speed, drop 0.0000; omgoptim pick r bf16-on-x",
    ]
    for text in (report_markdown(report, "brief"), page_text(report)):
        assert expected in text
        assert "omgoptim pick r bf16-on-x" in text
    answer = brief.brief_report(report)
    assert [one["name"] for one in answer["alternatives"]] == ["bf16-on-x", "fp32-on-x"]
    assert answer["gains_by"]["engine"]["speedup"] == 3.1
