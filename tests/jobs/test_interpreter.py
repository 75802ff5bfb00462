from __future__ import annotations

import sys
import venv
from pathlib import Path

import pytest

from omgoptim.errors import SetupError
from omgoptim.jobs.interpreter import OWN, REQUIRED, Interpreter, find_interpreter, require

VARIABLES = ("OMGOPTIM_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def test_without_anything_else_it_is_our_own_python_which_has_everything(project: Path) -> None:
    found = find_interpreter(project, None)
    assert (found.path, found.missing) == (Path(sys.executable), ())
    assert found.version == "{}.{}.{}".format(*sys.version_info[:3])
    require(found)


def test_each_place_comes_before_the_next(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argument, variable, active, conda = (environment(tmp_path / name) for name in ("a", "v", "active", "conda"))
    monkeypatch.setenv("CONDA_PREFIX", str(conda.parents[1]))
    assert (find_interpreter(project, None).path, find_interpreter(project, None).found_by) == (conda, "CONDA_PREFIX")
    monkeypatch.setenv("VIRTUAL_ENV", str(active.parents[1]))
    assert find_interpreter(project, None).path == active
    own = environment(project / ".venv")
    assert (find_interpreter(project, None).path, find_interpreter(project, None).found_by) == (
        own,
        "the project's .venv",
    )
    monkeypatch.setenv("OMGOPTIM_PYTHON", str(variable))
    assert find_interpreter(project, None).path == variable
    assert find_interpreter(project, str(argument)).path == argument


def test_a_python_may_be_named_by_its_environments_folder_or_relative_to_the_project(project: Path) -> None:
    python = environment(project / "env")
    assert find_interpreter(project, "env").path == python
    assert find_interpreter(project, "env/bin/python").path == python


def test_an_environments_own_packages_count_and_nothing_of_the_project_or_of_ours(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = environment(project / ".venv")
    (site,) = (project / ".venv" / "lib").glob("python*/site-packages")
    (site / "onnx").mkdir()
    (site / "onnx" / "__init__.py").write_text("raise RuntimeError('looked at, not imported')")
    (site / "sympy").mkdir()  # an empty folder is no package
    (project / "torch.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(project))
    found = find_interpreter(project, None)
    assert set(REQUIRED) - set(found.missing) == {"onnx"}
    with pytest.raises(SetupError, match="lacks torch, numpy") as caught:
        require(found)
    assert str(python) in caught.value.fix


def test_a_python_that_is_named_and_does_not_exist_or_does_not_run_is_an_error(project: Path) -> None:
    with pytest.raises(SetupError, match="there is no Python at 'nowhere/python'"):
        find_interpreter(project, "nowhere/python")
    broken = project / "python"
    broken.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(SetupError, match="does not run") as caught:
        find_interpreter(project, str(broken))
    assert "out of order" in caught.value.why


def test_an_old_python_is_refused() -> None:
    with pytest.raises(SetupError, match=r"Python 3\.9\.1 is too old"):
        require(Interpreter(Path("/usr/bin/python3.9"), "the test", "3.9.1", ()))


def test_the_fix_is_one_command_for_that_python() -> None:
    interpreter = Interpreter(Path("/my env/bin/python"), "the test", "3.12.0", ("onnx", "onnxruntime"))
    with pytest.raises(SetupError) as caught:
        require(interpreter)
    assert caught.value.fix == "'/my env/bin/python' -m pip install onnx onnxruntime"


def test_a_plugins_own_python_is_not_what_torch_is_installed_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, project = tmp_path / "own", tmp_path / "my project"
    venv.create(own, with_pip=False)
    project.mkdir()
    monkeypatch.setattr(sys, "executable", str(own / "bin" / "python"))
    monkeypatch.setenv("PLUGIN_ROOT", str(tmp_path / "plugin"))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = find_interpreter(project, None)
    with pytest.raises(SetupError, match="no Python environment") as caught:
        require(found)
    assert found.found_by == OWN
    made = project / ".venv"
    assert caught.value.fix.startswith(f"python3 -m venv '{made}' && '{made}/bin/python' -m pip install torch ")
    assert {"pydantic", "psutil", "setuptools"} <= set(caught.value.fix.split())  # what the plugin's own Python has too
    assert str(own) not in caught.value.fix
