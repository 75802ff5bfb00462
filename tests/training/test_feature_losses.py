from __future__ import annotations

from typing import Any

import pytest
import torch
from learning_pairs import Conv, Encoder, features_of, heard_by, images, inner_state, made, sentences
from small_training import net, same, signature_of, state
from torch import Tensor, nn
from torch.nn import functional as F

from omgoptim.errors import DataError, RequestError, TechniqueError
from omgoptim.training._distillation.distances import (
    attention_distance,
    hint_distance,
    relation_divergence,
    relational_distance,
)
from omgoptim.training.feature_losses import FeatureLoss, LayerPlace

METHODS = {
    "fitnets": (Conv, images()),
    "attention": (Conv, images()),
    "relational": (Conv, images()),
    "minilm": (Encoder, sentences()),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_student_like_its_teacher_costs_nothing_and_another_something(method: str) -> None:
    kind, inputs = METHODS[method]
    teacher = made(kind, 1, width=16)
    twin, other = made(kind, 1, width=16), made(kind, 2, width=8)
    assert heard_by(features_of(method, twin, teacher, inputs), twin, teacher, inputs).item() == pytest.approx(
        0.0, abs=1e-5
    )
    value = heard_by(features_of(method, other, teacher, inputs), other, teacher, inputs)
    value.backward()
    assert 1e-4 < value.item() < 10
    grads = [parameter.grad for parameter in other.parameters() if parameter.grad is not None]
    assert any(bool((grad != 0).any()) for grad in grads)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_and_the_random_state_are_untouched_bit_for_bit(method: str) -> None:
    kind, inputs = METHODS[method]
    student, teacher = made(kind, 2), made(kind, 1, width=16)
    next(teacher.children()).train()
    teacher.requires_grad_(False)
    signature_of(student, inputs)
    before, tensors, drawn = inner_state(teacher), state(teacher), torch.get_rng_state()
    loss = features_of(method, student, teacher, inputs)
    teacher.eval()
    heard_by(loss, student, teacher, inputs).backward()
    next(teacher.children()).train()
    assert inner_state(teacher) == before
    assert same(state(teacher), tensors)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_hints_go_through_an_adapter_where_widths_differ_and_to_the_smaller_grid() -> None:
    student, teacher = made(Conv, 0, width=4), made(Conv, 1, width=8)
    loss = features_of("fitnets", student, teacher, images(), "stage1=stage2", "stage2=stage1")
    adapter = loss.adapters[1]
    assert isinstance(loss.adapters[0], nn.Linear)
    assert isinstance(adapter, nn.Identity)  # 8 channels of both
    assert sum(parameter.numel() for parameter in loss.parameters()) == 4 * 16 + 16
    x = images()
    one, other = student.stage1(x), teacher.stage1(x)
    two, four = student.stage2(one), teacher.stage2(other)
    weight, bias = loss.adapters[0].weight, loss.adapters[0].bias
    pooled = F.conv2d(F.adaptive_avg_pool2d(one, 4), weight[:, :, None, None], bias)
    expected = (hint_distance(pooled, four) + hint_distance(two, F.adaptive_avg_pool2d(other, 4))) / 2
    torch.testing.assert_close(heard_by(loss, student, teacher, x), expected)
    assert loss.names == [
        "stage1 after the teacher's stage2, through an adapter 4 to 16",
        "stage2 after the teacher's stage1",
    ]


def test_adapters_are_drawn_from_the_seed() -> None:
    def drawn(seed: int) -> Tensor:
        place = LayerPlace("stage1", "output", 1)
        return FeatureLoss("fitnets", 1.0, [(place, place)], [(4, 8)], seed).adapters[0].weight

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_attention_maps_are_mean_squares_over_channels() -> None:
    student, teacher = made(Conv, 0, width=4), made(Conv, 1, width=8)
    x = images()
    maps = [
        module(x).square().mean(1).flatten(1)
        for module in (student.stage1, teacher.stage1, nn.Sequential(student.stage1, student.stage2),
                       nn.Sequential(teacher.stage1, teacher.stage2))
    ]  # fmt: skip
    expected = (attention_distance(maps[0], maps[1]) + attention_distance(maps[2], maps[3])) / 2
    loss = features_of("attention", student, teacher, x)
    torch.testing.assert_close(heard_by(loss, student, teacher, x), expected)
    assert not list(loss.parameters())
    assert loss.names == ["stage1 of both", "stage2 of both"]


def test_relations_are_of_what_goes_into_the_last_linear_whatever_the_number_of_classes() -> None:
    student, teacher = made(Conv, 0, width=4), made(Conv, 1, width=8, classes=7)
    x = images()
    loss = features_of("relational", student, teacher, x)
    embeddings = [module.stage2(module.stage1(x)).mean((2, 3)) for module in (student, teacher)]
    torch.testing.assert_close(heard_by(loss, student, teacher, x), relational_distance(*embeddings))
    assert loss.names == ["the input of fc of both"]


def test_relations_of_an_encoder_are_of_its_output_or_of_a_layer_without_its_padding() -> None:
    student, teacher = made(Encoder, 0, width=8), made(Encoder, 1)
    inputs = sentences()
    loss = features_of("relational", student, teacher, inputs)
    expected = relational_distance(student(**inputs), teacher(**inputs))
    torch.testing.assert_close(heard_by(loss, student, teacher, inputs), expected)
    asked = features_of("relational", student, teacher, inputs, "layer.1")  # whose masked mean is the output
    torch.testing.assert_close(heard_by(asked, student, teacher, inputs), expected)


def test_attention_relations_are_the_sum_over_queries_keys_and_values_of_the_last_layer() -> None:
    student, teacher = made(Encoder, 0, width=8, blocks=1), made(Encoder, 1, width=16)
    inputs = sentences()
    loss = features_of("minilm", student, teacher, inputs)
    mask, xs = inputs["attention_mask"], []
    for module, blocks in ((student, 0), (teacher, 1)):
        x = module.embed(inputs["input_ids"])
        for block in module.layer[:blocks]:
            (x,) = block(x, mask)
        attention = module.layer[blocks].attention
        xs.append([part(x) for part in (attention.query, attention.key, attention.value)])
    expected = sum(relation_divergence(one, other, 1, mask) for one, other in zip(*xs, strict=True))
    torch.testing.assert_close(heard_by(loss, student, teacher, inputs), expected)
    assert loss.names[0] == "layer.0.attention.query after the teacher's layer.1.attention.query"


def test_padding_does_not_matter_to_any_method_of_sequences() -> None:
    student, teacher = made(Encoder, 0), made(Encoder, 1)
    inputs = sentences()
    changed = {**inputs, "input_ids": inputs["input_ids"].where(inputs["attention_mask"] != 0, torch.tensor(7))}
    assert not torch.equal(inputs["input_ids"], changed["input_ids"])
    for method in METHODS:
        loss = features_of(method, student, teacher, inputs)
        one, other = (heard_by(loss, student, teacher, batch) for batch in (inputs, changed))
        torch.testing.assert_close(one, other)


def test_bad_requests_are_refused_with_what_would_do() -> None:
    student, teacher = made(Conv, 0), made(Conv, 1)
    with pytest.raises(RequestError, match="'fitnet' are unknown") as error:
        features_of("fitnet", student, teacher, images())
    assert "Did you mean 'fitnets'?" in error.value.why
    with pytest.raises(TechniqueError, match="minilm"):
        features_of("minilm", student, teacher, images())
    with pytest.raises(RequestError, match="the student has no layer 'stage4'"):
        features_of("relational", student, teacher, images(), "stage4")
    with pytest.raises(TechniqueError, match="could be paired"):
        features_of("attention", net(), net(1), torch.randn(6, 4))
    for weight in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight"):
            FeatureLoss("attention", weight, [])


def test_a_layer_that_a_batch_does_not_call_is_an_error_with_its_name() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.inner(x) if len(x) > 2 else x)

    module: Any = Skips().eval()
    loss = features_of("fitnets", module, module, torch.randn(6, 4))
    with pytest.raises(DataError, match="'inner' of the student was not called"):
        heard_by(loss, module, module, torch.randn(2, 4))


def test_real_sentence_transformers_have_pairs_for_every_method() -> None:
    transformers = pytest.importorskip("transformers")

    def bert(layers: int, width: int) -> nn.Module:
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32
        )
        with torch.random.fork_rng([]):
            torch.manual_seed(layers)
            return transformers.BertModel(config).eval()

    student, teacher, inputs = bert(2, 16), bert(4, 32), sentences()
    hints = features_of("fitnets", student, teacher, inputs)
    assert hints.names == [
        "encoder.layer.0 after the teacher's encoder.layer.1, through an adapter 16 to 32",
        "encoder.layer.1 after the teacher's encoder.layer.3, through an adapter 16 to 32",
    ]
    for method in METHODS:
        value = heard_by(features_of(method, student, teacher, inputs), student, teacher, inputs)
        assert torch.isfinite(value)
        assert value.item() > 0
