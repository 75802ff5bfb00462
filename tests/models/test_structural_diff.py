from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from omgoptim.blocks.low_rank import LowRankLinear
from omgoptim.errors import ArtifactError, TechniqueError
from omgoptim.models.structural_diff import StructuralDiff, apply_diff, compute_diff
from omgoptim.runtimes.torch_precision import load_state, state_of


def shrink(layer: nn.Module, name: str, keep: int, axis: int = 0) -> None:
    """Cut one tensor of a layer by hand."""
    tensor = getattr(layer, name)
    cut = tensor.detach().narrow(axis, 0, keep).clone()
    setattr(layer, name, nn.Parameter(cut) if isinstance(tensor, nn.Parameter) else cut)


def shrink_conv(conv: nn.Conv2d, out: int | None = None, inputs: int | None = None) -> None:
    if out:
        shrink(conv, "weight", out)
        conv.out_channels = out
        if conv.bias is not None:
            shrink(conv, "bias", out)
    if inputs:
        shrink(conv, "weight", inputs, 1)
        conv.in_channels = inputs


def shrink_linear(linear: nn.Linear, out: int | None = None, inputs: int | None = None) -> None:
    if out:
        shrink(linear, "weight", out)
        shrink(linear, "bias", out)
        linear.out_features = out
    if inputs:
        shrink(linear, "weight", inputs, 1)
        linear.in_features = inputs


def shrink_norm(norm: nn.Module, keep: int, number: str, value: object) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(norm, name, None) is not None:
            shrink(norm, name, keep)
    setattr(norm, number, value)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.stem(x)))
        return self.head((x + self.inner(x)).mean((2, 3)))

    def cut(self) -> None:
        self.cut_body()
        shrink_linear(self.head, inputs=5)

    def cut_body(self) -> None:
        shrink_conv(self.stem, 5)
        shrink_norm(self.bn1, 5, "num_features", 5)
        shrink_conv(self.inner, 5, 5)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, groups=8)
        self.norm = nn.GroupNorm(4, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.deep(self.expand(x))))

    def cut(self) -> None:
        shrink_conv(self.expand, 4)
        shrink_conv(self.deep, 4)
        self.deep.groups = self.deep.in_channels = 4
        shrink_norm(self.norm, 4, "num_channels", 4)
        shrink_conv(self.head, inputs=4)


