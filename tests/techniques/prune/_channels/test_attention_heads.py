from __future__ import annotations

from collections.abc import Callable

import pruning_nets as nets
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.groups import Group
from omgoptim.techniques.prune._channels.removal import remove
from omgoptim.techniques.registry import ModuleRun

RunOf = Callable[..., ModuleRun]
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class InTurn(nn.Module):
    """The query, key and value of each head in turn, as GPT-NeoX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.dense = 4, nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.num_heads, 3, 6).permute(3, 0, 2, 1, 4)
        return self.dense(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def heads_of(module: nn.Module, run_of: RunOf) -> list[Group]:
    groups = find_groups(module, Structured(), run_of(module, [IMAGES])).groups
    return [group for group in groups if group.kind == "heads"]


ATTENTIONS: list[tuple[Callable[[], nn.Module], str, int, int]] = [
    (lambda: nets.FusedAttention(24, 4), "num_heads", 4, 6),
    (InTurn, "num_heads", 4, 6),
    (lambda: nets.SplitAttention(24, 4), "n_heads", 4, 6),
    (lambda: nets.SplitAttention(24, 4, 2), "n_heads", 4, 12),
]


@pytest.mark.parametrize(("build", "number", "heads", "unit"), ATTENTIONS)
def test_whole_heads_go_and_the_block_knows_how_many_are_left(
    build: Callable[[], nn.Module], number: str, heads: int, unit: int, run_of: RunOf
) -> None:
    torch.manual_seed(0)
    module = nets.Vit(24, build()).eval()
    run = run_of(module, [IMAGES])
    groups = find_groups(module, Structured(), run)
    group = next(group for group in groups.groups if group.kind == "heads")
    assert (group.width, group.unit, group.heads) == (24, unit, heads)
    # the first unit of heads ignored by the layer that reads it
    reader = next(path for path, side in group.members if side == "in")
    with torch.no_grad():
        weight = module.get_submodule(reader).weight  # type: ignore[union-attr]
        full = weight.clone()  # type: ignore[operator]
        weight[:, :unit] = 0  # type: ignore[index, operator]
        expected = module(IMAGES)
        weight.copy_(full)  # type: ignore[operator]
    outcome = remove(module, groups, {group.name: torch.arange(unit, 24)}, run)
    torch.testing.assert_close(module(IMAGES), expected)
    left = heads - heads * unit // 24
    assert getattr(module.blocks[0].attention, number) == left
    changes = [(c.before, c.after) for c in outcome.changed if c.what == "heads"]
    assert changes == [(str(heads), str(left))]


def test_grouped_queries_keep_their_ratio(run_of: RunOf) -> None:
    module = nets.Vit(24, nets.SplitAttention(24, 4, 2)).eval()
    run = run_of(module, [IMAGES])
    groups = find_groups(module, Structured(), run)
    remove(module, groups, {"blocks.0.attention.wq": torch.arange(12)}, run)
    attention = module.blocks[0].attention
    assert (attention.n_heads, attention.n_kv_heads) == (2, 1)
    assert (attention.wq.out_features, attention.wk.out_features, attention.wv.out_features) == (12, 6, 6)


def test_a_block_that_reshapes_to_the_models_width_keeps_its_heads(run_of: RunOf) -> None:
    module = nets.Vit(24, nets.FusedAttention(24, 4, fixed=True)).eval()
    groups = find_groups(module, Structured(), run_of(module, [IMAGES]))
    assert [group.kind for group in groups.groups] == ["channels"]
    reason = next(skip.reason for skip in groups.skipped if skip.path == "blocks.0.attention.qkv")
    assert "pruning_nets.py line" in reason
    assert module.blocks[0].attention.num_heads == 4


def test_heads_are_left_alone_when_only_their_neighbours_may_go(run_of: RunOf) -> None:
    module = nets.Vit(24, nets.FusedAttention(24, 4)).eval()
    groups = find_groups(module, Structured(prune_heads=False), run_of(module, [IMAGES]))
    assert [group.name for group in groups.groups] == ["blocks.0.fc1"]
    reasons = {skip.path: skip.reason for skip in groups.skipped}
    assert reasons["blocks.0.attention.qkv"] == "heads are not pruned (prune_heads is off)"


def test_bert_has_its_heads_found_and_its_numbers_set(run_of: RunOf) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
    )
    module = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(50, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    run = run_of(module, [batch])
    groups = find_groups(module, Structured(), run)
    query = "encoder.layer.0.attention.self.query"
    assert [(group.name, group.unit) for group in groups.groups] == [
        (query, 8),
        ("encoder.layer.0.intermediate.dense", 1),
    ]
    remove(module, groups, {query: torch.arange(8, 32)}, run)
    own = module.encoder.layer[0].attention.self
    assert (own.num_attention_heads, own.attention_head_size, own.all_head_size) == (3, 8, 24)
    assert module(**batch).last_hidden_state.shape == (3, 7, 32)
