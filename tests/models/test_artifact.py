"""Artifacts of real modules and programs: saved once, then opened, damaged and moved as copies."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.errors import ArtifactError
from omgoptim.models import artifact as artifacts
from omgoptim.models import opened_model as opened
from omgoptim.models.forward import first_forward, input_tensors, name_inputs
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck, verify_outputs
from omgoptim.models.recipe import Recipe, code_project, read_recipe
from omgoptim.models.samples import synthetic_like
from omgoptim.models.security.file_integrity import sign_record
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import build, load_source
from omgoptim.reports import MacsCheck
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx, export_pt2
from omgoptim.runtimes.signature import Signature
from omgoptim.runtimes.torch_precision import convert

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)

    def forward(self, x):
        return torch.relu(self.fc(x))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.again = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again.weight = self.inner.weight

    def forward(self, x):
        return self.again(self.inner(x))

class Recurrent(nn.Module):
    def __init__(self, kind='LSTM'):
        super().__init__()
        self.rnn, self.norm = getattr(nn, kind)(3, 4, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x)[0]))
"""
REAL = np.random.default_rng(11).normal(size=(2, 5, 3)).astype(np.float32)
EXAMPLE = synthetic_like({"x": REAL}, seed=0)
X = torch.from_numpy(EXAMPLE["x"])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "nets.py").write_text(NETS)
    return folder


def reach_of(recipe: Recipe) -> PathPolicy:
    return PathPolicy.of(Path(recipe.project), [])


def open_artifact(folder: Path, threads: int | None = None) -> opened.OpenedModel:
    """Open it as the person who made it does."""
    return opened.open_artifact(folder, PathPolicy.of(Path(code_project(folder) or folder), []), threads)


def manifest_of(signature: Signature, runtime: str, precision: str) -> Manifest:
    return Manifest(runtime=runtime, precision=precision, signature=signature, params=16, lineage=("run-1",))


def signature_of(module: nn.Module) -> Signature:
    named = name_inputs(module, X)
    return first_forward(module, input_tensors([named]), {name: tensor for name, tensor, _ in named})


def save(folder: Path, recipe: Recipe, precision: str = "float32", runtime: str = "torch_eager") -> nn.Module:
    """Build, convert and save; the module as it was saved."""
    torch.manual_seed(4)
    module = build(recipe, reach_of(recipe))
    manifest = manifest_of(signature_of(module), runtime, precision)
    module = module if precision == "float32" else convert(copy.deepcopy(module), precision)
    session = ENGINES["torch_eager"].open(module, manifest.signature, SessionSettings(threads=1, precision=precision))
    artifacts.save_module(folder, module, recipe, manifest, OutputCheck(EXAMPLE, session.run(EXAMPLE)))
    return module


def recipe_for(home: Path, name: str, **kwargs: Any) -> Recipe:
    return Recipe("callable", f"nets.py:{name}", kwargs, str(home))


@pytest.fixture(scope="module")
def module_artifact(home: Path) -> Path:
    save(home / "module", recipe_for(home, "Net"))
    return home / "module"


@pytest.fixture(scope="module")
def exported(home: Path) -> tuple[Path, Signature]:
    """The Net as an ONNX file."""
    torch.manual_seed(4)
    module = build(recipe_for(home, "Net"), PathPolicy(home))
    signature = signature_of(module)
    path = home / "exported" / "net.onnx"
    path.parent.mkdir()
    export_onnx(module, {"x": X}, signature, path)
    return path, signature


def save_program(folder: Path, program: Path, signature: Signature, runtime: str = "onnxruntime") -> None:
    outputs = ENGINES[runtime].open(program, signature, SessionSettings(threads=1)).run(EXAMPLE)
    artifacts.save_program(folder, program, manifest_of(signature, runtime, "float32"), OutputCheck(EXAMPLE, outputs))


@pytest.fixture(scope="module")
def program_artifact(home: Path, exported: tuple[Path, Signature]) -> Path:
    save_program(home / "program", *exported)
    return home / "program"


@pytest.fixture
def copy_of(tmp_path: Path, module_artifact: Path, program_artifact: Path) -> Callable[[str], Path]:
    def call(kind: str) -> Path:
        return shutil.copytree(module_artifact if kind == "module" else program_artifact, tmp_path / "copy")

    return call