class Attention(nn.Module):
    """As users write it: the sizes that its reshape needs are attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.sizes = [12, 12]
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(split[0], split[1], split[2])
        return self.proj(attended.transpose(1, 2).reshape(batch, length, self.sizes[0]))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 4, 12))
        self.attention = Attention()
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(x + self.attention(x)).mean(1))

    def cut(self) -> None:
        attention = self.attention
        kept = torch.arange(36).reshape(3, 4, 3)[:, :2].flatten()
        attention.qkv.weight = nn.Parameter(attention.qkv.weight.detach()[kept])
        attention.qkv.bias = nn.Parameter(attention.qkv.bias.detach()[kept])
        attention.qkv.out_features = 18
        attention.num_heads, attention.sizes = 2, [6, 6]
        shrink_linear(attention.proj, inputs=6)


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out

    def cut(self) -> None:
        shrink_linear(self.layer.linear1, 6)
        shrink_linear(self.layer.linear2, inputs=6)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.embedding(x)))

    def cut(self) -> None:
        shrink(self.embedding, "weight", 6, 1)
        self.out.weight = self.embedding.weight
        self.embedding.embedding_dim = self.out.in_features = 6
        shrink_norm(self.norm, 6, "normalized_shape", (6,))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.back = nn.Linear(6, 4)
        self.again = nn.ModuleList([self.first, self.back])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.back, *self.again):
            x = layer(x)
        return x

    def cut(self) -> None:
        shrink_linear(self.first, 3)
        shrink_linear(self.back, inputs=3)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.project(x))[0][:, -1])

    def cut(self) -> None:
        shrink_linear(self.project, 3)
        shrink(self.lstm, "weight_ih_l0", 3, 1)
        self.lstm.input_size = 3


IMAGES, STEPS, TOKENS = torch.randn(2, 3, 8, 8), torch.randn(2, 7, 5), torch.arange(10).reshape(2, 5)
CASES: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (Residual, IMAGES),
    (Depthwise, IMAGES),
    (Vit, IMAGES),
    (Multihead, torch.randn(2, 5, 8)),
    (Tied, TOKENS),
    (Shared, torch.randn(2, 4)),
    (Recurrent, STEPS),
]


def reopened(fresh: nn.Module, changed: nn.Module) -> nn.Module:
    """Rebuild a module as an artifact does: the record through JSON, a fresh module, the saved state."""
    diff = compute_diff(fresh, changed)
    assert diff is not None
    apply_diff(fresh, StructuralDiff.from_json(json.loads(json.dumps(diff.to_json()))))
    load_state(fresh, {name: tensor.clone() for name, tensor in state_of(changed).items()})
    return fresh


@pytest.mark.parametrize(("build", "x"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_a_changed_module_comes_back_bit_for_bit(build: Callable[[], nn.Module], x: Tensor) -> None:
    changed, fresh = build().eval(), build().eval()
    changed.cut()  # type: ignore[operator]
    assert sum(p.numel() for p in changed.parameters()) < sum(p.numel() for p in fresh.parameters())
    back = reopened(fresh, changed)
    assert torch.equal(back(x), changed(x))
    assert compute_diff(back, changed) is None


def test_what_shared_a_tensor_shares_the_new_one() -> None:
    changed, fresh = Tied(), Tied()
    changed.cut()
    back = reopened(fresh, changed)
    assert back.embedding.weight is back.out.weight
    assert back.embedding.weight.shape == (20, 6)


def test_a_frozen_parameter_of_another_shape_stays_frozen_and_keeps_its_dtype() -> None:
    changed, fresh = Residual(), Residual()
    changed.cut()
    fresh.bfloat16().inner.weight.requires_grad_(False)
    diff = compute_diff(fresh, changed)
    assert diff is not None
    apply_diff(fresh, diff)
    assert not fresh.inner.weight.requires_grad
    assert fresh.inner.weight.dtype is torch.bfloat16
    assert fresh.stem.weight.requires_grad


def test_only_what_changed_is_recorded() -> None:
    fresh, changed = Residual(), Residual()
    assert compute_diff(fresh, changed) is None
    changed.cut()
    diff = compute_diff(fresh, changed)
    assert diff is not None
    assert diff.attributes == {
        "stem": {"out_channels": 5},
        "bn1": {"num_features": 5},
        "inner": {"out_channels": 5, "in_channels": 5},
        "head": {"in_features": 5},
    }
    assert diff.shapes["inner.weight"] == [5, 5, 3, 3]
    assert set(diff.shapes) >= {"stem.weight", "bn1.running_mean", "inner.bias", "head.weight"}
    assert "head.bias" not in diff.shapes
    assert diff.blocks == {}


def test_a_layer_that_got_a_bias_gets_it_again() -> None:
    fresh = nn.Sequential(nn.Linear(3, 2, bias=False))
    changed = copy.deepcopy(fresh)
    changed[0].bias = nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.randn(4, 3)
    assert torch.equal(reopened(fresh, changed)(x), changed(x))


def low_rank(layer: nn.Linear, rank: int) -> LowRankLinear:
    return LowRankLinear.like(layer, rank)


def test_a_block_in_place_of_a_layer_comes_back_whatever_was_cut_in_it_later() -> None:
    fresh, changed = Residual(), Residual()
    changed.head = low_rank(changed.head, 3)  # type: ignore[assignment]
    changed.cut_body()
    shrink_linear(changed.head.a, inputs=5)  # type: ignore[arg-type]
    changed.head.in_features = 5
    diff = compute_diff(fresh, changed)
    assert diff is not None
    assert diff.blocks == {
        "head": {"kind": "LowRankLinear", "in_features": 5, "out_features": 4, "rank": 3, "bias": True}
    }
    back = reopened(fresh, changed)
    assert torch.equal(back.eval()(IMAGES), changed.eval()(IMAGES))


def test_a_block_shared_under_two_paths_stays_one() -> None:
    fresh, changed = Shared(), Shared()
    changed.first = changed.again[0] = low_rank(changed.first, 2)  # type: ignore[assignment]
    x = torch.randn(2, 4)
    back = reopened(fresh, changed)
    assert back.first is back.again[0]
    assert torch.equal(back(x), changed(x))


def test_a_block_in_half_precision_is_built_in_the_precision_of_the_layer_before() -> None:
    fresh, changed = Residual(), Residual()
    changed.head = low_rank(changed.head, 2)  # type: ignore[assignment]
    diff = compute_diff(fresh, changed)
    assert diff is not None
    apply_diff(fresh.bfloat16(), diff)
    assert {p.dtype for p in fresh.head.parameters()} == {torch.bfloat16}


def test_a_layer_of_another_class_is_refused_by_its_path() -> None:
    changed = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    with pytest.raises(TechniqueError) as refused:
        compute_diff(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), changed)
    assert "'1'" in refused.value.why
    assert "ReLU became Tanh" in refused.value.why


@pytest.mark.parametrize("added", [True, False])
def test_a_layer_that_only_one_of_them_has_is_refused_by_its_path(added: bool) -> None:
    short, long = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(TechniqueError) as refused:
        compute_diff(short, long) if added else compute_diff(long, short)
    assert "'1'" in refused.value.why


def test_a_tie_that_was_cut_is_refused() -> None:
    changed = Tied()
    changed.out.weight = nn.Parameter(changed.out.weight.detach().clone())
    with pytest.raises(TechniqueError, match="cannot be saved") as refused:
        compute_diff(Tied(), changed)
    assert "'out.weight'" in refused.value.why


def test_a_buffer_that_no_file_holds_is_refused_when_its_shape_changed() -> None:
    def build(width: int) -> nn.Module:
        module = nn.Module()
        module.register_buffer("scale", torch.ones(width), persistent=False)
        return module

    with pytest.raises(TechniqueError) as refused:
        compute_diff(build(3), build(2))
    assert "persistent=False" in refused.value.why


@pytest.mark.parametrize(
    "diff",
    [
        StructuralDiff(attributes={"gone": {"width": 2}}),
        StructuralDiff(shapes={"gone.weight": [2, 2]}),
        StructuralDiff(shapes={"0.gone": [2]}),
        StructuralDiff(blocks={"0": {"kind": "NoSuchBlock"}}),
        StructuralDiff(blocks={"0": {"kind": "LowRankLinear", "in_features": 2, "out_features": 2, "rank": 5}}),
        StructuralDiff(blocks={"gone": {"kind": "LowRankLinear", "in_features": 2, "out_features": 2, "rank": 1}}),
    ],
)
def test_a_diff_for_another_module_is_an_artifact_error(diff: StructuralDiff) -> None:
    with pytest.raises(ArtifactError):
        apply_diff(nn.Sequential(nn.Linear(2, 2)), diff)


def test_names_of_one_tensor_with_two_shapes_are_refused() -> None:
    with pytest.raises(ArtifactError) as refused:
        apply_diff(Tied(), StructuralDiff(shapes={"embedding.weight": [20, 6], "out.weight": [20, 5]}))
    assert "out.weight" in refused.value.why


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"attributes": {}, "blocks": {}, "shapes": {}, "code": "x"},
        {"attributes": [], "blocks": {}, "shapes": {}},
        {"attributes": {"a": {"n": "__import__"}}, "blocks": {}, "shapes": {}},
        {"attributes": {}, "blocks": {"a": {"rank": 2}}, "shapes": {}},
        {"attributes": {}, "blocks": {"a": {"kind": 3}}, "shapes": {}},
        {"attributes": {}, "blocks": {}, "shapes": {"a": [2, -1]}},
        {"attributes": {}, "blocks": {}, "shapes": {"a": 4}},
    ],
)
def test_what_is_no_diff_is_refused_when_it_is_read(written: dict[str, object]) -> None:
    with pytest.raises(ArtifactError):
        StructuralDiff.from_json(written)
