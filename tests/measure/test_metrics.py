from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from omgoptim.errors import DataError, OmgoptimError, UserCodeError
from omgoptim.measure.metrics import RequestedFunction, resolve_metric
from omgoptim.measure.quality import compare_quality, score
from omgoptim.models.security.path_policy import PathPolicy
from omgoptim.runtimes.signature import Signature

ONE = Signature((), "tensor")
SCORES = [[np.eye(3, dtype=np.float32)[[0, 1]]], [np.eye(3, dtype=np.float32)[[2]]]]
TARGETS = [np.array([0, 2]), np.array([2])]


@pytest.fixture
def resolve(tmp_path):
    def resolved(name, scores=SCORES, targets=TARGETS, signature=ONE):
        return resolve_metric(RequestedFunction(name, PathPolicy(tmp_path), 60), signature, scores, targets)

    return resolved


def value(metric, scores=SCORES, targets=TARGETS):
    return score(metric, scores, targets, scores)


# The user's own


def test_a_user_metric_gets_all_outputs_and_targets_as_tensors(resolve, tmp_path: Path):
    (tmp_path / "my_metrics_a.py").write_text(
        "def accuracy(outputs, targets):\n"
        "    assert outputs.shape == (3, 3) and targets.shape == (3,)\n"
        "    return (outputs.argmax(1) == targets).float().mean()\n"
    )
    metric = resolve("my_metrics_a.py:accuracy")
    assert metric.name == "accuracy"
    assert value(metric) == pytest.approx(2 / 3)


def test_outputs_are_joined_and_resampled_along_the_batch_axis_of_each(resolve):
    """As of a CTC head (T, N, C), beside anchors of the whole batch."""
    random, anchors = np.random.default_rng(0), np.arange(6, dtype=np.float32).reshape(2, 3)
    labels = [random.integers(0, 4, 16), random.integers(0, 4, 8)]
    made = [[np.repeat(np.eye(4, dtype=np.float32)[given][None], 5, 0), anchors] for given in labels]
    worse = [[batch[0].copy(), anchors] for batch in made]
    worse[0][0][:, :8] = 0
    seen = set()

    def accuracy(outputs, targets):
        seen.add((outputs[0].shape[0], outputs[0].shape[1] == len(targets), outputs[1].shape))
        return (outputs[0][-1].argmax(-1) == targets).float().mean()

    metric = resolve(accuracy, made, labels, Signature((), {"tuple": ["tensor", "tensor"]}))
    found = compare_quality(metric, made, worse, labels, 0)
    assert seen == {(5, True, (2, 3))}
    assert found.before == 1
    assert found.after == pytest.approx(
        float(np.concatenate([worse[k][0][-1].argmax(-1) == labels[k] for k in (0, 1)]).mean())
    )
    assert found.low < found.drop < found.high


def test_r2_of_samples_of_several_sizes_has_one_mean(resolve):
    targets = [np.arange(3, dtype=np.float32)[None], np.arange(5, dtype=np.float32)[None]]
    made = [[target + 0.5] for target in targets]
    flat = np.concatenate([target.ravel() for target in targets])
    expected = 1 - 8 * 0.25 / ((flat - flat.mean()) ** 2).sum()
    assert value(resolve("r2", made, targets), made, targets) == pytest.approx(expected)


def test_r2_names_the_sample_whose_target_is_missing(resolve):
    targets = [np.zeros((2, 1)), np.array([[1.0], [np.nan]])]
    made = [[np.zeros((2, 1))], [np.ones((2, 1))]]
    with pytest.raises(DataError, match="target of sample 3 is NaN"):
        value(resolve("r2", made, targets), made, targets)


def test_a_user_metric_that_is_lower_for_the_better_model_is_refused(resolve):
    random = np.random.default_rng(0)
    values = random.normal(0, 1, (120, 2)).astype(np.float32)
    made = [[values[:60] + 0.1], [values[60:] - 0.1]]
    targets = [values[:60], values[60:]]

    def rmse(outputs, targets):
        return ((outputs - targets) ** 2).mean().sqrt()

    with pytest.raises(DataError, match="metric rmse rates randomly permuted outputs") as error:
        resolve(rmse, made, targets)
    assert error.value.fix.endswith("check the data and the weights")
    assert value(resolve(lambda outputs, targets: -rmse(outputs, targets), made, targets), made, targets) < 0
    guess = [[random.normal(0, 1, (60, 2)).astype(np.float32)] for _ in range(2)]
    resolve(rmse, guess, targets)  # no better and no worse than shuffled: at chance, which is no question of sign


def test_a_user_metric_gets_the_outputs_in_the_structure_of_forward(resolve):
    signature = Signature((), {"dict": {"logits": "tensor", "extra": {"tuple": ["tensor", None]}}})
    scores = [[np.ones((2, 3)), np.zeros((2, 1))], [np.ones((1, 3)), np.zeros((1, 1))]]

    def look(outputs, targets):
        assert targets is None
        assert outputs["logits"].shape == (3, 3)
        assert outputs["extra"][0].shape == (3, 1)
        assert outputs["extra"][1] is None
        return 1

    assert value(resolve(look, scores, [None, None], signature), scores, [None, None]) == 1


