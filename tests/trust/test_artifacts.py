"""Artifacts from somebody else, changed artifacts and callables from elsewhere: nothing of them runs.

Every payload only writes a mark, and no test ever finds one. What is refused to code from elsewhere works for the user
who made the artifact, and for the one who says so.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import onnx
import pytest
import torch
from mcp import Client
from mcp.client.stdio import StdioServerParameters
from torch import nn

import omgoptim
from omgoptim import requests
from omgoptim.errors import ArtifactError, ModelError, RequestError
from omgoptim.jobs.actions import _without_grants
from omgoptim.jobs.folder import RunFolder, Submission, new_run
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.models.artifact import save_module, save_program
from omgoptim.models.data import adjacent_loader
from omgoptim.models.manifest import MAX_JSON_BYTES, Manifest
from omgoptim.models.onnx_file import declared_signature
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.models.security.file_integrity import sign_record
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import load_source
from omgoptim.operations.compare import _past_request
from omgoptim.operations.context import RunContext
from omgoptim.runtimes.signature import InputTensor, Signature

ROOT = Path(__file__).parents[2]
SIGNATURE = Signature((InputTensor("x", "float32", ("batch", 3), False),), "tensor")
X = np.ones((2, 3), np.float32)
NET = """
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def forward(self, x):
        return super().forward(x)
"""
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(autouse=True)
def _forget_user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    modules, path, projects = set(sys.modules), list(sys.path), tmp_path_factory.getbasetemp().resolve()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None)
        if name.startswith("_omgoptim_user_") or (file and Path(file).resolve().is_relative_to(projects)):
            del sys.modules[name]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model file, and an artifact of it in `small`."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "net.py").write_text(NET)
    monkeypatch.chdir(folder)
    make(folder / "small", Recipe("callable", "net.py:Net", {}, str(folder)))
    return folder


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """Where every payload writes to; after the test it is not there."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists()


def make(folder: Path, recipe: Recipe) -> None:
    """A module artifact as omgoptim saves it, whatever its recipe names."""
    module = nn.Linear(3, 2)
    outputs = [module(torch.from_numpy(X)).detach().numpy()]
    save_module(folder, module, recipe, Manifest("torch_eager", "float32", SIGNATURE), OutputCheck({"x": X}, outputs))


def make_program(folder: Path, **saved: Any) -> None:
    """A program artifact that adds a weight to its input; `saved` goes to onnx.save_model."""
    value = onnx.helper.make_tensor_value_info
    names = [value(name, onnx.TensorProto.FLOAT, ["batch", 3]) for name in ("x", "output")]
    weight = onnx.numpy_helper.from_array(np.ones(3, np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["output"])], "g", names[:1], names[1:], [weight]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    source = folder.parent / f"{folder.name}.source"
    source.mkdir()
    onnx.save_model(model, source / "model.onnx", **saved)
    save_program(
        folder, source / "model.onnx", Manifest("onnxruntime", "float32", SIGNATURE), OutputCheck({"x": X}, [X + 1])
    )


def rewritten(folder: Path, name: str, edit: Edit, *, sign: bool = False) -> None:
    """Change a JSON file of an artifact and make its manifest fit, as an attacker does; or `sign` it as its user."""
    record = json.loads((folder / name).read_text())
    edit(record)
    (folder / name).write_text(json.dumps(record))
    manifest = json.loads((folder / "manifest.json").read_text())
    if name != "manifest.json":
        listed(folder, manifest, name)
    (folder / "manifest.json").write_text(json.dumps(sign_record("artifact", manifest) if sign else manifest))


def listed(folder: Path, manifest: dict[str, Any], name: str) -> None:
    import hashlib

    text = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def refused(folder: Path, *, trust: bool = False, allow: tuple[str, ...] = ()) -> list[str]:
    """What each way to open an artifact says: as a model of a request, and in Python. None of them opens it."""
    policy = PathPolicy(folder.parent, tuple(map(Path, allow)), trusted=trust)
    ways: list[Callable[[], Any]] = [
        lambda: omgoptim.open_artifact(folder, trust=trust, allow_path=allow),
        lambda: opened_for_work(folder.name, policy),
    ]
    said = []
    for way in ways:
        with pytest.raises((ArtifactError, RequestError, ModelError)) as error:
            way()
        said.append(str(error.value))
    return said


