"""Tests of what an agent reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from omgoptim.errors import ModelError
from omgoptim.render import markdown
from omgoptim.reports import EfficiencyReport, Round, RunState


def test_the_text_alone_holds_everything_that_is_needed(quantized: EfficiencyReport) -> None:
    text = markdown.report_markdown(quantized, folder=Path("/p/run"))
    assert text.startswith("**OK** ")
    for needed in (
        quantized.summary,
        quantized.warnings[0],
        "5.79x faster (5.41 to 6.18)",
        "3.76x smaller",
        "drop 0.0028 (-0.0041 to 0.0083)",
        quantized.next_steps[0].command,
        '"a": "quantize-20261124-1053-k3f9"',
        "tool `compare`",
        "/artifact",
        quantized.run_id,
        "/p/run/report.json",
        quantized.repeat,
    ):
        assert needed in text


@pytest.mark.parametrize("name", ["quantized", "profiled", "planned", "pruned", "factorized", "distilled", "hostile"])
def test_the_short_form_stays_under_two_thousand_tokens(name: str, request: pytest.FixtureRequest) -> None:
    assert len(markdown.report_markdown(request.getfixturevalue(name))) <= 8_000


def test_the_full_form_has_the_layers_that_changed_and_stays_bounded(
    quantized: EfficiencyReport, hostile: EfficiencyReport
) -> None:
    assert "| `classifier` | weights and activations to int8 |" in markdown.report_markdown(quantized, "full")
    assert len(markdown.report_markdown(hostile, "full")) <= markdown.MAX_FULL


def test_text_of_a_model_can_close_no_code_span_and_hide_nothing(hostile: EfficiencyReport) -> None:
    text = markdown.report_markdown(hostile, "full")
    assert not re.search("[\x00-\x09\x0b-\x1f\u200b\u202e]", text)
    assert all(line.count("`") % 2 == 0 for line in text.splitlines()[:-1])
    assert "\n</title>" not in text


def test_a_plan_and_a_profile_have_no_empty_table(planned: EfficiencyReport, profiled: EfficiencyReport) -> None:
    assert "| |" not in markdown.report_markdown(planned).replace("  ", " ")
    assert markdown.report_markdown(planned).startswith("**PLAN** ")
    assert "| latency p50 | 0.412 ms |" in markdown.report_markdown(profiled)
    assert "| `features.3` | Conv2d | 0.151 ms | 37% |" in markdown.report_markdown(profiled)


def test_rounds_are_a_table_and_training_is_one_line(pruned: EfficiencyReport) -> None:
    text = markdown.report_markdown(pruned)
    assert "| round | amount | compressed | re-estimated | trained | drop | parameters | kept | why |" in text
    assert "| 3 | 90% | 0.2121 | 0.9529 | 0.9832 | 0.0067 | 23 k | ✓ | the goal, within the guard of 0.01 |" in text
    assert "| 1 | 50% | 0.9529 | 0.9899 | 0.9899 | 0.0000 | 111 k |  | a step on the way to 90% |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("Training: ")]
    assert "kept epoch 2 of round 3 (top1_accuracy 0.9832)" in line


def test_a_table_of_rounds_has_no_empty_column(factorized: EfficiencyReport) -> None:
    text = markdown.report_markdown(factorized)
    assert "| round | amount | compressed | trained | drop | parameters | kept | why |" in text


def test_both_sizes_are_told_where_zeros_take_no_bytes(pruned: EfficiencyReport) -> None:
    text = markdown.report_markdown(pruned)
    assert "| size | 891 kB | 127 kB | 7.02x smaller |" in text
    assert "| dense size | 891 kB | 891 kB |  |" in text
    assert "| non-zero parameters | 221 k | 23 k | 89.6% zeros |" in text


def test_the_short_form_has_the_most_and_the_least_sensitive_and_the_full_one_all(pruned: EfficiencyReport) -> None:
    short = markdown.report_markdown(pruned)
    assert "| `0` | ▁▂█ | 0.1212 | 90% | 50% |" in short
    assert "| `5.conv2` | ▁▁▁ |" in short
    assert "`5.shortcut`" not in short
    assert "`5.shortcut`" in markdown.report_markdown(pruned, "full")


def test_a_distillation_is_told_with_its_control_and_both_curves(distilled: EfficiencyReport) -> None:
    text = markdown.report_markdown(distilled)
    assert "|  | teacher: torch_eager float32 | student: torch_eager float32 | gain |" in text
    assert "| without the teacher |  | 0.9540 | distillation gained 0.0127 (95 % interval +0.0040 to +0.0213) |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("Control: ")]
    assert "the distilled one is the artifact" in line
    assert "Quality by epoch, on the selection samples:\n- ▂▆▇▇▇█████ 0.8120 -> 0.9667 with the teacher, best" in text
    assert "| narrow, width 0.172 | chosen | 3.29x | 0.0167 | 5,142 parameters" in text


def test_a_report_without_a_control_or_a_student_says_nothing_of_them(
    distilled: EfficiencyReport, pruned: EfficiencyReport
) -> None:
    alone = markdown.report_markdown(distilled.model_copy(update={"control": None}))
    for text in (alone, markdown.report_markdown(pruned)):
        assert "Control:" not in text
        assert "| without the teacher |" not in text
    assert "Quality by epoch" not in markdown.report_markdown(pruned)
    assert "|  | before: torch_eager float32 | after: torch_eager float32 | gain |" in markdown.report_markdown(pruned)


def test_planned_rounds_have_no_note_on_qualities_and_one_without_a_goal_is_not_shown(
    distilled: EfficiencyReport,
) -> None:
    planned = distilled.model_copy(update={"rounds": [Round(number=1, amount=0.5), Round(number=2, params=5142)]})
    text = markdown.report_markdown(planned)
    assert "Rounds:\n\n| round | amount |\n| --- | --- |\n| 1 | 50% |\n\n" in text


def test_a_failed_run_shows_its_error_and_its_log() -> None:
    error = ModelError("it broke", "because", "do this").to_dict()
    text = markdown.state_markdown(_state("failed").model_copy(update={"error": error}))
    assert "Error: it broke\nWhy: because\nFix: do this" in text
    assert "/p/.omgoptim/runs/r/log.txt" in text


def test_a_running_run_shows_stage_percent_and_time_left() -> None:
    state = _state("running").model_copy(update={"stage": "measuring", "progress": 0.4, "eta_s": 12.0})
    assert markdown.state_markdown(state) == "**RUNNING** run `r` (profile): measuring, 40%, 12 s left"
    queued = markdown.state_markdown(state.model_copy(update={"status": "queued", "stage": "waiting for cpu"}))
    assert queued == "**QUEUED** run `r` (profile): waiting for cpu, 40%, 12 s left after the wait"


def _state(status: str) -> RunState:
    record = {"run_id": "r", "verb": "profile", "status": status, "started": "t", "updated": "t"}
    return RunState.model_validate(record | {"folder": "/p/.omgoptim/runs/r"})


def test_a_code_span_holds_a_command_as_it_is() -> None:
    assert markdown.code("omgoptim profile 'a  b.py:<x>[0](y)'") == "`omgoptim profile 'a  b.py:<x>[0](y)'`"
    assert markdown.code("a`b") == "`a'b`"
    assert markdown.code("") == "` `"
