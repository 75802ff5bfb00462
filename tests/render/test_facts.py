"""Tests of the words in which results are told."""

from __future__ import annotations

import pytest

from omgoptim.render import facts
from omgoptim.reports import EfficiencyReport, Gains, Measurement, Skip


@pytest.mark.parametrize(
    ("gains", "told"),
    [
        (Gains(speedup=2.0, speedup_low=1.8, speedup_high=2.2), ("2.00x faster (1.80 to 2.20)", "better")),
        (Gains(speedup=0.5, speedup_low=0.4, speedup_high=0.6), ("2.00x slower (1.67 to 2.50)", "worse")),
        (Gains(speedup=1.1, speedup_low=0.9, speedup_high=1.3), ("1.10x, undecided (0.90 to 1.30)", "open")),
        (Gains(speedup=2.0), ("2.00x (point estimate)", "open")),
        (Gains(), ("", "same")),
    ],
)
def test_faster_is_only_said_when_the_interval_excludes_one(gains: Gains, told: tuple[str, str]) -> None:
    assert facts.speed_claim(gains) == told


@pytest.mark.parametrize(
    ("size", "told"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1_246_312, "1.25 MB"), (98_000_000_000, "98 GB")]
)
def test_sizes_are_told_in_decimal_units_with_three_digits(size: int, told: str) -> None:
    assert facts.size_text(size) == told


def test_what_was_not_measured_has_no_row() -> None:
    report = _report(before=Measurement(runtime="torch_eager", size_bytes=1000))
    assert [(row.label, row.before) for row in facts.comparison_rows(report)] == [("size", "1 kB")]


def test_a_larger_artifact_is_called_larger() -> None:
    sides = Measurement(runtime="a", size_bytes=100), Measurement(runtime="b", size_bytes=200)
    report = _report(before=sides[0], after=sides[1], gains=Gains(size_ratio=0.5))
    assert facts.comparison_rows(report)[0].gain == "2.00x larger"
    assert facts.comparison_rows(report)[0].tone == "worse"


def test_zeros_get_a_row_of_their_own_only_where_there_are_any() -> None:
    dense = Measurement(runtime="a", params=100, nonzero_params=100)
    sparse = Measurement(runtime="a", params=100, nonzero_params=50)
    assert [row.label for row in facts.comparison_rows(_report(before=dense, after=dense))] == ["parameters"]
    labels = [row.label for row in facts.comparison_rows(_report(before=dense, after=sparse))]
    assert labels == ["parameters", "non-zero parameters"]


def test_zeros_are_told_as_a_share_and_the_size_without_packing_in_a_row_of_its_own() -> None:
    dense = Measurement(runtime="a", params=1000, nonzero_params=1000, size_bytes=8_900_000)
    sparse = Measurement(runtime="a", params=1000, nonzero_params=100, size_bytes=2_100_000, dense_size_bytes=8_900_000)
    rows = {row.label: row for row in facts.comparison_rows(_report(before=dense, after=sparse))}
    assert rows["non-zero parameters"].gain == "90% zeros"
    assert (rows["size if zeros were numbers"].before, rows["size if zeros were numbers"].after) == ("8.9 MB", "8.9 MB")
    assert facts.size_words(sparse) == "2.1 MB, 8.9 MB if zeros were stored as numbers"
    assert facts.size_words(dense) == "8.9 MB"


def test_parameters_have_a_gain_only_where_their_number_changed() -> None:
    more, less = Measurement(runtime="a", params=200), Measurement(runtime="a", params=100)
    assert [row.gain for row in facts.comparison_rows(_report(before=more, after=less))] == ["2.00x fewer"]
    assert [row.gain for row in facts.comparison_rows(_report(before=more, after=more))] == [""]


def test_skipped_layers_are_grouped_by_reason_the_commonest_first() -> None:
    skips = [Skip(path="a", reason="r1"), Skip(path="b", reason="r2"), Skip(path="c", reason="r2")]
    assert [(g.reason, g.paths) for g in facts.skip_groups(skips)] == [("r2", ("b", "c")), ("r1", ("a",))]


def test_the_chosen_candidate_comes_first(quantized: EfficiencyReport) -> None:
    statuses = [one.status for one in facts.ranked_candidates(quantized)]
    assert statuses == ["chosen", "finalist", "finalist", "dropped", "dropped", "failed", "skipped"]


def test_plain_text_is_one_bounded_line_of_visible_characters() -> None:
    assert facts.plain("a\x1b[31m\nb\u202e\u200b c\x00") == "a b\\u202e\\u200b c\\x00"
    assert len(facts.plain("x" * 10_000, 50)) == 50


def test_the_verdict_tells_a_plan_from_a_result(quantized: EfficiencyReport, planned: EfficiencyReport) -> None:
    assert [facts.verdict(report) for report in (quantized, planned)] == ["OK", "PLAN"]
    assert facts.verdict(quantized.model_copy(update={"outcome": "guard_failed"})) == "GUARD FAILED"
    assert [facts.verdict(quantized.model_copy(update={"verb": verb})) for verb in ("prune", "compare")] == [
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