CASES = [
    ("Net", {}, "float32"),
    ("Net", {"width": 6}, "bfloat16"),
    ("Net", {}, "float16"),
    ("Tied", {}, "float32"),
    ("Tied", {}, "bfloat16"),
    ("Net", {}, "int8_dynamic"),
    ("Recurrent", {"kind": "LSTM"}, "int8_dynamic"),
    ("Recurrent", {"kind": "GRU"}, "int8_dynamic"),
]


@pytest.mark.parametrize(("name", "kwargs", "precision"), CASES)
def test_a_module_comes_back_bit_for_bit(
    home: Path, tmp_path: Path, name: str, kwargs: dict[str, Any], precision: str
) -> None:
    folder = tmp_path / "artifact"
    saved = save(folder, recipe_for(home, name, **kwargs), precision)
    torch.manual_seed(99)
    manifest, session = artifacts.open_session(folder, 1, PathPolicy(home))
    x = X.to({"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32))
    with torch.inference_mode():
        assert torch.equal(session.module(x), saved(x))
    assert verify_outputs(folder, manifest, session) == [0.0]
    assert (manifest.runtime, manifest.precision, manifest.lineage) == ("torch_eager", precision, ("run-1",))
    assert sorted(path.name for path in folder.iterdir()) == [
        "check.npz",
        "manifest.json",
        "recipe.json",
        "weights.safetensors",
    ]


def test_tied_weights_are_stored_once_and_stay_tied(home: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    save(tmp_path / "tied", recipe_for(home, "Tied"))
    with safe_open(tmp_path / "tied" / "weights.safetensors", "pt") as file:
        assert set(file.keys()) == {"inner.weight", "inner.bias", "again.bias"}
    module: Any = artifacts.load_module(tmp_path / "tied", Manifest.read(tmp_path / "tied"), PathPolicy(home))
    assert module.again.weight is module.inner.weight


def test_two_artifacts_of_one_instance_are_open_at_once_without_touching_each_other(home: Path, tmp_path: Path) -> None:
    (home / "instance.py").write_text("from nets import Net\nnet = Net()\n")
    recipe = Recipe("callable", "instance.py:net", {}, str(home))
    for precision in ("bfloat16", "float32"):
        save(tmp_path / precision, recipe, precision)
    opened = [open_artifact(tmp_path / precision, threads=1) for precision in ("bfloat16", "float32", "bfloat16")]
    half, full, half_again = (model(X) for model in opened)
    assert torch.equal(half, half_again)
    assert not torch.equal(half, full)


def test_an_exported_module_travels_as_its_pt2_file_alone(home: Path, tmp_path: Path) -> None:
    module = build(recipe_for(home, "Net"), PathPolicy(home))
    signature = signature_of(module)
    export_pt2(module, {"x": X}, signature, tmp_path / "live.pt2")
    save(tmp_path / "artifact", Recipe("pt2", str(tmp_path / "live.pt2")))
    (tmp_path / "live.pt2").unlink()
    assert sorted(Manifest.read(tmp_path / "artifact").files) == ["check.npz", "model.pt2", "recipe.json"]
    assert torch.equal(open_artifact(tmp_path / "artifact")(X), module(X))


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_program_opens_on_each_engine_and_gives_what_it_gave(
    tmp_path: Path, exported: tuple[Path, Signature], runtime: str
) -> None:
    save_program(tmp_path / "artifact", *exported, runtime=runtime)
    manifest, session = artifacts.open_session(tmp_path / "artifact", 1, PathPolicy(home))
    assert max(verify_outputs(tmp_path / "artifact", manifest, session)) <= 1e-6
    assert list(manifest.files) == ["check.npz", "model.onnx"]
    assert manifest.size_bytes == (tmp_path / "artifact" / "model.onnx").stat().st_size
    assert "open_artifact" in artifacts.loading_snippet(tmp_path / "artifact", manifest)
    assert f"without omgoptim: {runtime}." in artifacts.loading_snippet(tmp_path / "artifact", manifest)
    assert "SessionOptions" not in artifacts.loading_snippet(tmp_path / "artifact", manifest)
    between = artifacts.loading_snippet(tmp_path / "artifact", replace(manifest, mixed_precision=True))
    assert ("options.add_session_config_entry('optimization.disable" in between) == (runtime == "onnxruntime")


@pytest.mark.parametrize("location", ["net.onnx.data", "weights.bin", "parts/weights"])
def test_weights_beside_a_program_come_along_and_its_other_neighbours_do_not(
    tmp_path: Path, exported: tuple[Path, Signature], location: str
) -> None:
    import onnx

    path, signature = exported
    source = tmp_path / "source"
    (source / location).parent.mkdir(parents=True)
    options = {"all_tensors_to_one_file": True, "location": location, "size_threshold": 0}
    onnx.save_model(onnx.load(path), source / "net.onnx", save_as_external_data=True, **options)
    (source / "net.onnx.backup").write_bytes(b"of another day")
    save_program(tmp_path / "artifact", source / "net.onnx", signature)
    shutil.rmtree(source)
    assert sorted(Manifest.read(tmp_path / "artifact").files) == sorted(["check.npz", "model.onnx", location])
    open_artifact(tmp_path / "artifact", threads=1)
    (tmp_path / "artifact" / location).write_bytes(b"")
    with pytest.raises(ArtifactError, match="is damaged"):
        open_artifact(tmp_path / "artifact", threads=1)


FILES = [("module", "weights.safetensors"), ("module", "recipe.json"), ("module", "check.npz")]
FILES += [("program", "model.onnx"), ("program", "check.npz")]


@pytest.mark.parametrize(("kind", "file"), FILES)
def test_one_changed_byte_and_a_missing_file_are_each_found(
    copy_of: Callable[[str], Path], kind: str, file: str
) -> None:
    folder = copy_of(kind)
    whole = bytearray((folder / file).read_bytes())
    whole[len(whole) // 5] ^= 0x10
    (folder / file).write_bytes(whole)
    with pytest.raises(ArtifactError, match="is damaged") as error:
        open_artifact(folder, threads=1)
    assert file in error.value.why
    assert "run the compression again" in error.value.fix
    (folder / file).unlink()
    with pytest.raises(ArtifactError) as error:
        open_artifact(folder, threads=1)
    assert file in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is not an artifact"),
        ("", "is not an artifact"),
        ("null", "is not an artifact"),
        ("[]", "is not an artifact"),
        ('{"format": 1}', "is not an artifact"),
        ('{"format": 2}', "another version"),
    ],
)
def test_a_manifest_that_cannot_be_read_makes_it_no_artifact(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("key", ["runtime", "precision"])
def test_a_manifest_of_an_unknown_engine_or_precision_is_refused(copy_of: Callable[[str], Path], key: str) -> None:
    folder = copy_of("program")
    record = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(record | {key: "nonesuch"}))
    with pytest.raises(ArtifactError, match="of another version") as error:
        open_artifact(folder)
    assert f"{key} 'nonesuch'" in error.value.why


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path, exported: tuple[Path, Signature]) -> None:
    check = MacsCheck(thop=7, dispatcher=None)
    written = replace(manifest_of(exported[1], "onnxruntime", "int8"), macs=7, macs_check=check, nonzero_params=3)
    (tmp_path / "manifest.json").write_text(json.dumps(written.to_json()))
    assert Manifest.read(tmp_path) == written


def test_a_missing_engine_is_an_error_with_its_install_line(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("program")
    with pytest.raises(ArtifactError, match="needs onnxruntime") as error:
        artifacts.open_session(folder, 1, PathPolicy(folder), device="cuda")
    assert "pip install onnxruntime-gpu" in error.value.why


def test_what_an_engine_cannot_open_is_an_error_in_its_own_words(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("program")
    (folder / "model.onnx").write_bytes(b"no program")
    manifest = Manifest.read(folder)
    files = {"model.onnx": {"bytes": 10, "sha256": artifacts.sha256(folder / "model.onnx")}}
    record = replace(manifest, files=files).to_json()
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="is damaged") as error:
        open_artifact(folder)
    assert "a field that ONNX models do not have" in error.value.why
    (folder / "manifest.json").write_text(json.dumps(sign_record("artifact", record)))
    with pytest.raises(ArtifactError, match="onnxruntime cannot open artifact") as error:
        open_artifact(folder)
    assert error.value.why


def reopened(folder: Path, project: Path, source: str) -> None:
    """Open an artifact after the user changed the file that builds its module."""
    (project / "mine.py").write_text(source)
    sys.modules.pop("mine", None)
    open_artifact(folder, threads=1)


def test_code_that_changed_since_the_run_is_found_by_its_weights_or_by_its_outputs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NETS)
    save(tmp_path / "artifact", Recipe("callable", "mine.py:Net", {}, str(tmp_path)))
    reopened(tmp_path / "artifact", tmp_path, NETS + "# a remark\n")
    for change, said in ((("width=4", "width=5"), "do not fit"), (("self.fc", "self.first"), "do not fit")):
        with pytest.raises(ArtifactError, match=said) as error:
            reopened(tmp_path / "artifact", tmp_path, NETS.replace(*change))
        assert "code changed since the run" in error.value.fix
    with pytest.raises(ArtifactError, match="does not reproduce its recorded outputs") as error:
        reopened(tmp_path / "artifact", tmp_path, NETS.replace("torch.relu(", "torch.tanh("))
    assert "to their scale" in error.value.why


def test_an_output_that_becomes_nan_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NETS)
    save(tmp_path / "artifact", Recipe("callable", "mine.py:Net", {}, str(tmp_path)))
    with pytest.raises(ArtifactError, match="does not reproduce its recorded outputs") as error:
        reopened(tmp_path / "artifact", tmp_path, NETS.replace("torch.relu(", "torch.nan * ("))
    assert "differ by nan" in error.value.why


