from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from omgoptim.errors import ModelError, RequestError, SetupError, UserCodeError
from omgoptim.models.manifest import MANIFEST, Manifest
from omgoptim.models.recipe import Recipe
from omgoptim.models.security.file_integrity import sign_record
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import build, default_inputs, find_artifact, load_source
from omgoptim.models.structural_diff import StructuralDiff
from omgoptim.runtimes.signature import Signature

Write = Callable[..., Path]


def module_of(model: str, policy: PathPolicy, **options: object) -> nn.Module:
    module = load_source(model, policy, **options).module  # type: ignore[arg-type]
    assert module is not None
    return module


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", ["net.py:Net", "net.py:build", "net.py:net", "pkg.net:Net", "pkg.net:build"])
def test_a_class_a_function_and_an_instance_each_give_a_module_in_eval_mode(
    write: Write, policy: PathPolicy, model: str
) -> None:
    write("net.py")
    write("pkg/net.py")
    write("pkg/__init__.py", "")
    module = module_of(model, policy)
    assert type(module).__name__ == "Net"
    assert not any(layer.training for layer in module.modules())


def test_lazy_layers_without_sizes_are_refused_with_the_way_out(write: Write, policy: PathPolicy) -> None:
    text = "import torch\nfrom torch import nn\ndef lazy():\n    return nn.Sequential(nn.LazyLinear(3))\n"
    write("lazy.py", text + "def ready():\n    net = lazy()\n    net(torch.zeros(2, 4))\n    return net\n")
    with pytest.raises(ModelError, match="uninitialized lazy layers") as error:
        load_source("lazy.py:lazy", policy)
    assert "0.weight" in error.value.why
    assert "lazy.py:lazy" in error.value.fix
    assert type(module_of("lazy.py:ready", policy)[0]) is nn.Linear  # type: ignore[index]


def test_keyword_arguments_reach_the_callable_and_an_instance_takes_none(write: Write, policy: PathPolicy) -> None:
    write("net.py")
    for model in ("net.py:Net", "net.py:build"):
        assert module_of(model, policy, kwargs={"width": 7}).fc.out_features == 7  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="net is a module, not a callable"):
        load_source("net.py:net", policy, kwargs={"width": 7})
    with pytest.raises(ModelError, match=r"build\(width=4\): got an unexpected keyword argument 'depth'"):
        load_source("net.py:build", policy, kwargs={"depth": 7})


def test_a_source_carries_the_recipe_that_builds_it_again(write: Write, policy: PathPolicy) -> None:
    write("net.py")
    source = load_source("net.py:Net", policy, kwargs={"width": 7}, limit_s=9)
    assert source.recipe is not None
    again = Recipe.from_json(json.loads(json.dumps(source.recipe.to_json())))
    assert again == source.recipe
    assert again.limit_s == 9
    assert build(again, policy).fc.out_features == 7  # type: ignore[union-attr]
    diff = StructuralDiff(shapes={"fc.weight": [3, 7]})
    older = source.recipe.to_json()
    older["surgery"] = older.pop("structural_diff") or diff.to_json()  # the key of older artifacts
    assert Recipe.from_json(older) == replace(source.recipe, structural_diff=diff)


def test_an_instance_that_is_built_twice_is_two_objects_with_the_same_weights(write: Write, policy: PathPolicy) -> None:
    write("net.py")
    write("cached.py", "from net import Net\nNET = Net()\ndef build(): return NET\n")
    for model in ("net.py:net", "cached.py:build"):
        first, second = (module_of(model, policy) for _ in range(2))
        assert same(first, second)
        second.to(torch.bfloat16)
        assert first.fc.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_a_checkpoint_fills_the_module_and_what_was_understood_is_noted(write: Write, policy: PathPolicy) -> None:
    write("net.py")
    torch.manual_seed(5)
    wanted = module_of("net.py:Net", policy)
    torch.save({"state_dict": wanted.state_dict()}, policy.project / "w.pt")
    source = load_source("net.py:Net", policy, checkpoint="w.pt")
    assert source.module is not None
    assert same(source.module, wanted)
    assert source.notes == ["checkpoint w.pt: the weights were under 'state_dict'"]
    with pytest.raises(ModelError, match=r"checkpoint 'v\.pt' does not exist"):
        load_source("net.py:Net", policy, checkpoint="v.pt")
    with pytest.raises(RequestError, match="outside"):
        load_source("net.py:Net", policy, checkpoint="../w.pt")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("net.py:number", "'net.py:number' is a int"),
        ("net.py:make", "make returned a dict, not a torch.nn.Module"),
        ("net.py:nothing", "nothing returned a NoneType"),
        ("net.py:absent", "has no 'absent'"),
        ("missing.py:build", "does not exist"),
        ("no_such_package.net:build", "there is no module"),
        ("net.py", "is not a model"),
        ("net.py:", "is not a model"),
        ("missing.onnx", "does not exist"),
        ("missing.pt2", "does not exist"),
        ("20990101-000000-quantize", "is not a model"),
        ("hf:./missing", "does not exist"),
        ("x" * 5000, "is not a model"),
        ("~nobody-of-that-name", "is not a model"),
    ],
)
def test_what_names_no_module_is_an_error_of_its_own(write: Write, policy: PathPolicy, model: str, said: str) -> None:
    write("net.py", "number = 3\ndef make(): return {}\ndef nothing(): pass\n")
    with pytest.raises(ModelError, match=said.replace(".", r"\.")):
        load_source(model, policy)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.bin", "model.ckpt", "model.pkl"])
