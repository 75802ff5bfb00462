from __future__ import annotations

import copy
from typing import Any

import pruning_nets as nets
import pytest
import torch
from torch import nn

from omgoptim.errors import TechniqueError
from omgoptim.requests.distill import FewerLayers
from omgoptim.techniques.registry import apply_to_module

TOKENS = {"input_ids": torch.arange(28).view(4, 7), "attention_mask": torch.ones(4, 7, dtype=torch.long)}


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 20}
    module: nn.Module = transformers.BertModel(transformers.BertConfig(vocab_size=40, num_hidden_layers=6, **sizes))
    return module.eval()


@pytest.mark.parametrize(
    ("params", "kept"),
    [(FewerLayers(), [0, 3, 5]), (FewerLayers(keep_layers=2), [0, 5]), (FewerLayers(depth=0.6), [0, 2, 3, 5])],
)
def test_a_bert_keeps_layers_spread_evenly_and_its_other_weights(
    params: FewerLayers, kept: list[int], run_of: Any, reopened: Any, outputs_of: Any
) -> None:
    teacher = bert()
    student = copy.deepcopy(teacher)
    outcome = apply_to_module(student, params, run_of(teacher, TOKENS, real=False))
    (change,) = outcome.changed
    assert (change.path, change.before) == ("encoder.layer", "6")
    assert change.after == f"{len(kept)}: {', '.join(map(str, kept))}"
    assert student.config.num_hidden_layers == len(kept) == len(student.encoder.layer)
    for new, old in enumerate(kept):
        theirs, own = teacher.encoder.layer[old].state_dict(), student.encoder.layer[new].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    assert torch.equal(student.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    assert torch.equal(outputs_of(reopened(teacher, student), TOKENS), outputs_of(student, TOKENS))


def test_every_stack_keeps_as_many_layers_and_short_ones_all(run_of: Any, drawn: Any, resnet: Any) -> None:
    module = resnet(4, (3, 5, 1))
    outcome = apply_to_module(module, FewerLayers(keep_layers=2), run_of(module, drawn(8, 1, 12, 12)))
    assert [len(stage) for stage in module.stages] == [2, 3, 1]  # the first of the second stage is another kind
    assert [change.path for change in outcome.changed] == ["stages.0", "stages.1"]


def test_a_plain_chain_loses_layers_too(run_of: Any, drawn: Any) -> None:
    module = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    apply_to_module(module, FewerLayers(keep_layers=2), run_of(module, drawn(16, 4)))
    assert len(module) == 2


def test_layers_without_repeats_are_refused(run_of: Any, drawn: Any) -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))
    with pytest.raises(TechniqueError, match="no layer of this model can be removed") as refused:
        apply_to_module(module, FewerLayers(), run_of(module, drawn(8, 4)))
    assert "no layer repeats" in refused.value.why
    assert "student narrow" in refused.value.fix


def test_keeping_more_layers_than_there_are_is_refused_with_the_number(run_of: Any, drawn: Any) -> None:
    module = nets.Vit(8, *(nets.FusedAttention(8, 2) for _ in range(3)))
    with pytest.raises(TechniqueError, match="no layer of this model can be removed") as refused:
        apply_to_module(module, FewerLayers(keep_layers=3), run_of(module, drawn(2, 3, 16, 16)))
    assert "all 3 repeated layers" in refused.value.why


def test_the_layers_of_one_recurrent_module_stay_and_are_reported(run_of: Any, drawn: Any) -> None:
    class Heard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(3, 4, 3, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    module = Heard()
    with pytest.raises(TechniqueError) as refused:
        apply_to_module(module, FewerLayers(), run_of(module, drawn(2, 5, 3)))
    assert "is one module: its 3 layers" in refused.value.why
