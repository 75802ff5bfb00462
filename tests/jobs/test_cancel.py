from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from omgoptim.errors import RunError
from omgoptim.jobs.actions import cancel
from omgoptim.jobs.folder import RunFolder, new_run
from omgoptim.jobs.states import load_report, read_state
from omgoptim.jobs.storage import now
from omgoptim.reports import RunState

Launch = Callable[..., RunFolder]
Ended = Callable[[RunFolder], RunState]
InStage = Callable[[RunFolder, str], RunState]
Exists = Callable[[int], bool]

PERSISTENT = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True); signal.pause()"


def test_cancel_ends_children_grandchildren_and_those_that_left_the_group_or_ignore_it(
    start: Launch, in_stage: InStage, exists: Exists
) -> None:
    folder = start(
        "grandparent = 'import subprocess, sys, signal; '\n"
        'grandparent += \'print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid, \'\n'
        "grandparent += 'flush=True); signal.pause()'\n"
        "parent = child(code=grandparent, stdout=subprocess.PIPE)\n"
        f"stubborn = child(code={PERSISTENT!r}, stdout=subprocess.PIPE)\n"
        "stubborn.stdout.readline()\n"
        "detached = child(start_new_session=True)\n"
        "grandchild = int(parent.stdout.readline())\n"
        "hold(context, f'family {parent.pid} {grandchild} {stubborn.pid} {detached.pid}')"
    )
    family = [int(pid) for pid in in_stage(folder, "family").stage.split()[1:]]
    assert [exists(pid) for pid in family] == [True] * 4
    state = cancel(folder, grace_s=0.5)
    assert state.status == "cancelled"
    assert [exists(pid) for pid in [state.pid or 0, *family]] == [False] * 5
    assert read_state(folder) == state


def test_cancel_ends_a_worker_that_catches_everything(start: Launch, in_stage: InStage, exists: Exists) -> None:
    folder = start(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(context.work / 'x').touch()\n"
        "(context.folder / 'artifact.partial').mkdir()\nhold(context)"
    )
    worker = in_stage(folder, "holding").pid
    state = cancel(folder, grace_s=0.2)
    assert state.status == "cancelled"
    assert worker is not None
    assert not exists(worker)
    assert not folder.work.exists()
    assert not list(folder.path.glob("artifact*"))
    with pytest.raises(RunError, match="was cancelled"):
        load_report(folder)


def test_a_queued_run_can_be_cancelled_and_the_one_before_it_goes_on(start: Launch, in_stage: InStage) -> None:
    first = start("with context.measuring():\n    hold(context)")
    in_stage(first, "holding")
    second = start("with context.measuring():\n    return report(context)")
    in_stage(second, "waiting for cpu")
    assert cancel(second).status == "cancelled"
    assert read_state(first).status == "running"


def test_a_run_that_has_ended_is_returned_as_it_is(start: Launch, ended: Ended) -> None:
    folder = start("return report(context)")
    state = ended(folder)
    assert cancel(folder) == state


def test_a_run_whose_worker_was_not_started_yet_can_be_cancelled(project: Path) -> None:
    folder = new_run(project, "profile")
    time = now()
    folder.write_state(
        RunState(
            run_id=folder.id, verb="profile", status="starting", started=time, updated=time, folder=str(folder.path)
        )
    )
    assert cancel(folder).status == "cancelled"
    assert read_state(folder).status == "cancelled"
