"""Tests of a full disk: reported as such, with a correct final state."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from omgoptim.errors import ModelError, SetupError
from omgoptim.jobs import states, storage
from omgoptim.jobs.folder import RunFolder, new_run
from omgoptim.jobs.interpreter import Interpreter
from omgoptim.jobs.states import read_state
from omgoptim.jobs.storage import full_disk, now
from omgoptim.jobs.submit import open_run
from omgoptim.reports import RunState
from omgoptim.requests import parse

Launch = Callable[..., RunFolder]
Ended = Callable[[RunFolder], RunState]

FILLED = """\
import resource
(context.work / 'half').write_bytes(bytes(300_000))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
(context.work / 'weights').write_bytes(bytes(1_000_000))
"""


@pytest.mark.skipif(os.name != "posix", reason="a limit of the process stands in for the disk's")
def test_a_run_that_may_write_no_more_says_so_and_leaves_a_true_state_and_no_scratch(
    start: Launch, ended: Ended
) -> None:
    folder = start(FILLED)
    state = ended(folder)
    assert state.error is not None
    assert state.error["kind"] == "SetupError"
    assert "the file size limit is reached in" in state.error["what"]
    assert "limit of this process" in state.error["why"]
    assert "the run has written 0.6 MB so far" in state.error["why"]
    assert f"omgoptim runs resume {folder.id}" in state.error["fix"]
    assert not folder.work.exists()
    assert not (folder.path / ".reserve.tmp").exists()


def test_a_full_disk_is_known_by_its_number_wherever_in_the_chain_it_stands(project: Path) -> None:
    run = new_run(project, "profile").path
    (run / "weights").write_bytes(bytes(2_000_000))
    inner = OSError(errno.ENOSPC, "No space left on device", str(run / "weights"))
    try:
        try:
            raise inner
        except OSError as error:
            raise ModelError("the weights cannot be written") from error
    except ModelError as error:
        failure = full_disk(run, error)
    assert failure is not None
    assert failure.what == f"no space left in {run}"
    assert "the disk is full" in failure.why
    assert "2.0 MB so far" in failure.why
    quota = full_disk(run, OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert quota is not None
    assert "quota" in quota.why


@pytest.mark.parametrize(
    "words",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    ],
)
def test_the_number_that_a_library_in_rust_writes_out_is_read(words: str, project: Path) -> None:
    assert full_disk(project, RuntimeError(words)) is not None


def test_other_failures_are_not_blamed_on_the_disk(project: Path) -> None:
    for error in (
        ValueError("boom"),
        OSError(errno.ENOENT, "no such file"),
        RuntimeError("(os error 2)"),
        SystemExit(28),
    ):
        assert full_disk(project, error) is None


def test_a_library_that_gives_no_number_is_believed_where_nothing_is_left(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 0)
    assert full_disk(project, RuntimeError("PytorchStreamWriter failed writing file")) is not None
    assert full_disk(project, ModelError("no such layer")) is None
    assert full_disk(project, KeyboardInterrupt()) is None


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_project_that_takes_no_run_is_refused_and_nothing_is_left(
    number: int, project: Path, this_python: Interpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(RunFolder, "write_state", refuse)
    with pytest.raises(SetupError) as refused:
        open_run("profile", parse("profile", {"model": "m"}), project, this_python)
    assert refused.value.what == f"cannot write in {project / '.omgoptim' / 'runs'}"
    assert {**storage.FULL, **storage.CLOSED}[number] in refused.value.why
    assert list((project / ".omgoptim" / "runs").iterdir()) == []


def test_a_file_where_the_runs_should_be_is_a_clear_refusal(project: Path, this_python: Interpreter) -> None:
    (project / ".omgoptim").write_text("not a folder")
    with pytest.raises(SetupError, match="cannot write in"):
        open_run("profile", parse("profile", {"model": "m"}), project, this_python)


def test_a_dead_run_is_told_as_dead_where_that_cannot_be_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_run(project, "profile")
    state = RunState(run_id=folder.id, verb="profile", status="running", started=now(), updated=now(), folder="f")
    folder.write_state(state.model_copy(update={"started": "2026-01-01T00:00:00.000+00:00"}))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(states, "FileLock", refuse)
    assert read_state(folder).status == "failed"
    monkeypatch.undo()
    monkeypatch.setattr(RunFolder, "write_state", refuse)
    assert read_state(folder).status == "failed"
    assert folder.stored_state().status == "running"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_that_is_really_full_is_named(tmp_path: Path, this_python: Interpreter) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            (disk / "fill").write_bytes(bytes(2_000_000))
        with pytest.raises(SetupError) as refused:
            open_run("profile", parse("profile", {"model": "m"}), disk, this_python)
        assert "the disk is full; 0.0 MB are free" in refused.value.why
    finally:
        os.system(f"umount {disk}")
