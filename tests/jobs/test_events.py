"""Tests of a run's history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omgoptim.jobs.events import EPOCH, MOST_STAGES, RunHistory
from omgoptim.jobs.folder import RunFolder
from omgoptim.training._loop.progress import ProgressReporter


def event(stage: str, second: float) -> str:
    time = f"2026-11-29T10:{int(second) // 60:02d}:{second % 60:06.3f}+00:00"
    return json.dumps({"t": time, "status": "running", "stage": stage, "progress": 0.1, "eta_s": None}) + "\n"


def test_stages_have_their_times_and_a_detail_after_a_colon_is_no_stage(tmp_path: Path) -> None:
    events = [event("loading", 0), event("timing: 1 of 5", 2), event("timing: 2 of 5", 5), event("saving", 9.5)]
    (tmp_path / "events.jsonl").write_text("".join(events))
    stages = RunHistory(RunFolder(tmp_path)).read().stages
    assert [(stage.name, stage.ended - stage.began) for stage in stages] == [
        ("loading", 2.0),
        ("timing", 7.5),
        ("saving", 0.0),
    ]


def test_what_is_written_later_is_read_by_the_next_call_and_a_torn_line_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    history = RunHistory(RunFolder(tmp_path))
    assert history.read().stages == []
    whole, torn = event("loading", 0), event("saving", 3)
    file.write_text(whole + torn[:20])
    assert [stage.name for stage in history.read().stages] == ["loading"]
    file.write_text(whole + torn)
    assert [stage.name for stage in history.read().stages] == ["loading", "saving"]
    assert history.read().stages[0].ended == history.stages[1].began


def test_the_loss_of_each_epoch_is_read_from_the_stage_that_a_training_reports(tmp_path: Path) -> None:
    told: list[str] = []
    report = ProgressReporter(lambda stage, _: told.append(stage), epochs=3, epoch=1, count=2)
    report(2, 0.0123)
    assert EPOCH.search(told[0])
    lines = [told[0], "training: epoch 2 of 3, loss 2.5e-05, eta 3 s", "training: epoch 2 of 3, loss 0.5, eta 0 s"]
    (tmp_path / "events.jsonl").write_text("".join(event(line, place) for place, line in enumerate(lines)))
    history = RunHistory(RunFolder(tmp_path)).read()
    assert history.losses == [0.0123, 0.5]
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(event("training: epoch 1 of 3, loss 7, eta 3 s", 9))
    assert history.read().losses == [7.0]


@pytest.mark.parametrize("line", ["", "{", "[]", "[" * 100_000, '{"t": "never", "stage": "x"}', '{"t": 3}', "\x00\xff"])
def test_a_line_that_is_no_event_is_passed_over(line: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(f"{line}\n{event('loading', 0)}")
    assert [stage.name for stage in RunHistory(RunFolder(tmp_path)).read().stages] == ["loading"]


def test_a_run_of_many_stages_keeps_the_last(tmp_path: Path) -> None:
    lines: Any = (event(f"stage {number}", number / 10) for number in range(MOST_STAGES + 20))
    (tmp_path / "events.jsonl").write_text("".join(lines))
    stages = RunHistory(RunFolder(tmp_path)).read().stages
    assert len(stages) == MOST_STAGES
    assert stages[-1].name == f"stage {MOST_STAGES + 19}"
