from __future__ import annotations

import re
from pathlib import Path

import pytest

from omgoptim.errors import RunError
from omgoptim.jobs.folder import RunFolder, Submission, find_run, new_run, runs_root
from omgoptim.jobs.storage import write_atomically


def test_a_new_run_has_a_folder_of_its_own_that_git_does_not_see(project: Path) -> None:
    folders = [new_run(project, "quantize") for _ in range(20)]
    assert len({folder.id for folder in folders}) == 20
    assert all(re.fullmatch(r"quantize-\d{8}-\d{4}-[a-z2-7]{4}", folder.id) for folder in folders)
    assert (project / ".omgoptim" / ".gitignore").read_text() == "*\n"


def test_a_run_is_found_by_its_id_its_beginning_or_its_end(project: Path) -> None:
    for name in ("quantize-20260101-1200-abcd", "profile-20260101-1200-bbcd", "profile-20260101-1200-bbcd2"):
        (runs_root(project) / name).mkdir(parents=True)
    assert find_run(project, "profile-20260101-1200-bbcd").id == "profile-20260101-1200-bbcd"
    assert find_run(project, "quant").id == "quantize-20260101-1200-abcd"
    assert find_run(project, "abcd").id == "quantize-20260101-1200-abcd"
    with pytest.raises(RunError, match="matches 2 runs"):
        find_run(project, "profile")


@pytest.mark.parametrize("run_id", ["", "../runs", "/etc", "quantize-20260101-1200-abce"])
def test_an_unknown_run_is_an_error_that_tells_the_nearest(project: Path, run_id: str) -> None:
    (runs_root(project) / "quantize-20260101-1200-abcd").mkdir(parents=True)
    with pytest.raises(RunError, match="there is no run") as caught:
        find_run(project, run_id)
    assert "quantize-20260101-1200-abcd" in caught.value.why
    assert "runs list" in caught.value.fix


def test_a_project_without_runs_says_so(project: Path) -> None:
    with pytest.raises(RunError, match="there is no run 'x'") as caught:
        find_run(project, "x")
    assert "has no runs yet" in caught.value.why
    assert list(project.iterdir()) == []


def test_a_request_comes_back_as_it_was_written(project: Path) -> None:
    folder = new_run(project, "profile")
    submission = Submission("profile", {"model": "net.py:build"}, project, "/p/python", "the test", "3.12.1")
    folder.write_request(submission)
    assert folder.read_request() == submission
    folder.request_file.write_text("{}")
    with pytest.raises(RunError, match=r"no readable request\.json"):
        folder.read_request()


def test_a_file_is_replaced_whole_and_no_temporary_one_is_left(tmp_path: Path) -> None:
    for text in ("one", "zwei ☃"):
        write_atomically(tmp_path / "file", text)
        assert (tmp_path / "file").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_discarding_scratch_keeps_what_was_finished(project: Path) -> None:
    folder: RunFolder = new_run(project, "profile")
    for name in ("work", "artifact", "artifact.partial-7", "checkpoints"):
        (folder.path / name).mkdir()
    for name in (".state.json.1-ab.tmp", "log.txt"):
        (folder.path / name).touch()
    folder.discard_scratch()
    assert sorted(path.name for path in folder.path.iterdir()) == ["artifact", "checkpoints", "log.txt"]
