"""Tests of the structured answer in its short and its full form."""

from __future__ import annotations

import json
from pathlib import Path

from omgoptim.render import brief
from omgoptim.render.markdown import MAX_BRIEF, MAX_FULL
from omgoptim.reports import EfficiencyReport, Skip


def test_the_verdict_comes_first_and_the_evidence_after_it(quantized: EfficiencyReport) -> None:
    answer = brief.brief_report(quantized, Path("/p/run"))
    assert list(answer)[:7] == ["outcome", "summary", "warnings", "next_steps", "verdict", "verb", "run_id"]
    assert answer["gains"]["speedup"] == 5.79
    assert answer["artifact"]["path"] == quantized.artifact.path if quantized.artifact else False
    assert answer["files"]["report"] == "/p/run/report.json"


def test_what_was_not_measured_is_left_out_of_the_short_form(planned: EfficiencyReport) -> None:
    answer = brief.brief_report(planned)
    assert {"before", "after", "gains", "artifact"}.isdisjoint(answer)
    assert answer["warnings"] == []


def test_the_full_form_is_the_report_itself(quantized: EfficiencyReport) -> None:
    assert brief.full_report(quantized) == json.loads(quantized.model_dump_json())


def test_a_giant_report_has_its_lists_cut_and_says_so(quantized: EfficiencyReport) -> None:
    skipped = [Skip(path=f"layer.{i}", reason="too small to be worth it") for i in range(5000)]
    answer = brief.full_report(quantized.model_copy(update={"skipped": skipped}))
    assert len(json.dumps(answer)) <= MAX_FULL
    assert len(answer["skipped"]) == 100
    assert answer["cut"] == {"total": {"skipped": 5000}, "rest": "in report.json"}


def test_the_full_form_of_a_hostile_report_falls_back_to_the_short_one(hostile: EfficiencyReport) -> None:
    assert brief.full_report(hostile) == brief.brief_report(hostile)


def test_the_short_form_of_a_hostile_report_is_bounded_and_has_no_control_characters(hostile: EfficiencyReport) -> None:
    text = json.dumps(brief.brief_report(hostile), ensure_ascii=False)
    assert len(text) <= MAX_BRIEF
    assert not any(char in text for char in ("\x1b", "\u202e", "\u200b", "\\u001b"))


def test_the_short_form_has_the_rounds_one_line_on_training_and_the_ends_of_the_sensitivity(
    pruned: EfficiencyReport,
) -> None:
    answer = brief.brief_report(pruned)
    assert [one["number"] for one in answer["rounds"]] == [1, 2, 3]
    assert answer["rounds"][2]["kept"] is True
    assert answer["training"].startswith("6 epochs in 3 rounds; adamw, cross-entropy")
    assert answer["sensitivity"][0] == {"path": "0", "largest_drop": 0.1212, "at": 0.9, "within_guard_up_to": 0.5}
    assert len(answer["sensitivity"]) == 10
    assert len(json.dumps(answer)) <= MAX_BRIEF


def test_long_training_is_cut_to_its_last_epochs_in_the_full_form(pruned: EfficiencyReport) -> None:
    assert pruned.training
    epochs = [epoch for _ in range(200) for epoch in pruned.training.epochs]
    training = pruned.training.model_copy(update={"epochs": epochs})
    answer = brief.full_report(pruned.model_copy(update={"training": training}))
    assert len(json.dumps(answer)) <= MAX_FULL
    assert answer["training"]["epochs_in_all"] == 1200
    assert len(answer["training"]["epochs"]) == 20
    assert len(answer["sensitivity"]) == len(pruned.sensitivity)


def test_the_short_form_has_the_control_in_numbers_and_words_and_no_epochs(distilled: EfficiencyReport) -> None:
    answer = brief.brief_report(distilled)
    control = answer["control"]
    assert (control["quality"], control["gain"], control["gain_low"], control["kept"]) == (0.954, 0.0127, 0.004, False)
    assert control["summary"].startswith("the same student, trained as long without the teacher, reaches 0.9540")
    assert "training" not in control
    assert len(answer["quality_by_epoch"]) == 2
    assert [one["status"] for one in answer["candidates"]] == ["chosen", "dropped", "dropped", "skipped"]
    assert len(json.dumps(answer)) <= MAX_BRIEF


def test_a_report_without_a_control_has_no_key_for_it(pruned: EfficiencyReport, distilled: EfficiencyReport) -> None:
    assert {"control", "quality_by_epoch"}.isdisjoint(brief.brief_report(pruned))
    assert "control" not in brief.brief_report(distilled.model_copy(update={"control": None}))


def test_a_long_control_is_cut_to_its_last_epochs_in_the_full_form(distilled: EfficiencyReport) -> None:
    assert distilled.control
    assert distilled.control.training
    epochs = distilled.control.training.epochs * 100
    training = distilled.control.training.model_copy(update={"epochs": epochs})
    control = distilled.control.model_copy(update={"training": training})
    answer = brief.full_report(distilled.model_copy(update={"control": control}))
    assert len(json.dumps(answer)) <= MAX_FULL
    assert answer["control"]["training"]["epochs_in_all"] == 1000
    assert len(answer["control"]["training"]["epochs"]) == 20
    assert answer["control"]["gain"] == 0.0127
