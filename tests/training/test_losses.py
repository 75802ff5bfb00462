from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from omgoptim.errors import DataError, UserCodeError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes.signature import Outputs
from omgoptim.training.losses import Loss, loss_of, main_output


@pytest.fixture
def of(policy: PathPolicy) -> Callable[..., Loss]:
    def call(outputs: Any, target: Any, spec: Any = "auto", **more: Any) -> Loss:
        found = loss_of(RequestedFunction(spec, policy, 60.0), outputs, target, **more)
        assert found is not None
        return found

    return call


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_integer_targets_give_torchs_cross_entropy(of: Callable[..., Loss]) -> None:
    scores, labels = drawn(6, 4), torch.tensor([0, 3, 1, 2, -100, 0])
    loss = of(scores, labels)
    assert torch.equal(loss.function(scores, labels), F.cross_entropy(scores, labels))
    assert loss.name == "cross-entropy"
    assert loss.counted(labels) == 5


def test_the_class_axis_is_the_last_or_the_second(of: Callable[..., Loss]) -> None:
    labels = torch.arange(2 * 5).reshape(2, 5) % 3
    last, second = drawn(2, 5, 3), drawn(2, 3, 5)
    torch.testing.assert_close(of(last, labels).function(last, labels), F.cross_entropy(last.movedim(-1, 1), labels))
    torch.testing.assert_close(of(second, labels).function(second, labels), F.cross_entropy(second, labels))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_score_per_target_gives_torchs_binary_cross_entropy(
    shape: tuple[int, ...], of: Callable[..., Loss]
) -> None:
    scores, labels = drawn(*shape), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = F.binary_cross_entropy_with_logits(scores.reshape(-1), labels.float())
    torch.testing.assert_close(of(scores, labels).function(scores, labels), expected)


def test_outputs_that_are_probabilities_already_are_taken_as_such(of: Callable[..., Loss]) -> None:
    scores, labels = drawn(6, 4), torch.tensor([0, 3, 1, 2, 1, 0])
    soft = scores.softmax(1)
    torch.testing.assert_close(of(soft, labels).function(soft, labels), F.cross_entropy(scores, labels))
    one, binary = drawn(32), torch.arange(32) % 2
    torch.testing.assert_close(
        of(one.sigmoid(), binary).function(one.sigmoid(), binary),
        F.binary_cross_entropy_with_logits(one, binary.float()),
    )


def test_a_few_logits_that_happen_to_lie_between_zero_and_one_are_no_probabilities(of: Callable[..., Loss]) -> None:
    few, labels = torch.tensor([0.2, 0.9]).requires_grad_(), torch.tensor([0, 1])
    expected = F.binary_cross_entropy_with_logits(few, labels.float())
    torch.testing.assert_close(of(few, labels).function(few, labels), expected)


def test_a_batch_in_which_no_target_counts_costs_nothing_and_has_a_gradient(of: Callable[..., Loss]) -> None:
    scores, labels = drawn(3, 4), torch.full((3,), -100)
    value = of(scores, torch.tensor([0, 1, 2])).function(scores, labels)
    assert value.item() == 0
    value.backward()
    assert scores.grad is not None
    assert not scores.grad.any()


def test_float_targets_give_the_mean_squared_error_without_broadcasting(of: Callable[..., Loss]) -> None:
    outputs, target = drawn(5, 1), torch.arange(5.0)
    expected = F.mse_loss(outputs[:, 0], target)
    torch.testing.assert_close(of(outputs, target).function(outputs, target), expected)
    with pytest.raises(DataError, match="do not fit"):
        of(drawn(5, 2), target)


def test_targets_of_far_different_scales_each_count_in_units_of_their_own_spread(of: Callable[..., Loss]) -> None:
    spreads = torch.tensor([100.0, 100.0, 0.1])
    outputs = drawn(400, 3).detach() * spreads
    loss = of(outputs, outputs)
    assert loss.name == "mean squared error, each column divided by its own standard deviation"
    errors = []
    for column, spread in enumerate((100.0, 100.0, 0.1)):
        wrong = outputs.clone()
        wrong[:, column] += spread  # by one standard deviation: an error of 1 in one of three columns
        errors.append(float(loss.function(wrong, outputs)))
    assert errors == pytest.approx([1 / 3] * 3, rel=0.15)