def test_a_save_that_fails_in_the_middle_leaves_nothing(home: Path, tmp_path: Path) -> None:
    recipe = replace(recipe_for(home, "Net"), kwargs={"width": {4}})
    module = build(recipe_for(home, "Net"), PathPolicy(home))
    manifest, check = manifest_of(signature_of(module), "torch_eager", "float32"), OutputCheck(EXAMPLE, [])
    with pytest.raises(TypeError, match="not JSON serializable"):
        artifacts.save_module(tmp_path / "runs" / "artifact", module, recipe, manifest, check)
    with pytest.raises(FileNotFoundError):
        artifacts.save_program(tmp_path / "runs" / "artifact", tmp_path / "absent.onnx", manifest, check)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_copy_is_whole_and_never_written_over_what_is_there(module_artifact: Path, tmp_path: Path) -> None:
    artifacts.copy_artifact(module_artifact, tmp_path / "mine" / "small")
    assert torch.equal(open_artifact(tmp_path / "mine" / "small")(X), open_artifact(module_artifact)(X))
    other = tmp_path / "other"
    other.mkdir()
    (other / "keep.txt").touch()
    with pytest.raises(OSError, match=r"not empty|exists"):
        artifacts.copy_artifact(module_artifact, other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "other"]
    assert [path.name for path in other.iterdir()] == ["keep.txt"]


