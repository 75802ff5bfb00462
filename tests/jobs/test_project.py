from __future__ import annotations

from pathlib import Path

import pytest

from omgoptim.errors import RequestError
from omgoptim.jobs.project import find_project


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
    with pytest.raises(RequestError, match="not known which project") as caught:
        find_project(None)
    assert "give project=" in caught.value.fix
    assert find_project(str(tmp_path)) == tmp_path.resolve()


def test_the_root_of_the_file_system_is_no_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    with pytest.raises(RequestError, match="not known which project"):
        find_project(None)
