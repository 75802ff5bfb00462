from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from omgoptim.bootstrap import IMPORT_OMGOPTIM
from omgoptim.errors import RunError
from omgoptim.jobs.actions import cancel, resume
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import load_report, read_state
from omgoptim.reports import RunState

Launch = Callable[..., RunFolder]
Ended = Callable[[RunFolder], RunState]
InStage = Callable[[RunFolder, str], RunState]

CUT_OFF_ONCE = """
begun = context.folder / "checkpoints" / "begun"
if begun.exists():
    (context.folder / "went_on_from").write_text(begun.read_text())
    return report(context)
begun.parent.mkdir()
begun.write_text("epoch 3")
hold(context)
"""


def test_a_killed_run_goes_on_in_its_own_folder_and_its_checkpoints_go_when_it_is_done(
    start: Launch, in_stage: InStage, ended: Ended, program: Callable[[str], str]
) -> None:
    folder = start(CUT_OFF_ONCE)
    os.kill(in_stage(folder, "holding").pid or 0, signal.SIGKILL)
    assert ended(folder).status == "failed"
    with pytest.raises(RunError) as death:
        load_report(folder)
    assert f"omgoptim runs resume {folder.id}" in death.value.fix
    state = resume(folder, IMPORT_OMGOPTIM + program(CUT_OFF_ONCE))
    assert (state.run_id, state.error) == (folder.id, None)
    assert ended(folder).status == "done"
    assert (folder.path / "went_on_from").read_text() == "epoch 3"
    assert load_report(folder).summary == "it worked"
    assert not folder.checkpoints.exists()


def test_a_cancelled_run_keeps_its_checkpoints(start: Launch, in_stage: InStage) -> None:
    folder = start(CUT_OFF_ONCE)
    in_stage(folder, "holding")
    assert cancel(folder, grace_s=0.2).status == "cancelled"
    assert (folder.checkpoints / "begun").is_file()


def test_a_run_without_checkpoints_starts_over(start: Launch, ended: Ended, program: Callable[[str], str]) -> None:
    folder = start("raise ModelError('it broke')")
    assert ended(folder).status == "failed"
    assert resume(folder, IMPORT_OMGOPTIM + program("return report(context)")).stage in (
        "starting over",
        "getting ready",
    )
    assert ended(folder).status == "done"


def test_what_is_done_or_still_runs_is_not_resumed(start: Launch, ended: Ended, in_stage: InStage) -> None:
    done = start("return report(context)")
    ended(done)
    with pytest.raises(RunError, match="is done"):
        resume(done)
    running = start("hold(context)")
    in_stage(running, "holding")
    with pytest.raises(RunError, match="is running already"):
        resume(running)
    assert read_state(running).status == "running"


def test_a_run_whose_request_is_gone_cannot_be_resumed(start: Launch, ended: Ended, tmp_path: Path) -> None:
    folder = start("raise ModelError('it broke')")
    ended(folder)
    folder.request_file.unlink()
    with pytest.raises(RunError, match=r"request\.json"):
        resume(folder)
