"""Pairing of student layers with teacher layers, those of attentions by their names."""

from __future__ import annotations

import pytest
import torch
from learning_pairs import Conv, Encoder, images, made, sentences, traced
from small_training import net
from torch import Tensor, nn

from omgoptim.errors import RequestError, TechniqueError
from omgoptim.training._distillation.layer_pairing import Pair, attention_of, evenly, infer_pairs, pairs_of


def paths(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(one.path, other.path) for one, other in pairs]


def test_layers_are_spread_evenly_so_that_the_last_ones_meet() -> None:
    assert [evenly(i, 3, 6) for i in range(3)] == [1, 3, 5]
    assert [evenly(i, 2, 6) for i in range(2)] == [2, 5]
    assert [evenly(i, 4, 6) for i in range(4)] == [1, 2, 4, 5]
    assert [evenly(i, 6, 6) for i in range(6)] == list(range(6))
    assert [evenly(i, 4, 2) for i in range(4)] == [0, 0, 1, 1]


def test_the_ends_of_stages_are_paired_by_path_and_size_of_map() -> None:
    student, teacher = traced(made(Conv, 0), images()), traced(made(Conv, 1, width=8, depth=2), images())
    assert paths(infer_pairs(student, teacher)) == [("stage1", "stage1"), ("stage2", "stage2")]


def test_stages_of_other_names_are_paired_by_size_and_of_other_sizes_in_their_order() -> None:
    student = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip
    teacher = traced(made(Conv, 1), images())
    assert paths(infer_pairs(traced(student, images()), teacher)) == [("1", "stage1"), ("3", "stage2")]
    coarse = nn.Sequential(nn.Conv2d(1, 2, 3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    assert paths(infer_pairs(traced(coarse, images()), teacher)) == [("1", "stage2")]


@pytest.mark.parametrize(("blocks", "expected"), [(1, [3]), (2, [1, 3]), (4, [0, 1, 2, 3])])
def test_blocks_of_a_stack_are_paired_evenly_whatever_their_width(blocks: int, expected: list[int]) -> None:
    student = traced(made(Encoder, 0, blocks=blocks, width=8), sentences())
    teacher = traced(made(Encoder, 1, blocks=4), sentences())
    wanted = [(f"layer.{i}", f"layer.{e}") for i, e in enumerate(expected)]
    assert paths(infer_pairs(student, teacher)) == wanted


def test_torchs_own_transformer_layers_are_a_stack() -> None:
    def encoder(layers: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        return nn.Sequential(stack, nn.Flatten(), nn.Linear(80, 3)).eval()

    x = torch.randn(4, 5, 16)
    found = infer_pairs(traced(encoder(1), x), traced(encoder(2), x))
    assert paths(found) == [("0.layers.0", "0.layers.1")]


def test_last_layers_that_are_the_outputs_are_paired_only_if_there_are_no_others() -> None:
    class Bare(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for block in self.layer:
                (x,) = block(x, attention_mask)
            return x

    one, two, four = (traced(made(Bare, 0, blocks=blocks), sentences()) for blocks in (1, 2, 4))
    assert paths(infer_pairs(two, four)) == [("layer.0", "layer.1")]
    assert paths(infer_pairs(one, four)) == [("layer.0", "layer.3")]
    wider = traced(made(Bare, 0, blocks=4, width=32), sentences())
    assert paths(infer_pairs(two, wider)) == [("layer.0", "layer.1"), ("layer.1", "layer.3")]


def test_other_nets_are_paired_by_path_or_in_their_order_without_their_answers() -> None:
    x = torch.randn(6, 4)
    mine = traced(net(width=8), x)
    assert paths(infer_pairs(mine, traced(net(), x))) == [("fc", "fc"), ("norm", "norm")]
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    assert paths(infer_pairs(traced(other, x), traced(net(), x))) == [("0", "norm")]
    assert infer_pairs(mine, traced(net(), x), positions=True) == []


def test_pairs_that_are_asked_for_are_taken() -> None:
    student, teacher = traced(made(Conv, 0), images()), traced(made(Conv, 1, depth=2), images())
    assert paths(pairs_of(student, teacher, ["stage1 = stage2", "stage2"])) == [
        ("stage1", "stage2"),
        ("stage2", "stage2"),
    ]


def test_a_pair_that_does_not_exist_is_named_with_what_is_near() -> None:
    student, teacher = traced(made(Conv, 0), images()), traced(made(Conv, 1), images())
    with pytest.raises(RequestError, match="the student has no layer 'stage3'") as error:
        pairs_of(student, teacher, ["stage3"])
    assert "Did you mean 'stage" in error.value.why
    with pytest.raises(RequestError, match="the teacher has no layer 'stagex'"):
        pairs_of(student, teacher, ["stage1=stagex"])
    for empty in ("", "stage1="):
        with pytest.raises(RequestError, match="has no layer ''"):
            pairs_of(student, teacher, [empty])


def test_pairs_without_anything_in_common_are_refused() -> None:
    student, teacher = traced(made(Conv, 0), images()), traced(made(Conv, 1), images())
    with pytest.raises(TechniqueError, match="cannot be compared") as error:
        pairs_of(student, teacher, ["stage1=fc"])
    assert "(6, 4, 8, 8)" in error.value.why
    with pytest.raises(TechniqueError, match="cannot be compared"):
        pairs_of(student, teacher, ["fc"], positions=True)
    bare = traced(nn.Linear(4, 3).eval(), torch.randn(6, 4))
    with pytest.raises(TechniqueError, match="could be paired") as error:
        pairs_of(bare, bare, [])
    assert "STUDENT=TEACHER" in error.value.fix


def test_the_last_self_attention_is_found_by_the_names_of_its_layers() -> None:
    module = made(Encoder, 0, blocks=3)
    found = attention_of(traced(module, sentences()), None, "student")
    assert [seen.path for seen in found] == [f"layer.2.attention.{part}" for part in ("query", "key", "value")]


def test_one_that_is_asked_for_is_taken_or_named_with_what_is_near() -> None:
    module = made(Encoder, 0, blocks=3)
    seen = traced(module, sentences())
    assert attention_of(seen, "layer.0.attention", "student")[0].path == "layer.0.attention.query"
    with pytest.raises(RequestError, match="not a self-attention of the student") as error:
        attention_of(seen, "layer.7.attention", "student")
    assert "layer.2.attention" in error.value.why


def test_attention_to_something_else_is_passed_over() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
            self.cross_attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})

        def forward(self, x: Tensor) -> Tensor:
            for attention in (self.self_attn, self.cross_attn):
                q, k, v = (layer(x) for layer in attention.values())
                x = (q @ k.transpose(1, 2)).softmax(-1) @ v
            return x

    module = Decoder().eval()
    found = attention_of(traced(module, torch.randn(2, 5, 8)), None, "teacher")
    assert [seen.path for seen in found] == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def test_attention_in_one_projection_is_refused_by_name() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with pytest.raises(TechniqueError, match="minilm") as error:
        attention_of(traced(layer, torch.randn(2, 5, 8)), None, "teacher")
    assert "self_attn.in_proj_weight" in error.value.why
    assert "fitnets or relational" in error.value.fix
    plain = nn.Sequential(nn.Linear(8, 8)).eval()
    with pytest.raises(TechniqueError, match="no query, key and value layers in the student"):
        attention_of(traced(plain, torch.randn(2, 5, 8)), None, "student")