def test_outputs_of_different_sizes_come_as_a_list(resolve):
    scores = [[np.ones((2, 3))], [np.ones((2, 5))]]

    def look(outputs, targets):
        return [tuple(output.shape) for output in outputs] == [(2, 3), (2, 5)]

    assert value(resolve(look, scores, [None, None]), scores, [None, None]) == 1


def test_text_targets_come_as_one_list(resolve):
    targets = [np.array(["a", "b"]), np.array(["c"])]
    assert value(resolve(lambda outputs, given: given == ["a", "b", "c"], SCORES, targets), SCORES, targets) == 1


def test_targets_of_the_users_own_kind_come_batch_by_batch(resolve):
    targets = [{"boxes": 1}, {"boxes": 2}]
    assert value(resolve(lambda outputs, given: given is targets, SCORES, targets), SCORES, targets) == 1


@pytest.mark.parametrize("returned", [None, "good", torch.zeros(2), {"accuracy": 1.0}])
def test_a_metric_that_returns_no_number_is_named_with_what_it_returned(resolve, returned):
    def mine(outputs, targets):
        return returned

    with pytest.raises(DataError, match=f"metric mine returned a {type(returned).__name__}"):
        value(resolve(mine))


def test_a_metric_that_raises_is_the_users_error(resolve):
    def mine(outputs, targets):
        raise KeyError("labels")

    with pytest.raises(UserCodeError, match="the metric mine raised") as raised:
        value(resolve(mine))
    assert "KeyError: 'labels'" in raised.value.why


def test_a_metric_that_gives_nan_is_refused(resolve):
    def mine(outputs, targets):
        return math.nan

    with pytest.raises(DataError, match="metric mine returned nan"):
        value(resolve(mine))


def test_a_metric_that_cannot_be_found_is_an_error(resolve, tmp_path: Path):
    (tmp_path / "my_metrics_b.py").write_text("def accuracy(outputs, targets):\n    return 1.0\nnumber = 3\n")
    with pytest.raises(OmgoptimError) as raised:
        resolve("my_metrics_b.py:acuracy")
    assert "accuracy" in raised.value.why
    with pytest.raises(DataError, match=r"'my_metrics_b\.py:number' is not callable"):
        resolve("my_metrics_b.py:number")


def test_a_user_metric_that_fails_on_some_resamples_only_costs_them(resolve):
    """A correlation needs two kinds of target; a resample of few samples may hold one."""
    calls = {"all": 0, "bad": 0}
    scores = [[np.arange(8, dtype=np.float32)]]
    targets = [np.array([0, 0, 0, 1, 1, 1, 1, 0])]

    def correlation(outputs, labels):
        calls["all"] += 1
        if len(set(labels.tolist())) < 2:
            calls["bad"] += 1
            return math.nan
        return np.corrcoef(outputs.numpy(), labels.numpy())[0, 1]

    quality = compare_quality(resolve(correlation, scores, targets), scores, [[-scores[0][0]]], targets, 0)
    assert calls["bad"] > 0
    assert calls["all"] > 100
    assert -2 <= quality.low < quality.drop < quality.high <= 2


# torchmetrics


def test_a_name_of_torchmetrics_is_computed_by_it(resolve):
    metric = resolve("Accuracy")
    assert metric.name == "Accuracy"
    assert value(metric) == pytest.approx(2 / 3)
    assert value(resolve("MulticlassAccuracy")) == pytest.approx((1 + 0 + 1 / 2) / 3)  # mean over classes


def test_a_binary_output_is_a_binary_task(resolve):
    scores, targets = [[np.array([0.9, 0.2, 0.8], np.float32)]], [np.array([1, 0, 0])]
    assert value(resolve("Accuracy", scores, targets), scores, targets) == pytest.approx(2 / 3)


def test_a_metric_that_is_better_when_lower_is_turned_round(resolve):
    scores, targets = [[np.array([1.0, 2.0], np.float32)]], [np.array([1.0, 4.0], np.float32)]
    metric = resolve("MeanSquaredError", scores, targets)
    assert metric.name == "negative_MeanSquaredError"
    assert value(metric, scores, targets) == pytest.approx(-2)


def test_an_unknown_name_gets_the_nearest_one(resolve):
    with pytest.raises(DataError, match="torchmetrics has no metric 'Acuracy'") as raised:
        resolve("Acuracy")
    assert "Did you mean 'Accuracy'?" in raised.value.why


@pytest.mark.parametrize("name", ["functional", "__all__", "utilities"])
def test_what_is_no_metric_in_torchmetrics_is_none_here(resolve, name):
    with pytest.raises(DataError, match="torchmetrics has no"):
        resolve(name)


def test_torchmetrics_needs_targets(resolve):
    with pytest.raises(DataError, match="needs targets"):
        resolve("Accuracy", SCORES, [None, None])


def test_outputs_that_torchmetrics_refuses_are_a_clear_error(resolve):
    targets = [np.zeros((2, 2), int), np.array([2])]
    with pytest.raises(DataError, match="torchmetrics' Accuracy does not accept") as raised:
        value(resolve("Accuracy", SCORES, targets), SCORES, targets)
    assert raised.value.why


def test_a_metric_whose_arguments_are_unknown_is_a_clear_error(resolve):
    with pytest.raises(DataError, match="MultilabelAccuracy does not accept"):
        resolve("MultilabelAccuracy")