def test_a_pickled_module_is_refused_unopened_with_the_way_out(policy: PathPolicy, name: str) -> None:
    (policy.project / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ModelError, match="is a pickle") as error:
        load_source(name, policy)
    assert f"`checkpoint='{name}'`" in error.value.fix
    assert "torch.export.save" in error.value.fix


def test_every_source_outside_the_project_is_refused(write: Write, policy: PathPolicy, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "artifact").mkdir(parents=True)
    for name in ("net.py", "m.onnx", "m.pt2"):
        (outside / name).touch()
    (outside / "artifact" / MANIFEST).write_text("{}")
    sources = [f"{outside}/net.py:Net", "../outside/m.onnx", f"{outside}/m.pt2", "../outside/artifact", f"hf:{outside}"]
    for model in sources:
        with pytest.raises(RequestError, match="outside the project"):
            load_source(model, policy)
    write("../outside/net.py")
    assert load_source(f"{outside}/net.py:Net", PathPolicy.of(policy.project, [str(outside)])).module is not None


def test_an_artifact_is_found_by_its_folder_and_by_its_run(policy: PathPolicy) -> None:
    run = policy.project / ".omgoptim" / "runs" / "run-1" / "artifact"
    for folder in (run, policy.project / "small"):
        folder.mkdir(parents=True)
        manifest = Manifest("onnxruntime", "float32", Signature((), "tensor"))
        (folder / MANIFEST).write_text(json.dumps(sign_record("artifact", manifest.to_json())))
    assert load_source("run-1", policy).artifact == find_artifact("run-1", policy) == run
    assert load_source("small", policy).artifact == load_source("./small", policy).artifact == policy.project / "small"


def test_a_run_without_an_artifact_is_an_error_with_its_end_and_a_plain_folder_with_what_it_lacks(
    policy: PathPolicy,
) -> None:
    run = policy.project / ".omgoptim" / "runs" / "run-1"
    run.mkdir(parents=True)
    with pytest.raises(ModelError, match="run 'run-1' has no artifact") as error:
        load_source("run-1", policy)
    assert error.value.why == "it has not finished"
    (run / "state.json").write_text('{"status": "failed"}')
    with pytest.raises(ModelError) as error:
        load_source("run-1", policy)
    assert error.value.why == "its status is failed"
    (policy.project / "bert").mkdir()
    with pytest.raises(ModelError, match=r"is not an artifact") as error:
        load_source("bert", policy)
    assert "hf:" in error.value.fix


def test_a_pt2_file_gives_its_module_and_takes_neither_weights_nor_arguments(write: Write, policy: PathPolicy) -> None:
    write("net.py")
    net = module_of("net.py:Net", policy)
    torch.export.save(torch.export.export(net, (torch.ones(2, 3),)), policy.project / "net.pt2")
    source = load_source("net.pt2", policy)
    assert source.module is not None
    assert torch.equal(source.module(torch.ones(2, 3)), net(torch.ones(2, 3)))
    torch.save(net.state_dict(), policy.project / "w.pt")
    (policy.project / "net.onnx").touch()
    assert load_source("net.onnx", policy).program == policy.project / "net.onnx"
    for model in ("net.pt2", "net.onnx"):
        with pytest.raises(ModelError, match="already contains its weights"):
            load_source(model, policy, checkpoint="w.pt")
        with pytest.raises(ModelError, match="already contains its weights"):
            load_source(model, policy, kwargs={"width": 3})


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_pt2_file_cannot_be_opened(policy: PathPolicy) -> None:
    (policy.project / "net.pt2").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ModelError, match=r"net\.pt2 cannot be opened"):
        load_source("net.pt2", policy)