def test_a_label_out_of_range_is_said_with_the_range(of: Callable[..., Loss]) -> None:
    labels = torch.tensor([0, 10])
    with pytest.raises(DataError, match="label 10 is out of range") as error:
        of(drawn(2, 10), labels)
    assert "10 classes, so labels must be 0 to 9" in error.value.why
    loss = of(drawn(2, 10), torch.tensor([0, 9]))
    with pytest.raises(DataError, match="label -1 "):
        loss.check(torch.tensor([-1, -100]))
    with pytest.raises(DataError, match="no labels"):
        loss.check(None)


def test_targets_that_fit_no_loss_are_refused_with_the_way_out(of: Callable[..., Loss]) -> None:
    for target in (torch.zeros(4, 7, dtype=torch.long), {"boxes": 1}, ["a", "b"]):
        with pytest.raises(DataError) as error:
            of(drawn(4, 3), target)
        assert "file.py:callable" in error.value.fix


def test_without_targets_there_is_no_loss(policy: PathPolicy) -> None:
    assert loss_of(RequestedFunction("auto", policy, 60.0), drawn(2, 3), None) is None


def test_the_main_output_is_the_first_with_a_batch_dimension() -> None:
    logits, hidden = torch.zeros(2, 3), torch.zeros(2, 4)
    assert main_output(logits) is logits
    assert main_output((logits, hidden)) is logits
    assert main_output(Outputs(loss=torch.tensor(1.0), logits=logits)) is logits
    assert main_output((torch.tensor(1.0), [logits])) is logits
    with pytest.raises(DataError, match="batch dimension"):
        main_output({"loss": torch.zeros(2)})


def test_a_loss_of_the_user_gets_outputs_as_the_model_returns_them(of: Callable[..., Loss], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def mine(outputs, targets):\n    return (outputs['a'] - targets).abs().mean()\n")
    outputs = {"a": drawn(3)}
    loss = of(outputs, torch.zeros(3), "own.py:mine")
    assert loss.name == "mine"
    torch.testing.assert_close(loss.function(outputs, torch.zeros(3)), outputs["a"].abs().mean())


def test_a_loss_of_the_user_that_fails_or_gives_no_number_is_said(of: Callable[..., Loss]) -> None:
    def failing(outputs: Any, targets: Any) -> Any:
        raise KeyError("oops")

    with pytest.raises(UserCodeError, match="the loss failing") as error:
        of(None, None, failing).function(drawn(2), None)
    assert "oops" in error.value.why
    for wrong in (lambda o, t: 1.0, lambda o, t: o, lambda o, t: o.detach().sum()):
        with pytest.raises(DataError, match="the loss <lambda> returned"):
            of(None, None, wrong).function(drawn(2), None)


def test_a_hugging_face_model_computes_its_own_loss(of: Callable[..., Loss]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    module = transformers.BertForSequenceClassification(config).eval()
    ids, labels = torch.arange(8).reshape(2, 4), torch.tensor([0, 2])
    outputs = module(ids)
    loss = of(outputs, labels, module=module)
    assert loss.computed_by_model
    with_labels = module(ids, labels=labels)
    assert loss.function(with_labels, labels) is with_labels.loss
    torch.testing.assert_close(loss.function(outputs, labels), with_labels.loss)  # what a technique gets
    with pytest.raises(DataError, match="out of range"):
        loss.check(torch.tensor([0, 3]))
    assert not of(nn.Linear(2, 3)(torch.zeros(2, 2)), labels, module=nn.Linear(2, 3)).computed_by_model


def test_a_causal_language_model_is_scored_on_the_next_token(of: Callable[..., Loss]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    module = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(8).reshape(2, 4)
    loss = of(module(ids), ids, module=module)
    torch.testing.assert_close(loss.function(module(ids), ids), module(ids, labels=ids).loss)
