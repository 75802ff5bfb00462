"""Tests of what a person sees in a terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from omgoptim.errors import DataError
from omgoptim.render import terminal
from omgoptim.reports import DoctorReport, EfficiencyReport, PackageState, RunState, Skip


def shown(view: RenderableType, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view, crop=False)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_the_verdict_is_the_first_thing_and_the_places_the_last(quantized: EfficiencyReport) -> None:
    lines = shown(terminal.report_view(quantized, folder=Path("/p/run"))).splitlines()
    assert "OK" in lines[0]
    assert "5.79x faster" in lines[1]
    assert lines[-1].startswith("repeat") or lines[-2].startswith("repeat")
    assert any("/p/run/report.html" in line for line in lines)


def test_the_table_has_before_after_and_gain(quantized: EfficiencyReport) -> None:
    text = shown(terminal.report_view(quantized))
    row = next(line for line in text.splitlines() if line.strip().startswith("latency p50"))
    assert row.split() == ["latency", "p50", "0.412", "ms", "0.0712", "ms", "5.79x", "faster", "(5.41", "to", "6.18)"]


def test_a_profile_shows_one_column_and_its_costliest_layers(profiled: EfficiencyReport) -> None:
    text = shown(terminal.report_view(profiled))
    assert "gain" not in text
    assert "features.3" in text


def test_a_plan_shows_what_would_be_tried_and_no_empty_columns(planned: EfficiencyReport) -> None:
    text = shown(terminal.report_view(planned))
    assert "PLAN" in text
    assert "planned" in text
    assert "speedup" not in text
    assert "would change" in text


def test_a_pruning_shows_rounds_training_and_sensitivity(pruned: EfficiencyReport) -> None:
    text = shown(terminal.report_view(pruned), width=140)
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["3", "90%"])
    assert row[2:8] == ["0.2121", "0.9529", "0.9832", "0.0067", "23", "k"]
    assert "✓" in row
    assert "training  6 epochs in 3 rounds" in text
    assert "0                ▁▂█     0.1212   90%                      50%" in text
    assert "faster" not in text


def test_of_many_rounds_the_last_and_the_kept_one_are_shown(pruned: EfficiencyReport) -> None:
    rounds = [pruned.rounds[0].model_copy(update={"number": n, "kept": n == 2}) for n in range(1, 31)]
    many = pruned.model_copy(update={"rounds": rounds})
    text = shown(terminal.report_view(many))
    assert "and 22 more: --detail full" in text
    numbers = [line.split()[0] for line in text.splitlines() if "a step on the way" in line]
    assert numbers == ["2", "24", "25", "26", "27", "28", "29", "30"]
    assert shown(terminal.report_view(many, full=True)).count("a step on the way") == 30


def test_the_short_form_is_short_and_the_full_one_names_every_layer(hostile: EfficiencyReport) -> None:
    assert len(shown(terminal.report_view(hostile)).splitlines()) < 360
    many = hostile.model_copy(update={"skipped": [Skip(path=f"layer.{i}", reason="r") for i in range(40)]})
    assert "layer.39" not in shown(terminal.report_view(many))
    assert "layer.39" in shown(terminal.report_view(many, full=True))


def test_text_of_a_model_is_read_neither_as_markup_nor_as_terminal_codes(hostile: EfficiencyReport) -> None:
    text = shown(terminal.report_view(hostile, full=True))
    assert "\x1b" not in text
    assert "[bold]" in text.replace("\n", "")


def test_an_error_is_told_as_what_why_and_fix_without_control_characters() -> None:
    text = shown(terminal.error_view(DataError("no \x1b[2Jdata", "[red]empty[/red]", "give some")))
    assert text == "error: no data\n  why: [red]empty[/red]\n  fix: give some\n"


@pytest.mark.parametrize("status", ["running", "failed", "cancelled"])
def test_a_run_without_a_report_says_how_it_stands(status: str) -> None:
    record = {"run_id": "run-1", "verb": "profile", "status": status, "started": "2026-11-24T10:53", "updated": "t"}
    error = {"kind": "RunError", "what": "the worker died", "why": "", "fix": ""} if status == "failed" else None
    state = RunState.model_validate(record | {"folder": "/p", "stage": "measuring", "error": error})
    text = shown(terminal.state_view(state))
    assert status in text
    assert ("measuring" in text) == (status == "running")
    assert ("the worker died" in text) == (status == "failed")
    assert "run-1" in shown(terminal.runs_view([state]))


def test_doctor_prints_each_install_command_once_and_whole_and_the_entry_for_a_client() -> None:
    fix = f"'/{'deep/' * 30}bin/python' -m pip install torch"
    entry = {
        "mcpServers": {"omgoptim": {"command": "/bin/omgoptim-mcp", "args": [], "env": {"OMGOPTIM_PROJECT": "/p"}}}
    }
    torch = PackageState(name="torch_eager", state="missing", version=None, unlocks="any module", fix=fix)
    report = DoctorReport(
        outcome="incomplete", summary="Runs cannot start.", python="/p/python", python_found_by="a test",
        python_version="3.12.1", cpu="a cpu", cpu_features=[], cores=2, gpu=None, project="/p", mcp_entry=entry,
        runtimes=[torch, torch.model_copy(update={"name": "torch_compile"})], extras=[],
    )  # fmt: skip
    text = shown(terminal.doctor_view(report), width=60)
    assert text.count(fix) == 1
    assert json.loads(text[text.index("{") :]) == entry


def test_a_distillation_shows_teacher_and_student_its_control_and_both_curves(distilled: EfficiencyReport) -> None:
    lines = shown(terminal.report_view(distilled), width=200).splitlines()
    assert any(line.split() == ["teacher", "student"] for line in lines)
    assert any(line.startswith(" without the teacher") and "distillation gained 0.0127" in line for line in lines)
    text = "\n".join(lines)
    assert "the teacher's outputs computed once for 3,000 samples and kept (120 kB)" in text
    assert "control   the same student, trained as long without the teacher, reaches 0.9540" in text
    assert "▂▆▇▇▇█████ 0.8120 -> 0.9667 with the teacher, best in the last epoch" in text
    assert "narrow, width 0.172" in text
    assert "after 1 epoch the others were better on the selection samples" in " ".join(text.split())


def test_without_a_control_and_a_teacher_nothing_of_it_is_shown(
    distilled: EfficiencyReport, pruned: EfficiencyReport
) -> None:
    summary = distilled.summary.partition("Without")[0]
    alone = shown(terminal.report_view(distilled.model_copy(update={"control": None, "summary": summary})))
    for view in (alone, shown(terminal.report_view(pruned))):
        assert "control   the same" not in view
        assert "without the teacher" not in view
    assert "by epoch" not in shown(terminal.report_view(pruned))
