from __future__ import annotations

import os
from pathlib import Path

import pytest

from omgoptim.errors import RequestError
from omgoptim.jobs.project import PLUGIN_ROOTS, find_project, served_project, served_projects


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMGOPTIM_PROJECT", "CLAUDE_PROJECT_DIR", "CLAUDE_PLUGIN_ROOT", "PLUGIN_ROOT"):
        monkeypatch.delenv(name, raising=False)


def test_each_place_comes_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument, variable, assistant, here = (tmp_path / name for name in "abcd")
    for folder in (argument, variable, assistant, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    assert find_project(None) == here.resolve()
    monkeypatch.setenv("CLAUDE_PROJECT_DIR", str(assistant))
    assert find_project(None) == assistant.resolve()
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(variable))
    assert find_project(None) == variable.resolve()
    assert find_project(str(argument)) == argument.resolve()


def test_a_folder_that_does_not_exist_is_an_error_that_says_where_it_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(tmp_path / "gone"))
    with pytest.raises(RequestError, match="does not exist") as caught:
        find_project(None)
    assert "OMGOPTIM_PROJECT" in caught.value.why


@pytest.mark.parametrize("inside", [".", "omgoptim"])
def test_the_plugins_own_folder_is_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / inside)
    monkeypatch.setenv("CLAUDE_PLUGIN_ROOT", str(tmp_path))
    with pytest.raises(RequestError, match="the project is unknown") as caught:
        find_project(None)
    assert "give project=" in caught.value.fix
    assert find_project(str(tmp_path)) == tmp_path.resolve()


def test_the_root_of_the_file_system_is_no_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(RequestError, match="the project is unknown"):
        find_project(None)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the server was started in, with nothing else given."""
    for name in ("OMGOPTIM_PROJECT", "CLAUDE_PROJECT_DIR", "OMGOPTIM_PROJECTS", "OMGOPTIM_ALLOW_PATH", *PLUGIN_ROOTS):
        monkeypatch.delenv(name, raising=False)
    here = tmp_path.resolve() / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def test_a_server_serves_where_it_was_started_and_what_the_environment_lists(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert served_projects() == [served]
    assert served_project(None) == served
    others = [tmp_path.resolve() / name for name in "abc"]
    for other in others:
        other.mkdir()
    monkeypatch.setenv("CLAUDE_PROJECT_DIR", str(others[1]))
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(others[0]))
    monkeypatch.setenv("OMGOPTIM_PROJECTS", os.pathsep.join([str(others[2]), "", "/no/such/place"]))
    assert served_projects() == [others[0], others[1], served, others[2]]
    assert served_project(None) == others[0]
    assert served_project(str(others[2])) == others[2]


def test_a_home_folder_the_root_and_the_plugins_own_are_no_projects_unless_named(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(served))
    assert served_projects() == []
    with pytest.raises(RequestError) as refused:
        served_project(None)
    assert "OMGOPTIM_PROJECT=" in refused.value.fix
    with pytest.raises(RequestError, match="does not serve") as refused:
        served_project(str(served))
    assert refused.value.fix.endswith(f"OMGOPTIM_PROJECTS={served}")
    monkeypatch.setenv("OMGOPTIM_PROJECTS", str(served))
    assert served_project(None) == served
    monkeypatch.delenv("OMGOPTIM_PROJECTS")
    monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv(PLUGIN_ROOTS[0], str(served))
    assert served_projects() == []


def test_a_name_that_can_be_no_folder_is_refused_in_words(served: Path) -> None:
    for name in ("x" * 5000, "a\0b", "~no-such-user-at-all/x"):
        for find in (find_project, served_project):
            with pytest.raises(RequestError, match="does not exist"):
                find(name)
