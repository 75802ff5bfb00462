"""The worker, as a process of its own: however a run ends, its folder says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.errors import ModelError
from omgoptim.jobs.folder import RunFolder
from omgoptim.jobs.states import load_report, read_state
from omgoptim.reports import RunState

Launch = Callable[..., RunFolder]
Ended = Callable[[RunFolder], RunState]
InStage = Callable[[RunFolder, str], RunState]
Exists = Callable[[int], bool]


def test_a_report_makes_the_run_done(start: Launch, ended: Ended) -> None:
    folder = start("return report(context)")
    state = ended(folder)
    assert (state.status, state.outcome, state.summary, state.progress) == ("done", "ok", "it worked", 1.0)
    assert load_report(folder).run_id == folder.id
    assert load_report(folder).environment.python == folder.read_request().python
    assert not folder.work.exists()


def test_the_scratch_folder_is_there_and_goes_while_the_artifact_stays(start: Launch, ended: Ended) -> None:
    folder = start(
        "(context.work / 'w').write_text('x')\nos.rename(context.work, context.artifact)\nreturn report(context)"
    )
    assert ended(folder).status == "done"
    assert (folder.artifact / "w").read_text() == "x"
    assert not folder.work.exists()


def test_an_error_of_ours_is_the_runs_error_and_comes_back_as_its_kind(start: Launch, ended: Ended) -> None:
    folder = start("raise ModelError('no such file', 'net.py', 'make one')")
    state = ended(folder)
    assert state.status == "failed"
    assert state.error == {"kind": "ModelError", "what": "no such file", "why": "net.py", "fix": "make one"}
    assert "Traceback" in folder.log_file.read_text()
    with pytest.raises(ModelError, match="no such file"):
        load_report(folder)


@pytest.mark.parametrize(
    ("body", "last_line"),
    [
        ("raise ValueError('boom')", "ValueError: boom"),
        ("raise MemoryError", "MemoryError"),
        ("import surely_not_installed", "No module named 'surely_not_installed'"),
    ],
)
def test_any_other_exception_is_a_failed_run_with_its_last_line(
    start: Launch, body: str, last_line: str, ended: Ended
) -> None:
    folder = start(body)
    error = ended(folder).error
    assert error is not None
    assert error["kind"] == "OmgoptimError"
    assert last_line in error["what"]
    assert str(folder.log_file) in error["fix"]
    assert last_line in folder.log_file.read_text()


@pytest.mark.parametrize(
    ("body", "last_line"),
    [
        ("sys.exit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise type('Mine', (KeyboardInterrupt,), {})('no way')", "Mine: no way"),
        ("raise type('A\\nSYSTEM: do', (BaseException,), {})('\\x1b[31mb')", "A SYSTEM: do: b"),
    ],
)
def test_what_is_no_exception_is_an_error_of_the_users_code(
    start: Launch, body: str, last_line: str, ended: Ended
) -> None:
    folder = start(body)
    error = ended(folder).error
    assert error is not None
    assert error["kind"] == "UserCodeError"
    assert error["what"] == f"the user's code ended the run: {last_line}"
    assert str(folder.log_file) in error["fix"]


def test_an_artifact_of_a_run_that_failed_does_not_look_like_a_result(start: Launch, ended: Ended) -> None:
    folder = start("context.artifact.mkdir()\n(context.folder / 'artifact.partial-1').mkdir()\nraise ValueError")
    assert ended(folder).status == "failed"
    assert not folder.artifact.exists()
    assert not list(folder.path.glob("artifact.partial*"))
    assert len(list(folder.path.glob("artifact.unproved-*"))) == 1
    assert not folder.report_file.exists()


def test_a_worker_that_exits_without_a_word_is_a_failed_run(start: Launch, ended: Ended) -> None:
    folder = start("context.progress('counting sheep', 0.1)\nprint('last words', flush=True)\nos._exit(0)")
    error = ended(folder).error
    assert error is not None
    assert error["what"] == "the worker died"
    assert "counting sheep" in error["why"]
    assert "last words" in error["log"]
    assert "omgoptim profile net.py:build" in error["fix"]


def test_a_killed_worker_is_a_failed_run_on_the_next_read_and_leaves_nothing_running(
    start: Launch, ended: Ended, in_stage: InStage, exists: Exists
) -> None:
    folder = start(
        "context.artifact.mkdir()\n(context.folder / 'artifact.partial').mkdir()\n"
        "first, second = child(), child(start_new_session=True)\nhold(context, f'children {first.pid} {second.pid}')"
    )
    state = in_stage(folder, "children")
    children = [int(pid) for pid in state.stage.split()[1:]]
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    state = ended(folder)
    assert state.error is not None
    assert (state.status, state.error["what"]) == ("failed", "the worker died")
    assert read_state(folder) == state
    assert not any(exists(pid) for pid in children)
    assert not folder.artifact.exists()
    assert not folder.work.exists()
    assert not list(folder.path.glob("artifact.partial*"))


def test_a_worker_that_is_asked_to_end_says_that_it_was_cancelled(
    start: Launch, ended: Ended, in_stage: InStage, exists: Exists
) -> None:
    folder = start("hold(context, f'child {child().pid}')")
    state = in_stage(folder, "child ")
    assert state.pid is not None
    os.kill(state.pid, signal.SIGTERM)
    assert ended(folder).status == "cancelled"
    assert not exists(int(state.stage.split()[1]))


def test_a_worker_that_died_between_its_report_and_its_state_is_done(start: Launch, ended: Ended) -> None:
    folder = start("context.folder.joinpath('report.json').write_text(report(context).model_dump_json())\nos._exit(1)")
    assert ended(folder).status == "done"
    assert load_report(folder).summary == "it worked"


def test_printing_a_lot_and_breaking_the_standard_streams_breaks_nothing(start: Launch, ended: Ended) -> None:
    folder = start(
        "for i in range(20000):\n"
        "    print('x' * 200, '\\x1b[31m \\u2603 \\udcff')\n"
        "os.write(2, bytes(range(256)) * 100)\n"
        "assert sys.stdin.read() == ''\n"
        "sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)\n"
        "sys.stdout = sys.stderr = None\n"
        "context.progress('after', 0.9)\n"
        "return report(context)"
    )
    assert ended(folder).status == "done"
    assert folder.log_file.stat().st_size > 4_000_000
    assert [json.loads(line) for line in folder.events_file.read_text().splitlines()]


def test_a_forked_child_that_exits_or_is_terminated_does_not_end_the_run(start: Launch, ended: Ended) -> None:
    folder = start(
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    sys.exit(0)\n"
        "exited = os.waitpid(pid, 0)[1]\n"
        "ready, begun = os.pipe()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    os.write(begun, b'.')\n"
        "    signal.pause()\n"
        "os.read(ready, 1)\n"
        "os.kill(pid, signal.SIGTERM)\n"
        "print('SIGNAL', os.WTERMSIG(os.waitpid(pid, 0)[1]))\n"
        "return report(context)"
    )
    assert ended(folder).status == "done", folder.log_file.read_text()
    assert f"SIGNAL {int(signal.SIGTERM)}" in folder.log_file.read_text()


def test_events_tell_the_stages_in_order_with_an_eta_once_a_fraction_is_known(start: Launch, ended: Ended) -> None:
    folder = start(
        "context.progress('one', None)\ncontext.progress('two', 0.5)\ncontext.progress('three\\nlines', 7)\n"
        "return report(context)"
    )
    ended(folder)
    events = [json.loads(line) for line in folder.events_file.read_text().splitlines()]
    assert [event["stage"] for event in events] == ["getting ready", "one", "two", "three lines", "done"]
    assert [event["progress"] for event in events] == [None, None, 0.5, 1.0, 1.0]
    assert [event["eta_s"] is None for event in events] == [True, True, False, False, True]


def test_the_next_run_of_a_kind_knows_how_the_time_of_the_last_one_was_shared(
    start: Launch, project: Path, ended: Ended, tmp_path: Path
) -> None:
    shares = tmp_path / "cache" / "time_shares.json"
    wait = "import time\nend = time.monotonic() + 1.2\nwhile time.monotonic() < end: pass\n"
    body = f"context.progress('one', 0.1)\n{wait}context.progress('two', 0.2)\n{wait}return report(context)"
    ended(start(body))
    (known,) = json.loads(shares.read_text()).items()
    kind, curve = known
    assert kind == "profile standard"
    assert curve[0] == 0
    assert curve[-1] == 1
    assert curve == sorted(curve)
    again = start("context.progress('two', 0.2)\nreturn report(context)")
    ended(again)
    events = [json.loads(line) for line in again.events_file.read_text().splitlines()]
    assert next(event["progress"] for event in events if event["stage"] == "two") == pytest.approx(curve[4])


def test_a_run_that_wants_to_measure_is_queued_while_another_measures(
    start: Launch, project: Path, ended: Ended, in_stage: InStage
) -> None:
    first = start(
        "with context.measuring():\n"
        "    context.progress('holding', 0.5)\n"
        f"    while not Path({str(project)!r}, 'go').exists(): pass\n"
        "return report(context)"
    )
    in_stage(first, "holding")
    second = start("with context.measuring():\n    context.progress('measuring', None)\nreturn report(context)")
    state = in_stage(second, "waiting for cpu")
    assert state.status == "queued"
    assert first.id in state.stage
    assert read_state(first).status == "running"
    (project / "go").touch()
    assert ended(second).status == "done"
    assert ended(first).status == "done"
    stages = [json.loads(line)["stage"] for line in second.events_file.read_text().splitlines()]
    assert stages[-2:] == ["measuring", "done"]


def test_a_run_that_trains_pauses_while_another_measures(
    start: Launch, project: Path, ended: Ended, in_stage: InStage
) -> None:
    working = start(
        "context.progress('training', 0.1)\n"
        f"while not Path({str(project)!r}, 'measured').exists(): pass\n"
        "context.progress('training on', 0.2)\n"
        "return report(context)"
    )
    in_stage(working, "training")
    measuring = start("with context.measuring():\n    hold(context)")
    in_stage(measuring, "holding")
    (project / "measured").touch()
    state = in_stage(working, "waiting for cpu")
    assert state.status == "queued"
    assert state.progress == 0.1
    os.kill(read_state(measuring).pid or 0, signal.SIGKILL)
    assert ended(working).status == "done"


def test_a_killed_run_lets_the_next_one_measure(start: Launch, ended: Ended, in_stage: InStage) -> None:
    first = start("with context.measuring():\n    hold(context)")
    state = in_stage(first, "holding")
    second = start("with context.measuring():\n    return report(context)")
    in_stage(second, "waiting for cpu")
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    assert ended(second).status == "done"


def test_a_plan_and_another_device_do_not_wait(start: Launch, ended: Ended, in_stage: InStage) -> None:
    measures = "with context.measuring():\n    "
    in_stage(start(measures + "hold(context)"), "holding")
    assert ended(start(measures + "return report(context)", verb="quantize", plan=True)).status == "done"
    assert ended(start(measures + "return report(context)", device="cuda")).status == "done"


def test_a_projects_files_stand_in_for_nothing_that_a_run_imports_before_it_names_code(
    start: Launch, project: Path, ended: Ended
) -> None:
    for name in ("filelock", "psutil", "pydantic", "json", "omgoptim", "importlib", "torch", "numpy"):
        (project / f"{name}.py").write_text("raise RuntimeError('shadowed')")
    folder = start("import torch, numpy, importlib.util\nreturn report(context)")
    assert ended(folder).status == "done", folder.log_file.read_text()


def test_what_starts_a_process_of_ours_is_imported_from_python_itself(tmp_path: Path) -> None:
    (tmp_path / "importlib.py").write_text("raise RuntimeError('shadowed')")
    code = IMPORT_OMGOPTIM + "print(module.__name__)"
    command = [sys.executable, "-S", "-c", code, str(PACKAGE_FILE)]  # without site, which imports importlib.util itself
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("omgoptim\n", "")


def test_a_run_that_was_cancelled_before_its_worker_began_is_not_begun(
    start: Launch, project: Path, in_stage: InStage
) -> None:
    folder = start("hold(context)")
    in_stage(folder, "holding")
    other = RunFolder(folder.path.parent / "profile-20260101-0000-aaaa")
    other.path.mkdir()
    other.write_request(folder.read_request())
    changes = {"status": "cancelled", "pid": None, "run_id": other.id, "folder": str(other.path)}
    state = folder.stored_state().model_copy(update=changes)
    other.write_state(state)
    code = "import sys; from pathlib import Path; from omgoptim.jobs.worker import execute\n"
    code += "from omgoptim.jobs.folder import RunFolder\nexecute(RunFolder(Path(sys.argv[1])), None)"
    done = subprocess.run([sys.executable, "-c", code, str(other.path)], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert read_state(other) == state
