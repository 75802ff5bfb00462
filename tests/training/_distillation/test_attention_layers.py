from __future__ import annotations

import pytest
import torch
from learning_pairs import Encoder, made, sentences, traced
from torch import Tensor, nn

from omgoptim.errors import RequestError, TechniqueError
from omgoptim.training._distillation.layer_pairing import attention_of


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
    with pytest.raises(TechniqueError, match="no queries, keys and values in the student"):
        attention_of(traced(plain, torch.randn(2, 5, 8)), None, "student")
