from __future__ import annotations

from pathlib import Path

import pytest

from omgoptim.errors import DataError, ModelError, RequestError, argument
from omgoptim.models.security.path_policy import PathPolicy, error_about


def test_a_file_of_the_project_is_found_by_its_relative_and_by_its_absolute_path(
    project: Path, policy: PathPolicy
) -> None:
    (project / "net.py").touch()
    assert policy.file("net.py", "model") == policy.file(str(project / "net.py"), "model") == project / "net.py"


@pytest.mark.parametrize("text", ["../other/net.py", "sub/../../other/net.py", "{other}/net.py"])
def test_a_path_outside_the_project_is_refused_even_where_it_exists(
    project: Path, policy: PathPolicy, text: str
) -> None:
    other = project.parent / "other"
    other.mkdir()
    (other / "net.py").touch()
    with pytest.raises(RequestError, match="lies outside the project") as refused:
        policy.file(text.format(other=other), "model")
    assert argument("allow_path", [str(other)]) in refused.value.fix


def test_a_link_that_leaves_the_project_is_refused_and_an_allowed_folder_is_not(
    project: Path, policy: PathPolicy
) -> None:
    other = project.parent / "other"
    other.mkdir()
    (other / "net.py").touch()
    (project / "link.py").symlink_to(other / "net.py")
    (project / "folder").symlink_to(other)
    for text in ("link.py", "folder/net.py"):
        with pytest.raises(RequestError, match="lies outside the project"):
            policy.file(text, "model")
        assert PathPolicy.of(project, [str(other)]).file(text, "model") == other / "net.py"


def test_a_folder_whose_name_only_begins_like_the_projects_is_outside(project: Path, policy: PathPolicy) -> None:
    twin = project.with_name(project.name + "-private")
    twin.mkdir()
    with pytest.raises(RequestError, match="outside"):
        policy.file(str(twin), "data")


def test_what_does_not_exist_is_an_error_about_that_argument(policy: PathPolicy) -> None:
    with pytest.raises(ModelError, match=r"model 'net\.py' does not exist"):
        policy.file("net.py", "model")
    with pytest.raises(DataError, match=r"data 'load\.npz' does not exist"):
        policy.file("load.npz", "data")
    assert (error_about("metric"), error_about("checkpoint")) == (DataError, ModelError)


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "~nobody-of-that-name/net.py"])
def test_a_text_that_can_be_no_path_is_refused(policy: PathPolicy, text: str) -> None:
    with pytest.raises(RequestError, match="is not a valid path"):
        policy.file(text, "model")
