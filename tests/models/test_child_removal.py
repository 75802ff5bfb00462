from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omgoptim.blocks.low_rank import LowRankLinear
from omgoptim.errors import ArtifactError, TechniqueError
from omgoptim.models.artifact import load_module, save_module
from omgoptim.models.child_removal import keep_children
from omgoptim.models.forward import first_forward, input_tensors, name_inputs
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.models.recipe import Recipe
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.models.source import build
from omgoptim.models.structural_diff import StructuralDiff, apply_diff, compute_diff
from omgoptim.runtimes.torch_precision import load_state, state_of


class Stack(nn.Module):
    """A list that its own code counts, and a tie between two of its layers."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.num_layers, self.width = layers, 4
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.layers[4].weight = self.layers[0].weight
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.num_layers):
            x = x + torch.tanh(self.layers[index](x))
        return self.out(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(3, 3) for _ in range(4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x = torch.tanh(layer(x))
        return x


def reopened(fresh: nn.Module, changed: nn.Module) -> nn.Module:
    diff = compute_diff(fresh, changed)
    assert diff is not None
    apply_diff(fresh, StructuralDiff.from_json(json.loads(json.dumps(diff.to_json()))))
    load_state(fresh, {name: tensor.clone() for name, tensor in state_of(changed).items()})
    return fresh


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def test_a_stack_runs_the_layers_that_it_kept_and_comes_back_bit_for_bit() -> None:
    whole = Stack()
    changed = copy.deepcopy(whole)
    keep_children(changed, "layers", [0, 2, 4])
    keep_children(changed, "out", [0, 1, 3])
    assert changed.num_layers == 3
    x = X
    for index in (0, 2, 4):
        x = x + torch.tanh(whole.layers[index](x))
    assert torch.equal(changed(X), whole.out[3](whole.out[1](torch.relu(x))))
    fresh = Stack()
    back = reopened(fresh, changed)
    assert torch.equal(back(X), changed(X))
    assert back.layers[0].weight is back.layers[2].weight
    assert compute_diff(back, changed) is None


def test_two_removals_are_recorded_against_the_stack_as_its_code_builds_it() -> None:
    fresh, changed = Stack(), Stack()
    keep_children(changed, "layers", [0, 2, 3, 4])
    halfway = copy.deepcopy(changed)
    keep_children(changed, "layers", [1, 3])
    diff = compute_diff(fresh, changed)
    assert diff == StructuralDiff(kept={"layers": [2, 4]})
    again = compute_diff(halfway, changed)
    assert again == StructuralDiff(kept={"layers": [1, 3]})
    assert len(halfway.layers) == 4
    for start in (fresh, halfway):
        assert torch.equal(reopened(start, changed)(X), changed(X))


def test_nested_stacks_are_recorded_outermost_first() -> None:
    fresh, changed = Nested(), Nested()
    keep_children(changed, "stages.2", [1, 2])
    keep_children(changed, "stages", [0, 2])
    diff = compute_diff(fresh, changed)
    assert diff is not None
    assert list(diff.kept.items()) == [("stages", [0, 2]), ("stages.1", [1, 2])]
    x = torch.randn(2, 3)
    assert torch.equal(reopened(fresh, changed)(x), changed(x))


def test_blocks_and_widths_in_layers_that_stayed_go_by_their_new_numbers() -> None:
    fresh, changed = Stack(), Stack()
    keep_children(changed, "layers", [1, 3])
    changed.layers[1] = LowRankLinear.like(changed.layers[1], 1)  # type: ignore[arg-type]
    diff = compute_diff(fresh, changed)
    assert diff is not None
    assert list(diff.blocks) == ["layers.1"]
    assert torch.equal(reopened(fresh, changed)(X), changed(X))


def test_recording_touches_neither_module() -> None:
    fresh, changed = Stack(), Stack()
    keep_children(changed, "layers", [0, 1])
    before = [(name, tensor, tensor.clone()) for name, tensor in fresh.named_parameters(remove_duplicate=False)]
    compute_diff(fresh, changed)
    assert fresh.num_layers == len(fresh.layers) == 5
    now = dict(fresh.named_parameters(remove_duplicate=False))
    assert all(now[name] is tensor and torch.equal(tensor, values) for name, tensor, values in before)


def test_children_with_names_of_their_own_keep_them() -> None:
    changed = nn.Sequential()
    for name in ("one", "two", "three"):
        changed.add_module(name, nn.Linear(2, 2))
    fresh = copy.deepcopy(changed)
    holder, whole = nn.Sequential(changed), nn.Sequential(fresh)
    keep_children(holder, "0", [0, 2])
    assert list(changed._modules) == ["one", "three"]
    x = torch.randn(1, 2)
    assert torch.equal(reopened(whole, holder)(x), holder(x))


def test_a_configuration_that_several_models_hold_is_copied_before_it_follows() -> None:
    config = SimpleNamespace(n_layer=5, hidden=5, layer_types=list("abcde"), decoder_layers=5)

    def build() -> nn.Module:
        module = nn.Module()
        module.config = config
        module.encoder = Stack()
        module.encoder.config = config
        return module

    module = build()
    keep_children(module, "encoder.layers", [0, 4])
    assert config.n_layer == 5
    assert module.config is module.encoder.config
    assert vars(module.config) == {"n_layer": 2, "hidden": 5, "layer_types": ["a", "e"], "decoder_layers": 5}
    assert module.encoder.num_layers == 2
    assert module.encoder.width == 4


@pytest.mark.parametrize("indices", [[], [1, 0], [0, 0], [0, 5], [-1]])
def test_indices_that_are_not_ascending_numbers_of_children_are_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="has 5 layers"):
        keep_children(Stack(), "layers", indices)


def test_only_lists_and_sequences_lose_children() -> None:
    with pytest.raises(ValueError, match="is a Linear"):
        keep_children(Stack(), "layers.0", [0])


@pytest.mark.parametrize(
    "kept", [{"gone": [0]}, {"layers": [0, 7]}, {"layers": []}, {"num_layers": [0]}, {"layers.0": [0]}]
)
def test_keeping_what_another_module_has_not_is_an_artifact_error(kept: dict[str, list[int]]) -> None:
    with pytest.raises(ArtifactError, match="no longer builds"):
        apply_diff(Stack(), StructuralDiff(kept=kept))


def test_layers_that_the_built_module_has_not_are_refused_by_their_path() -> None:
    changed = Stack(7)
    keep_children(changed, "layers", [0, 6])
    with pytest.raises(TechniqueError) as refused:
        compute_diff(Stack(5), changed)
    assert "'layers'" in refused.value.why


def test_a_recipe_written_before_layers_could_go_is_still_read() -> None:
    old = {"attributes": {"0": {"out_features": 1}}, "blocks": {}, "shapes": {"0.weight": [1, 2]}}
    assert StructuralDiff.from_json(old).kept == {}
    with pytest.raises(ArtifactError, match="structural changes of the artifact cannot be read"):
        StructuralDiff.from_json(old | {"kept": {"layers": ["0"]}})


# Real architectures


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 4)


def transformer(kind: str, configuration: str, **sizes: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, configuration)(vocab_size=40, bos_token_id=0, eos_token_id=1, **sizes)
        config.use_cache = False
        module: nn.Module = getattr(transformers, kind)(config)
        return module

    return make


SIZES = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "TransformerEncoder": (encoder, "layers", "num_layers"),
    "Bert": (transformer("BertModel", "BertConfig", **SIZES), "encoder.layer", "config.num_hidden_layers"),
    "DistilBert": (
        transformer("DistilBertModel", "DistilBertConfig", dim=8, n_layers=4, n_heads=2, hidden_dim=16),
        "transformer.layer",
        "transformer.n_layers",
    ),
    "GPT2": (
        transformer("GPT2LMHeadModel", "GPT2Config", n_embd=8, n_layer=4, n_head=2),
        "transformer.h",
        "config.n_layer",
    ),
    "Llama": (transformer("LlamaForCausalLM", "LlamaConfig", **SIZES), "model.layers", "config.num_hidden_layers"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_transformer_of_fewer_layers_counts_them_runs_and_comes_back(name: str) -> None:
    make, path, count = ARCHITECTURES[name]
    torch.manual_seed(0)
    fresh, changed = make().eval(), make().eval()
    whole = copy.deepcopy(changed)
    keep_children(changed, path, [0, 3])
    owner, _, attribute = count.rpartition(".")
    holder = changed.config if owner == "config" else changed.get_submodule(owner)
    assert getattr(holder, attribute) == 2
    x = torch.randn(2, 5, 8) if name == "TransformerEncoder" else torch.arange(10).view(2, 5)
    called = []
    for index in (0, 3):
        whole.get_submodule(f"{path}.{index}").register_forward_hook(lambda layer, *_: called.append(layer))
    with torch.no_grad():
        small, back, large = (first(module(x)) for module in (changed, reopened(fresh, changed), whole))
    assert torch.equal(small, back)
    assert not torch.allclose(small, large)
    parts = [vars(part)["layer_idx"] for part in changed.modules() if "layer_idx" in vars(part)]
    assert parts in ([], [0, 1])


def first(outputs: Any) -> Tensor:
    tensor: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return tensor


MODEL = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(self.blocks(self.embedding(x)))
"""


