"""Tests of the claims on results."""

from __future__ import annotations

import io

import pytest
from pages import page_text, tones_of
from rich.console import Console

from omgoptim.render import claims, lists, numbers
from omgoptim.render.brief import brief_report
from omgoptim.render.claims import TIMES
from omgoptim.render.markdown import report_markdown
from omgoptim.render.terminal import report_view
from omgoptim.reports import EfficiencyReport, Gains, Measurement, Skip, Total
from omgoptim.reports.measured import SMALLER


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (Gains(speedup=2.0, speedup_low=1.8, speedup_high=2.2), ("2.00x faster (1.80 to 2.20)", "better")),
        (Gains(speedup=0.5, speedup_low=0.4, speedup_high=0.6), ("2.00x slower (1.67 to 2.50)", "worse")),
        (Gains(speedup=1.1, speedup_low=0.9, speedup_high=1.3), ("1.10x, undecided (0.90 to 1.30)", "open")),
        (Gains(speedup=2.0), ("2.00x (point estimate)", "open")),
        (Gains(), ("", "same")),
    ],
)
def test_faster_is_only_said_when_the_interval_excludes_one(gains: Gains, expected: tuple[str, str]) -> None:
    assert claims.speed_claim(gains) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1_246_312, "1.25 MB"), (98_000_000_000, "98 GB")],
)
def test_sizes_are_given_in_decimal_units_with_three_digits(size: int, expected: str) -> None:
    assert numbers.size_text(size) == expected


def test_what_was_not_measured_has_no_row() -> None:
    report = _report(before=Measurement(runtime="torch_eager", size_bytes=1000))
    assert [(row.label, row.before) for row in claims.comparison_rows(report)] == [("size", "1 kB")]


def test_a_larger_artifact_is_called_larger() -> None:
    sides = Measurement(runtime="a", size_bytes=100), Measurement(runtime="b", size_bytes=200)
    report = _report(before=sides[0], after=sides[1], gains=Gains(size_ratio=0.5))
    assert claims.comparison_rows(report)[0].gain == "2.00x larger"
    assert claims.comparison_rows(report)[0].tone == "worse"


def test_zeros_get_a_row_of_their_own_only_where_there_are_any() -> None:
    dense = Measurement(runtime="a", params=100, nonzero_params=100)
    sparse = Measurement(runtime="a", params=100, nonzero_params=50)
    assert [row.label for row in claims.comparison_rows(_report(before=dense, after=dense))] == ["parameters"]
    labels = [row.label for row in claims.comparison_rows(_report(before=dense, after=sparse))]
    assert labels == ["parameters", "non-zero parameters"]


def test_zeros_are_told_as_a_share_and_the_size_without_packing_in_a_row_of_its_own() -> None:
    dense = Measurement(runtime="a", params=1000, nonzero_params=1000, size_bytes=8_900_000)
    sparse = Measurement(runtime="a", params=1000, nonzero_params=100, size_bytes=2_100_000, dense_size_bytes=8_900_000)
    rows = {row.label: row for row in claims.comparison_rows(_report(before=dense, after=sparse))}
    assert rows["non-zero parameters"].gain == "90% zeros"
    assert (rows["dense size"].before, rows["dense size"].after) == ("8.9 MB", "8.9 MB")
    assert claims.packed_size_text(sparse) == "2.1 MB, 8.9 MB dense"
    assert claims.packed_size_text(dense) == "8.9 MB"


def test_parameters_have_a_gain_only_where_their_number_changed() -> None:
    more, less = Measurement(runtime="a", params=200), Measurement(runtime="a", params=100)
    assert [row.gain for row in claims.comparison_rows(_report(before=more, after=less))] == ["2.00x fewer"]
    assert [row.gain for row in claims.comparison_rows(_report(before=more, after=more))] == [""]


def test_skipped_layers_are_grouped_by_reason_the_commonest_first() -> None:
    skips = [Skip(path="a", reason="r1"), Skip(path="b", reason="r2"), Skip(path="c", reason="r2")]
    assert [(g.reason, g.paths) for g in lists.skip_groups(skips)] == [("r2", ("b", "c")), ("r1", ("a",))]


def test_the_chosen_candidate_comes_first(quantized: EfficiencyReport) -> None:
    statuses = [one.status for one in lists.ranked_candidates(quantized)]
    assert statuses == ["chosen", "finalist", "finalist", "dropped", "dropped", "failed", "skipped"]


def test_plain_text_is_one_bounded_line_of_visible_characters() -> None:
    assert numbers.plain("a\x1b[31m\nb\u202e\u200b c\x00") == "a b\\u202e\\u200b c\\x00"
    assert len(numbers.plain("x" * 10_000, 50)) == 50


def test_the_verdict_tells_a_plan_from_a_result(quantized: EfficiencyReport, planned: EfficiencyReport) -> None:
    assert [claims.verdict(report) for report in (quantized, planned)] == ["OK", "PLAN"]
    assert claims.verdict(quantized.model_copy(update={"outcome": "guard_failed"})) == "GUARD FAILED"
    assert [claims.verdict(quantized.model_copy(update={"verb": verb})) for verb in ("prune", "compare")] == [
        "OK",
        "MEASURED",
    ]