def test_an_artifact_holds_none_of_the_users_data_no_pickle_and_no_path_of_the_user_in_a_program(
    home: Path, module_artifact: Path, program_artifact: Path
) -> None:
    for folder in (module_artifact, program_artifact):
        with np.load(folder / "check.npz", allow_pickle=False) as file:
            inner = np.setdiff1d(REAL, [REAL.min(), REAL.max()])
            assert not np.isin(file["in:x"], inner).any()
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".npz", ".safetensors", ".onnx"}
    assert str(home).encode() not in b"".join(path.read_bytes() for path in program_artifact.iterdir())


def test_a_program_opens_in_a_fresh_process_that_never_imports_torch(program_artifact: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from omgoptim.models.opened_model import open_artifact\n"
        "from omgoptim.models.security.path_policy import PathPolicy\n"
        "given = np.load(sys.argv[1] + '/check.npz')\n"
        "from pathlib import Path\n"
        "model = open_artifact(Path(sys.argv[1]), PathPolicy(Path(sys.argv[1])), threads=1)\n"
        "print(float(np.abs(model(given['in:x']) - given['out:0']).max()), 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(program_artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    worst, torch_imported = done.stdout.split()
    assert float(worst) < 1e-6
    assert torch_imported == "False"


def test_a_source_that_names_an_artifact_leads_back_to_its_recipe(home: Path, module_artifact: Path) -> None:
    source = load_source("module", PathPolicy.of(home, []))
    assert source.artifact == module_artifact
    assert read_recipe(module_artifact) == recipe_for(home, "Net")


def saved_with_zeros(folder: Path, home: Path, precision: str, zeros: int) -> nn.Module:
    """A net of 1536 weights and 512 biases, of which so many weights are zero."""
    torch.manual_seed(4)
    module = build(recipe_for(home, "Net", width=512), PathPolicy(home))
    module.fc.weight.data.view(-1)[torch.randperm(1536)[:zeros]] = 0.0
    module = module if precision == "float32" else convert(module, precision)
    session = ENGINES["torch_eager"].open(
        module, signature_of_wide(module), SessionSettings(threads=1, precision=precision)
    )
    manifest = manifest_of(signature_of_wide(module), "torch_eager", precision)
    recipe = recipe_for(home, "Net", width=512)
    artifacts.save_module(folder, module, recipe, manifest, OutputCheck(EXAMPLE, session.run(EXAMPLE)))
    return module


def signature_of_wide(module: nn.Module) -> Signature:
    x = X.to(next(module.parameters()).dtype)
    named = [("x", x, False)]
    return first_forward(module, input_tensors([named]), {"x": x})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_module_with_many_zeros_is_packed_and_comes_back_bit_for_bit(
    home: Path, tmp_path: Path, precision: str
) -> None:
    from safetensors.torch import save_file

    module = saved_with_zeros(tmp_path / "artifact", home, precision, 1382)
    manifest = Manifest.read(tmp_path / "artifact")
    save_file(module.state_dict(), tmp_path / "dense.safetensors")
    packed = manifest.files["weights.safetensors"]["bytes"]
    assert manifest.dense_size_bytes == manifest.size_bytes - packed + (tmp_path / "dense.safetensors").stat().st_size
    element = 4 if precision == "float32" else 2
    saved = manifest.dense_size_bytes - manifest.size_bytes
    assert saved == pytest.approx(1382 * element - 1536 / 8, abs=128)  # a bit each; and the header of one more tensor
    assert json.loads((tmp_path / "artifact" / "recipe.json").read_text())["packed"] == {"fc.weight": [512, 3]}
    opened, session = artifacts.open_session(tmp_path / "artifact", 1, PathPolicy(home))
    assert verify_outputs(tmp_path / "artifact", opened, session) == [0.0]
    again = artifacts.load_module(tmp_path / "artifact", manifest, PathPolicy(home)).state_dict()
    assert again.keys() == module.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize("zeros", [0, 85])
def test_what_packing_would_hardly_make_smaller_is_saved_dense(home: Path, tmp_path: Path, zeros: int) -> None:
    saved_with_zeros(tmp_path / "artifact", home, "float32", zeros)
    assert Manifest.read(tmp_path / "artifact").dense_size_bytes is None
    assert json.loads((tmp_path / "artifact" / "recipe.json").read_text())["packed"] == {}


def test_an_artifact_from_before_packing_and_sealing_opens_where_it_is_trusted(
    home: Path, copy_of: Callable[[str], Path]
) -> None:
    folder = copy_of("module")
    recipe = json.loads((folder / "recipe.json").read_text())
    del recipe["packed"]
    recipe["recipe"]["allowed"] = ["/"]
    (folder / "recipe.json").write_text(json.dumps(recipe, indent=1))
    written = json.loads((folder / "manifest.json").read_text())
    del written["dense_size_bytes"], written["origin"], written["files"]["check.npz"]
    size, digest = (folder / "recipe.json").stat().st_size, artifacts.sha256(folder / "recipe.json")
    written["files"]["recipe.json"] = {"bytes": size, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(written))
    assert Manifest.read(folder).dense_size_bytes is None
    opened.open_artifact(folder, PathPolicy(home, trusted=True), threads=1)