def opened_for_work(name: str, policy: PathPolicy) -> nn.Module:
    from omgoptim.models.artifact import load_module

    source = load_source(name, policy)
    assert source.artifact is not None
    return load_module(source.artifact, Manifest.read(source.artifact), policy)


def test_the_user_who_made_it_opens_it_everywhere_without_a_flag(project: Path, tmp_path: Path) -> None:
    assert omgoptim.open_artifact("small")(X).shape == (2, 2)
    assert opened_for_work("small", PathPolicy(project)) is not None
    shutil.copytree(project / "small", tmp_path / "elsewhere")
    os.chdir(tmp_path)
    assert omgoptim.open_artifact(tmp_path / "elsewhere")(X).shape == (2, 2)


def test_an_artifact_moves_with_its_project(project: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    project.rename(moved)
    os.chdir(moved)
    recipe = json.loads((moved / "small" / "recipe.json").read_text())["recipe"]
    assert recipe["spec"] == "net.py:Net"
    assert "allowed" not in recipe
    assert opened_for_work("small", PathPolicy(moved)) is not None
    assert omgoptim.open_artifact("small")(X).shape == (2, 2)


def test_a_request_that_names_a_file_by_its_whole_path_is_recorded_relative_to_the_project(project: Path) -> None:
    source = load_source(f"{project}/net.py:Net", PathPolicy(project))
    assert source.recipe is not None
    assert source.recipe.spec == "net.py:Net"


@pytest.mark.parametrize("origin", [None, "", "0" * 64, 7, "é"])
def test_an_artifact_without_this_users_hmac_runs_nothing_unless_it_is_trusted(
    project: Path, mark: Path, origin: object
) -> None:
    net = (project / "net.py").read_text()
    (project / "net.py").write_text(f"open({str(mark)!r}, 'w').close()\n{net}")
    rewritten(project / "small", "manifest.json", lambda record: record.update(origin=origin))
    for said in refused(project / "small"):
        assert "was not created by this user, and opening it runs code" in said
        assert "calls 'net.py:Net'" in said
        assert "`trust_artifact=True`" in said
        assert "trust=True)" in said
    (project / "net.py").write_text(net)
    assert omgoptim.open_artifact("small", trust=True)(X).shape == (2, 2)
    assert opened_for_work("small", PathPolicy(project, trusted=True)) is not None


def test_an_artifact_of_another_user_runs_nothing_unless_it_is_trusted(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMGOPTIM_STATE_DIR", str(tmp_path / "another-user"))
    for said in refused(project / "small"):
        assert "was not created by this user" in said
    make(project / "mine", Recipe("callable", "net.py:Net", {}, str(project)))
    assert omgoptim.open_artifact("mine")(X).shape == (2, 2)
    assert omgoptim.open_artifact("small", trust=True)(X).shape == (2, 2)


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json", "check.npz", "manifest.json"])
def test_one_changed_byte_in_any_file_is_refused(project: Path, name: str) -> None:
    path = project / "small" / name
    text = bytearray(path.read_bytes())
    text[text.index(b"net.py") if name == "recipe.json" else len(text) // 2] ^= 1
    path.write_bytes(text)
    for said in refused(project / "small"):
        assert "damaged" in said or "not an artifact" in said or "was not created by this user" in said


def test_what_a_recipe_says_of_its_own_rights_grants_nothing(project: Path, tmp_path: Path, mark: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n{NET}")

    def widen(record: dict[str, Any]) -> None:
        record["recipe"] |= {"allowed": ["/"], "project": str(outside), "spec": f"{outside}/evil.py:Net"}

    rewritten(project / "small", "recipe.json", widen)
    for said in refused(project / "small"):
        assert "was not created by this user" in said
    for said in refused(project / "small", trust=True):
        assert "outside the project" in said
    rewritten(project / "small", "recipe.json", lambda record: record["recipe"].update(spec="evil.py:Net"))
    for said in refused(project / "small", trust=True):
        assert "'evil.py' does not exist" in said


def payloads(project: Path, mark: Path) -> dict[str, dict[str, Any]]:
    """Callables of Python and torch, with arguments that make them write the mark."""
    command = f"echo ran > '{mark}'"
    (project / "hub").mkdir()
    (project / "hub" / "hubconf.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef net(): pass\n")

    class Marking:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, (command,)

    (project / "evil.pt").write_bytes(pickle.dumps(Marking()))
    (project / "again.py").write_text(
        "import functools, os, subprocess, torch\nfrom os import system\n"
        "run = functools.partial(subprocess.run, shell=True)\nload = torch.load\nwhich = os.path\n"
        "class Own:\n    run = staticmethod(os.system)\n"
    )
    unpickle = {"f": str(project / "evil.pt"), "weights_only": False}
    return {
        "os:system": {"command": command},
        "subprocess:run": {"args": command, "shell": True},
        "builtins:exec": {},
        "torch:load": unpickle,
        "torch.hub:load": {"repo_or_dir": str(project / "hub"), "model": "net", "source": "local"},
        "torch.jit:load": unpickle,
        "torch.nn.modules.module:torch.load": unpickle,
        "again.py:system": {"command": command},
        "again.py:run": {"args": command},
        "again.py:load": unpickle,
        "again.py:torch.load": unpickle,
        "again:os.system": {"command": command},
        "again.py:Own.run": {"command": command},
        "again.py:which.os.system": {"command": command},
        "again.py:Own.run.__self__.system": {"command": command},
        "again.py:__builtins__.exec": {},
        "__main__:os.system": {"command": command},
        "omgoptim.models.security.user_code:call_user": {},
    }


SPECS = (
    *("os:system", "subprocess:run", "builtins:exec", "torch:load", "torch.hub:load", "torch.jit:load"),
    *("torch.nn.modules.module:torch.load", "again.py:system", "again.py:run", "again.py:load", "again.py:torch.load"),
    *("again:os.system", "again.py:Own.run", "again.py:which.os.system", "again.py:Own.run.__self__.system"),
    *("again.py:__builtins__.exec", "__main__:os.system", "omgoptim.models.security.user_code:call_user"),
)


@pytest.mark.parametrize("spec", SPECS)
def test_a_callable_that_the_project_does_not_define_is_never_called(project: Path, mark: Path, spec: str) -> None:
    kwargs = payloads(project, mark)[spec]
    with pytest.raises(RequestError, match="is not code of the project") as error:
        load_source(spec, PathPolicy(project), kwargs=kwargs)
    assert "call it in a function of the project" in error.value.fix
    make(project / "recipe", Recipe("callable", spec, kwargs, str(project)))
    for said in (*refused(project / "recipe"), *refused(project / "recipe", trust=True)):
        assert "is not code of the project" in said


def test_code_of_an_environment_inside_the_project_is_not_the_projects(project: Path, mark: Path) -> None:
    for folder in (".venv/lib/python3.12/site-packages/pkg", "env/code"):
        (project / folder).mkdir(parents=True)
        (project / folder / "net.py").write_text(f"open({str(mark)!r}, 'w').close()\n{NET}")
    (project / "env" / "pyvenv.cfg").touch()
    for spec in (".venv/lib/python3.12/site-packages/pkg/net.py:Net", "env/code/net.py:Net"):
        with pytest.raises(RequestError, match="is not code of the project"):
            load_source(spec, PathPolicy(project))


def test_an_installed_module_runs_where_the_user_allows_it_by_name(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_source("torch.nn:Linear", PathPolicy(project), kwargs={"in_features": 3, "out_features": 2}).module
    copied = {"model": "torch.nn:ReLU"}
    with pytest.raises(RequestError, match=r"allow_module=\['copy'\]"):
        load_source("copy:deepcopy", PathPolicy(project), kwargs=copied)
    with pytest.raises(ModelError, match="deepcopy returned a str"):
        load_source("copy:deepcopy", PathPolicy.of(project, [], ["copy"]), kwargs={"x": "text"})
    monkeypatch.setenv("OMGOPTIM_ALLOW_MODULE", "copy json")
    with pytest.raises(ModelError, match="deepcopy returned a str"):
        load_source("copy:deepcopy", PathPolicy.of(project, []), kwargs={"x": "text"})
    with pytest.raises(RequestError, match="is not code of the project"):  # copy imports it, and does not define it
        load_source("copy:dispatch_table.get", PathPolicy.of(project, []))


def test_what_a_project_wraps_and_makes_itself_is_its_own(project: Path) -> None:
    (project / "own.py").write_text(
        "import functools, torch\nfrom torch import nn\n"
        "@torch.no_grad()\ndef build(width=3): return nn.Linear(width, 2)\n"
        "@functools.cache\ndef cached(): return nn.Linear(3, 2)\n"
        "wide = functools.partial(build, width=9)\nmade = nn.Sequential(nn.Linear(3, 2))\n"
        "class Factory:\n    def __call__(self): return nn.Linear(3, 2)\n    def build(self): return nn.Linear(3, 2)\n"
        "factory = Factory()\n"
    )
    for name in ("build", "cached", "wide", "made", "factory", "factory.build"):
        assert load_source(f"own.py:{name}", PathPolicy(project)).module is not None


def test_a_load_that_a_model_file_only_imports_is_not_taken_for_its_data(project: Path) -> None:
    (project / "net.py").write_text(f"from torch import load\n{NET}")
    source = load_source("net.py:Net", PathPolicy(project))
    assert adjacent_loader(source.recipe, PathPolicy(project), 60) is None


def test_a_hugging_face_folder_outside_the_project_is_not_read(project: Path, tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (project / "bert").symlink_to(tmp_path / "bert")
    for spec in (str(tmp_path / "bert"), "../bert", "./bert", "bert", "x/../../bert"):
        folder = project / f"hf-{len(spec)}-{spec.count('.')}"
        make(folder, Recipe("hf", spec, {}, str(project)))
        for said in refused(folder):
            assert "outside the project" in said


@pytest.mark.parametrize("kind", ["hf", "timm", "torchvision"])
def test_a_recipe_of_a_model_library_is_refused_as_every_other_that_runs_code(project: Path, kind: str) -> None:
    make(project / kind, Recipe(kind, "someone/net", {"trust_remote_code": True}, str(project)))
    rewritten(project / kind, "manifest.json", lambda record: record.pop("origin"))
    for said in refused(project / kind):
        assert f"with {kind}" in said
        assert "was not created by this user" in said


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "C:\\secret", "a\nb", "", ".", "small"]
)
def test_a_manifest_names_only_files_inside_its_folder(project: Path, name: str) -> None:
    (project / "secret").write_bytes(b"")
    (project / "small" / "small").mkdir()
    entry = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    rewritten(project / "small", "manifest.json", lambda record: record["files"].update({name: entry}), sign=True)
    for said in refused(project / "small"):
        assert "refers to a file outside itself" in said


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json", "check.npz"])
def test_a_link_in_an_artifact_is_refused_and_a_link_to_one_is_not(project: Path, tmp_path: Path, name: str) -> None:
    (project / "link").symlink_to(project / "small")
    assert omgoptim.open_artifact("link")(X).shape == (2, 2)
    (project / "small" / name).rename(tmp_path / name)
    (project / "small" / name).symlink_to(tmp_path / name)
    for said in refused(project / "small"):
        assert "a link or not a regular file" in said


def test_a_file_that_the_manifest_does_not_list_is_not_read(project: Path) -> None:
    rewritten(project / "small", "manifest.json", lambda record: record["files"].pop("recipe.json"), sign=True)
    for said in refused(project / "small"):
        assert "manifest.json lists no recipe.json" in said


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/hostname", "link.bin"])
def test_weights_of_a_program_lie_beside_it(project: Path, tmp_path: Path, place: str) -> None:
    make_program(project / "program", save_as_external_data=True, location="weights.bin", size_threshold=0)
    shutil.copy(project / "program" / "weights.bin", project / "secret.bin")
    (project / "program" / "link.bin").symlink_to(project / "secret.bin")
    model = onnx.load(project / "program" / "model.onnx", load_external_data=False)
    location = next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location")
    location.value = place
    (project / "program" / "model.onnx").write_bytes(model.SerializeToString())
    rewritten(project / "program", "manifest.json", lambda r: listed(project / "program", r, "model.onnx"))
    program, manifest = project / "program" / "model.onnx", Manifest.read(project / "program")
    ways: list[Callable[[], Any]] = [
        lambda: omgoptim.open_artifact("program"),
        lambda: load_source("program", PathPolicy(project)),
        lambda: declared_signature(program),
        lambda: save_program(tmp_path / "saved", program, manifest, OutputCheck({}, [])),
    ]
    for way in ways:
        with pytest.raises((ArtifactError, ModelError)) as refused:
            way()
        assert "lies outside its folder" in str(refused.value)
    assert not (tmp_path / "saved").exists()


def test_a_program_of_somebody_else_opens_as_it_holds_no_code(project: Path) -> None:
    make_program(project / "program")
    shutil.copy(project / "small" / "recipe.json", project / "program")
    rewritten(project / "program", "manifest.json", lambda r: listed(project / "program", r, "recipe.json"))
    assert not Manifest.read(project / "program").made_here
    assert np.array_equal(omgoptim.open_artifact("program")(X), X + 1)
    assert load_source("program", PathPolicy(project)).artifact == project / "program"


@pytest.mark.parametrize("name", ["manifest.json", "recipe.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, " " * (MAX_JSON_BYTES + 1), "[]", '{"recipe": 7}'])
def test_json_that_nobody_wrote_is_no_artifact(project: Path, name: str, text: str) -> None:
    (project / "small" / name).write_text(text)
    if name == "recipe.json":
        manifest = json.loads((project / "small" / "manifest.json").read_text())
        listed(project / "small", manifest, name)
        (project / "small" / "manifest.json").write_text(json.dumps(sign_record("artifact", manifest)))
    for said in refused(project / "small"):
        assert "not an artifact" in said or "recipe.json cannot be read" in said


WRONG_TYPES: list[dict[str, Any]] = [
    {"runtime": ["torch_eager"]},
    {"precision": {}},
    {"device": 7},
    {"lineage": [1]},
    {"params": "many"},
    {"files": []},
    {"files": {"recipe.json": 7}},
    {"files": {"recipe.json": {"bytes": -1, "sha256": ""}}},
    {"macs_check": 7},
    {"signature": []},
    {"signature": {"inputs": [{"name": 7, "dtype": "float32", "shape": [1], "keyword": False}], "outputs": "tensor"}},
    {"signature": {"inputs": [{"name": "x", "dtype": "O", "shape": [1], "keyword": False}], "outputs": "tensor"}},
    {"signature": {"inputs": [], "outputs": {"dict": "tensor"}}},
    {"unknown": 1},
    {"made_here": True, "origin": None},
]


@pytest.mark.parametrize("change", WRONG_TYPES, ids=lambda change: next(iter(change)))
def test_a_manifest_of_other_types_is_no_artifact(project: Path, change: dict[str, Any]) -> None:
    rewritten(project / "small", "manifest.json", lambda record: record.update(change))
    refused(project / "small")


WRONG_RECIPES: list[dict[str, Any]] = [
    {"kind": "eval"},
    {"kind": 7},
    {"spec": None},
    {"kwargs": []},
    {"limit_s": True},
    {"limit_s": -1},
    {"structural_diff": [1]},
    {"further": 1},
    {"kind": "pt2"},
]


@pytest.mark.parametrize("change", WRONG_RECIPES, ids=str)
def test_a_recipe_of_other_types_is_damaged(project: Path, change: dict[str, Any]) -> None:
    rewritten(project / "small", "recipe.json", lambda record: record["recipe"].update(change), sign=True)
    for said in refused(project / "small"):
        assert "damaged" in said or "structural changes" in said


def test_a_measuring_process_opens_what_its_worker_vouches_for(project: Path) -> None:
    rewritten(project / "small", "manifest.json", lambda record: record.pop("origin"))
    setup = TimingSetup({}, 1, 1, project, policy=PathPolicy(project))
    with MeasuringProcess(project / "small", setup) as process:
        process.begin_open()
        assert max(process.end_open()["differences"]) < 1e-6


def run_of(project: Path, request: dict[str, Any]) -> RunFolder:
    folder = new_run(project, "profile")
    folder.write_request(Submission("profile", request, project, sys.executable, "the test", "3"))
    return folder


def test_a_run_that_this_user_did_not_ask_for_is_resumed_without_what_it_grants_itself(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMGOPTIM_PYTHON", sys.executable)
    asked = {"model": "net.py:Net", "allow_path": ["/"], "allow_module": ["os"], "trust_artifact": True, "seed": 7}
    folder = run_of(project, asked)
    assert folder.is_own_request()
    record = json.loads(folder.request_file.read_text())
    record["request"]["seed"] = 8
    record["python"]["path"] = record["project"] = "/outside"
    folder.request_file.write_text(json.dumps(record))
    assert not folder.is_own_request()
    again = _without_grants(folder, folder.read_request())
    assert again.request == {"model": "net.py:Net", "seed": 8}
    assert (again.project, again.python) == (project, sys.executable)


def test_compare_takes_data_only_from_a_run_of_this_project_that_this_user_asked_for(
    project: Path, tmp_path: Path
) -> None:
    def past(folder: RunFolder) -> dict[str, Any]:
        own = RunContext(run_of(project, {}).path, "compare-1", project, "", "", lambda *_: None)
        return _past_request(folder.path / "artifact", own)

    asked = {"model": "net.py:Net", "data": "net.py:load"}
    folder = run_of(project, asked)
    assert past(folder) == asked
    assert past(run_of(tmp_path, asked)) == {}
    record = json.loads(folder.request_file.read_text())
    folder.request_file.write_text(json.dumps(record | {"verb": "prune"}))
    assert past(folder) == {}


def shell(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMGOPTIM_PYTHON": sys.executable}
    command = [sys.executable, "-m", "omgoptim.cli", *arguments, "--json"]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_shell_refuses_a_foreign_artifact_and_opens_it_with_the_flag(project: Path, mark: Path) -> None:
    rewritten(project / "small", "manifest.json", lambda record: record.pop("origin"))
    done = shell(project, "profile", "small", "--timing", "quick")
    assert done.returncode == 3
    assert "--trust-artifact" in done.stdout + done.stderr
    trusted = shell(project, "profile", "small", "--timing", "quick", "--trust-artifact")
    assert trusted.returncode == 0, trusted.stderr
    report = json.loads(trusted.stdout)
    assert "--trust-artifact" in report["repeat"]


def test_an_agent_can_neither_open_a_foreign_artifact_nor_allow_itself_to(project: Path) -> None:
    rewritten(project / "small", "manifest.json", lambda record: record.pop("origin"))
    ours = {"PYTHONPATH": str(ROOT), "OMGOPTIM_PROJECT": str(project), "OMGOPTIM_PYTHON": sys.executable}
    server = StdioServerParameters(
        command=sys.executable, args=["-m", "omgoptim.server"], env=dict(os.environ) | ours, cwd=str(project)
    )

    async def answers() -> list[dict[str, Any]]:
        async with Client(server) as client:
            grants: list[dict[str, Any]] = [{"trust_artifact": True}, {"options": {"allow_module": ["os"]}}, {}]
            return [
                (await client.call_tool("profile", {"model": "small", "timing": "quick"} | grant)).structured_content
                for grant in grants
            ]

    trust, module, plain = anyio.run(answers)
    assert "'trust_artifact' cannot be given to a tool" in trust["error"]["what"]
    assert "'allow_module' cannot be given to a tool" in module["error"]["what"]
    assert "was not created by this user" in plain["error"]["what"]


def test_no_tool_takes_what_is_the_users_to_grant() -> None:
    for request in requests.VERBS.values():
        assert set(requests.GRANTS) <= set(request.model_fields)
    assert requests.GRANTS == ("allow_path", "allow_module", "allow_remote_code", "trust_artifact")
