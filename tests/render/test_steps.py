"""The steps of an optimize run: the front, what was expected against what was measured, and the picture."""

from __future__ import annotations

import pytest
from pages import drawings_of, page_text

from omgoptim.render.charts import expected_bars, step_scatter
from omgoptim.render.sections.candidates import expectation_error, steps_section
from omgoptim.reports import EfficiencyReport, Step

STEPS = [
    Step(name="quantize", verb="quantize", status="rolled_back", speedup=2.0, size_bytes=250, quality=0.95,
         quality_drop=0.0, on_front=True),
    Step(name="prune <50%>", verb="prune", status="kept", speedup=1.6, expected_speedup=4.0, size_bytes=300,
         quality=0.94, quality_drop=0.01),
    Step(name="quantize after", verb="quantize", status="kept", speedup=4.0, expected_speedup=5.0, size_bytes=70,
         quality=0.94, quality_drop=0.01, on_front=True),
    Step(name="distill", verb="distill", status="failed", why="no such student"),
]  # fmt: skip


@pytest.fixture
def optimized(pruned: EfficiencyReport) -> EfficiencyReport:
    request = {**pruned.request, "max_quality_drop": 0.02}
    return pruned.model_copy(update={"verb": "optimize", "steps": STEPS, "request": request, "rounds": []})


def test_the_error_of_the_expectations_is_the_median_over_the_steps_that_have_both() -> None:
    assert expectation_error(STEPS) == pytest.approx((4.0 / 1.6 - 1 + 5.0 / 4.0 - 1) / 2)
    assert expectation_error(STEPS[:1]) is None


def test_the_picture_has_a_point_for_each_measured_step_the_guard_and_the_front(optimized: EfficiencyReport) -> None:
    picture = step_scatter(optimized)
    assert picture is not None
    assert [point.label for point in picture.points] == ["original", "1", "2", "3"]
    assert [point.kind for point in picture.points] == ["original", "point", "kept", "kept"]
    assert picture.guard == pytest.approx(0.93)
    assert picture.front == ((2.0, 0.95), (4.0, 0.94))
    assert picture.points[2].text.startswith("prune <50%>: 1.60x")
    assert step_scatter(optimized.model_copy(update={"steps": STEPS[:1]})) is None


def test_the_picture_gives_latencies_where_the_speed_was_decided(optimized: EfficiencyReport) -> None:
    assert optimized.before is not None
    assert optimized.gains is not None
    (scatter,) = drawings_of(optimized, "scatter")
    assert scatter["original_ms"] == pytest.approx(optimized.before.latency_ms_p50, rel=1e-5)
    undecided = optimized.gains.model_copy(update={"speedup": None, "launches": 5})
    (scatter,) = drawings_of(optimized.model_copy(update={"gains": undecided}), "scatter")
    assert "original_ms" not in scatter


def test_expected_and_measured_speedups_stand_beside_each_other(optimized: EfficiencyReport) -> None:
    bars = expected_bars(optimized)
    assert bars is not None
    assert [(bar.label, bar.value, bar.expected) for bar in bars.bars] == [
        ("prune <50%>", 1.6, 4.0),
        ("quantize after", 4.0, 5.0),
    ]


def test_the_page_shows_the_chain_with_what_was_rolled_back_and_the_median_error(optimized: EfficiencyReport) -> None:
    assert "Steps: speedup against quality" in page_text(optimized)
    assert "median error of the expected speedups: 88%" in page_text(optimized)
    (chain,) = drawings_of(optimized, "chain")
    assert [(link["status"], link.get("kept", False)) for link in chain["links"]] == [
        ("rolled back", False), ("kept", True), ("kept", True), ("failed", False)
    ]  # fmt: skip


def test_a_plan_has_minutes_and_no_picture(optimized: EfficiencyReport) -> None:
    planned = [Step(name="quantize", verb="quantize", status="planned", expected_seconds=90)]
    section = steps_section(optimized.model_copy(update={"steps": planned}), full=True)
    assert section is not None
    (table,) = section.blocks
    assert [column.name for column in table.columns] == ["step", "status", "expected time"]  # type: ignore[union-attr]