def test_an_artifact_of_fewer_layers_opens_with_its_ties(tmp_path: Path) -> None:
    (tmp_path / "tied_stack.py").write_text(MODEL)
    recipe = Recipe("callable", "tied_stack.py:Tied", {}, str(tmp_path))
    module = build(recipe, PathPolicy(tmp_path))
    keep_children(module, "blocks", [0, 2, 5])
    x = torch.arange(6).view(2, 3)
    named = name_inputs(module, x)
    signature = first_forward(module, input_tensors([named]), {name: tensor for name, tensor, _ in named})
    changed = Recipe(
        "callable",
        recipe.spec,
        {},
        str(tmp_path),
        structural_diff=compute_diff(build(recipe, PathPolicy(tmp_path)), module),
    )
    manifest = Manifest("torch_eager", "float32", signature)
    with torch.no_grad():
        expected = module(x)
    save_module(tmp_path / "artifact", module, changed, manifest, OutputCheck({"x": x.numpy()}, [expected.numpy()]))
    opened = load_module(tmp_path / "artifact", Manifest.read(tmp_path / "artifact"), PathPolicy(tmp_path))
    assert list(opened.blocks._modules) == ["0", "1", "2"]
    assert opened.out.weight is opened.embedding.weight
    with torch.no_grad():
        assert torch.equal(opened(x), expected)