@pytest.mark.parametrize(("prefix", "package", "extra"), [("timm", "timm", "timm"), ("torchvision",) * 2 + ("vision",)])
def test_a_missing_library_is_an_error_with_its_install_line(
    policy: PathPolicy, prefix: str, package: str, extra: str
) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(SetupError, match=f"needs {package}") as error:
        load_source(f"{prefix}:resnet18", policy)
    assert error.value.fix == f'{sys.executable} -m pip install "omgoptim[{extra}]"'


STUB_TIMM = """
from torch import nn

def create_model(name, pretrained=False, **options):
    if name == 'broken':
        raise RuntimeError('Unknown model (broken)')
    model = nn.Linear(3, 2)
    model.asked = (name, pretrained, options)
    model.default_cfg = {'input_size': (3, 160, 160)}
    return model
"""


@pytest.mark.skipif(find_spec("timm") is not None, reason="the real one is installed")
def test_timm_is_asked_for_trained_weights_unless_a_checkpoint_brings_them(
    write: Write, policy: PathPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("timm.py", STUB_TIMM)
    monkeypatch.syspath_prepend(policy.project)
    source = load_source("timm:resnet18", policy, kwargs={"num_classes": 2})
    assert source.module is not None
    assert source.module.asked == ("resnet18", True, {"num_classes": 2})
    assert default_inputs(source.recipe, source.module) == ["1x3x160x160"]
    torch.save(source.module.state_dict(), policy.project / "w.pt")
    assert module_of("timm:resnet18", policy, checkpoint="w.pt").asked == ("resnet18", False, {})
    with pytest.raises(UserCodeError, match="loading broken with timm") as error:
        load_source("timm:broken", policy)
    assert "Unknown model" in error.value.why


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="the real one is installed")
def test_torchvision_gives_its_default_weights_and_a_broken_install_is_an_error(
    write: Write, policy: PathPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = "from torch import nn\ndef get_model(name, weights):\n    net = nn.Linear(3, 2)\n    net.asked = weights\n"
    write("torchvision/__init__.py", "from . import models\n")
    write("torchvision/models.py", models + "    return net\n")
    monkeypatch.syspath_prepend(policy.project)
    source = load_source("torchvision:resnet18", policy)
    assert source.module is not None
    assert source.module.asked == "DEFAULT"
    assert default_inputs(source.recipe, source.module) == ["1x3x224x224"]
    sys.modules.pop("torchvision")
    write("torchvision/__init__.py", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    with pytest.raises(SetupError, match="torchvision is installed but cannot be imported") as error:
        load_source("torchvision:resnet18", policy)
    assert "nms" in error.value.why


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a tiny BERT classifier and a tiny GPT-2, saved as Hugging Face saves them."""
    folder = tmp_path_factory.mktemp("hugging")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=40)
        transformers.BertForSequenceClassification(config).save_pretrained(folder / "bert")
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        config = transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=300, **ids)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt")
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_hugging_face_folder_gives_the_class_it_was_saved_from(hugging_face: Path) -> None:
    source = load_source("hf:bert", PathPolicy.of(hugging_face, []))
    assert type(source.module).__name__ == "BertForSequenceClassification"
    assert default_inputs(source.recipe, source.module) == ["input_ids:int64:1x40", "attention_mask:int64:1x40"]
    assert source.recipe is not None
    assert same(build(source.recipe, PathPolicy.of(hugging_face, [])), source.module)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_gives_its_logits_and_no_cache(hugging_face: Path) -> None:
    source = load_source(f"hf:{hugging_face / 'gpt'}", PathPolicy.of(hugging_face, []))
    assert source.module is not None
    assert default_inputs(source.recipe, source.module)[0] == "input_ids:int64:1x128"
    assert list(source.module(input_ids=torch.zeros(1, 4, dtype=torch.int64))) == ["logits"]


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_transformers_cannot_read_is_an_error_with_its_message(hugging_face: Path) -> None:
    (hugging_face / "empty").mkdir()
    with pytest.raises(UserCodeError, match=r"loading .*empty with transformers"):
        load_source("hf:empty", PathPolicy.of(hugging_face, []))


def test_nothing_is_assumed_of_a_models_inputs_where_its_source_implies_none(write: Write, policy: PathPolicy) -> None:
    write("net.py")
    source = load_source("net.py:Net", policy)
    assert source.recipe is not None
    assert default_inputs(source.recipe, source.module) == default_inputs(None, None) == []
    assert default_inputs(replace(source.recipe, kind="hf"), source.module) == []
