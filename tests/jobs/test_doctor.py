from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from omgoptim.errors import RequestError
from omgoptim.jobs.doctor import doctor, mcp_entry
from omgoptim.reports import DoctorReport, PackageState
from omgoptim.requests import DoctorRequest


def package(site: Path, name: str, code: str = "", version: str = "1.2.3") -> None:
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(code)
    (site / f"{name}-{version}.dist-info").mkdir()
    (site / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


@pytest.fixture
def site(project: Path) -> Path:
    """The packages of the project's own environment, which has none."""
    venv.create(project / ".venv", with_pip=False, symlinks=True)
    (found,) = (project / ".venv" / "lib").glob("python*/site-packages")
    return found


def look(project: Path) -> DoctorReport:
    return doctor(DoctorRequest(project=str(project)))


def named(states: list[PackageState], name: str) -> PackageState:
    return next(state for state in states if state.name == name)


def test_a_python_that_has_nothing_is_incomplete_and_each_thing_has_its_install_line(project: Path, site: Path) -> None:
    report = look(project)
    assert report.outcome == "incomplete"
    assert report.python_found_by == "the project's .venv"
    assert {state.state for state in report.runtimes + report.extras} == {"missing"}
    assert all(str(project / ".venv" / "bin" / "python") in (state.fix or "") for state in report.extras)
    assert {"numpy", "onnx", "thop"} <= {state.name for state in report.extras}
    assert "Runs cannot start" in report.summary


def test_a_broken_torchvision_is_found_out_and_what_it_breaks_is_said(project: Path, site: Path) -> None:
    package(site, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    package(site, "torchmetrics", "print('noise on stdout')\nimport torchvision")
    package(site, "transformers", "def __getattr__(name): import torchvision")
    package(site, "timm")
    report = look(project)
    vision = named(report.extras, "torchvision")
    assert (vision.state, vision.version) == ("broken", "1.2.3")
    assert "RuntimeError: operator torchvision::nms does not exist" in vision.unlocks
    assert "uninstall" in (vision.fix or "")
    for name in ("torchmetrics", "transformers"):
        assert named(report.extras, name).state == "broken"
        assert "uninstall" in (named(report.extras, name).fix or "")
    assert named(report.extras, "timm").state == "ok"
    assert "broken torchvision also breaks" in report.summary


def test_a_python_that_an_import_crashes_is_reported_all_the_same(project: Path, site: Path) -> None:
    package(site, "openvino", "import os\nos.abort()")
    report = look(project)
    assert "crashed this Python" in report.summary
    assert named(report.runtimes, "openvino").version == "1.2.3"


def test_this_python_can_run_everything_that_runs_need(project: Path) -> None:
    report = doctor(DoctorRequest(project=str(project), python=sys.executable))
    assert report.outcome == "ok"
    states = {state.name: state.state for state in report.runtimes}
    assert (states["torch_eager"], states["onnxruntime"]) == ("ok", "ok")
    assert report.cpu
    assert report.cores >= 1
    assert report.project == str(project)


def test_optional_parts_are_listed_and_executorch_counts_with_all_that_it_needs(project: Path, site: Path) -> None:
    for name in ("ray", "coremltools"):
        package(site, name)
    bindings = site / "executorch" / "extension" / "pybindings"
    bindings.mkdir(parents=True)
    (bindings / "_C.py").write_text("")
    report = look(project)
    assert (named(report.extras, "ray").version, named(report.extras, "coremltools").state) == ("1.2.3", "ok")
    assert named(report.extras, "optuna").state == "missing"
    lacking = named(report.runtimes, "executorch")
    assert lacking.state == "missing"
    assert "pip install executorch torchao ruamel.yaml flatbuffers tabulate" in (lacking.fix or "")
    for name in ("torchao", "ruamel", "flatbuffers", "tabulate"):
        package(site, name)
    (site / "ruamel" / "yaml.py").write_text("")
    assert named(look(project).runtimes, "executorch").state == "ok"
    assert not [state for state in report.runtimes if state.name == "tensorrt"]  # this Python sees no GPU


def test_a_project_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        look(tmp_path / "gone")


def test_the_mcp_entry_names_an_absolute_command_that_finds_omgoptim_from_anywhere(project: Path) -> None:
    entry = mcp_entry(project)["mcpServers"]["omgoptim"]
    assert json.loads(json.dumps(entry))["env"]["OMGOPTIM_PROJECT"] == str(project)
    assert Path(entry["command"]).is_absolute()
    code = "import importlib.util; print(importlib.util.find_spec('omgoptim').origin)"
    environment = {**os.environ, "PYTHONPATH": entry["env"].get("PYTHONPATH", "")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("__init__.py")