def _report(**sides: object) -> EfficiencyReport:
    environment = {"cpu": "c", "threads": 1, "python": "p", "versions": {}, "seed": 0}
    return EfficiencyReport.model_validate(
        {"outcome": "ok", "summary": "s", "verb": "compare", "run_id": "r", "request": {}, "repeat": "c"}
        | {"environment": environment}
        | sides
    )


@pytest.mark.parametrize(
    ("ratio", "tone"),
    [(1.01, "same"), (0.99, "same"), (SMALLER, "better"), (1.9, "better"), (0.9, "worse")],
)
def test_size_memory_and_counts_are_a_gain_from_the_ratio_that_may_be_called_smaller(ratio: float, tone: str) -> None:
    report = _sized(Gains(size_ratio=ratio, memory_ratio=ratio, macs_ratio=ratio))
    tones = {row.label: row.tone for row in claims.comparison_rows(report)}
    assert [tones[label] for label in ("size", "peak memory", "MACs per sample")] == [tone] * 3


@pytest.mark.parametrize("outcome", ["guard_failed", "no_gain"])
def test_nothing_is_shown_as_a_gain_where_the_outcome_is_not_ok(outcome: str) -> None:
    gains = Gains(size_ratio=4, speedup=3, speedup_low=2.5, speedup_high=3.5, memory_ratio=2, macs_ratio=2)
    ok = _sized(gains)
    assert {row.tone for row in claims.comparison_rows(ok)} == {"better"}
    assert "better" not in {row.tone for row in claims.comparison_rows(ok.model_copy(update={"outcome": outcome}))}
    assert "better" in tones_of(ok)
    assert "better" not in tones_of(ok.model_copy(update={"outcome": outcome}))


def test_a_better_quality_is_a_gain_only_where_its_interval_excludes_no_change() -> None:
    undecided = _report(gains=Gains(quality_drop=-0.01, quality_drop_low=-0.02, quality_drop_high=0.001))
    clear = _report(gains=Gains(quality_drop=-0.01, quality_drop_low=-0.02, quality_drop_high=-0.001))
    assert [claims.quality_claim(report)[1] for report in (undecided, clear)] == ["same", "better"]
    rounding = _report(gains=Gains(quality_drop=-1e-8, quality_drop_low=-2e-8, quality_drop_high=-1e-9))
    assert claims.quality_claim(rounding) == ("drop 0.0000 (0.0000 to 0.0000)", "same")


def test_every_face_names_the_files_that_a_size_counts() -> None:
    before = Measurement(runtime="a", size_bytes=100, size_files=["recipe.json", "weights.safetensors"])
    after = Measurement(runtime="b", size_bytes=50, size_files=["model.onnx"])
    report = _report(before=before, after=after, gains=Gains(size_ratio=2))
    expected = "recipe.json, weights.safetensors -> model.onnx"
    assert claims.size_files_text(report) == expected
    assert expected in in_terminal(report)
    assert expected in report_markdown(report)
    assert expected in page_text(report)
    assert claims.size_files_text(_report(before=after)) == "model.onnx"


def test_every_face_tells_the_total_beside_the_step_s_own_gain() -> None:
    total = {"from_run": "prune-1", "size_ratio": 7.9, "params_ratio": 2.1, "quality_drop": 0.01}
    report = _sized(Gains(size_ratio=3.9)).model_copy(update={"total": Total.model_validate(total)})
    expected = "7.90x smaller, 2.10x fewer parameters, drop 0.0100; total speedup not measured"
    for text in (in_terminal(report), report_markdown(report), page_text(report)):
        assert expected in text
        assert "prune-1" in text
        assert "3.90x smaller" in text
    assert brief_report(report)["total"] == total


def in_terminal(report: EfficiencyReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report_view(report), crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _sized(gains: Gains) -> EfficiencyReport:
    side = Measurement(runtime="a", size_bytes=100, peak_memory_bytes=100, macs=100, latency_ms_p50=1.0)
    return _report(before=side, after=side, gains=gains)


def test_times_of_an_overloaded_machine_are_not_shown_side_by_side(quantized: EfficiencyReport) -> None:
    gains = quantized.gains
    assert gains is not None
    nothing = {"speedup": None, "speedup_low": None, "speedup_high": None, "throughput_ratio": None, "launches": 5}
    report = quantized.model_copy(update={"gains": gains.model_copy(update=nothing)})
    rows = {row.label: row for row in claims.comparison_rows(report)}
    assert not [label for label in rows if "latency" in label or "throughput" in label]
    assert (rows["speed"].after, rows["speed"].gain) == ("undecided", "the machine was overloaded")
    answer = brief_report(report)
    assert not set(answer["before"]) & set(TIMES)
    assert [row for row in claims.comparison_rows(quantized) if "latency" in row.label]
