from __future__ import annotations

import numpy as np
import pytest

from omgoptim.errors import DataError, RequestError
from omgoptim.models.output_detection import OutputOptions, describe_outputs
from omgoptim.models.outputs import class_layout
from omgoptim.runtimes.signature import InputTensor, Signature

RANDOM = np.random.default_rng(0)


def floats(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def softmax(rows):
    exponents = np.exp(rows)
    return (exponents / exponents.sum(-1, keepdims=True)).astype(np.float32)


def described(outputs, targets=None, inputs=(), names=None, **more):
    """Outputs of two batches, of 5 and 3 samples, each a function of the number of samples."""
    structure = "tensor" if len(outputs) == 1 else {"tuple": ["tensor"] * len(outputs)}
    if names is not None:
        structure = {"dict": dict.fromkeys(names, "tensor")}
    reference = [[make(count) for make in outputs] for count in (5, 3)]
    given = [None, None] if targets is None else [targets(count) for count in (5, 3)]
    return describe_outputs(Signature(tuple(inputs), structure), reference, [5, 3], given, OutputOptions(**more))


def kinds(found):
    return [spec.kind for spec in found.specs]


def labels(classes):
    return lambda count: np.arange(count) % classes


def test_outputs_of_a_detector_are_values_and_class_scores_and_the_labels_belong_to_the_scores():
    heads = (lambda n: floats(n, 4), lambda n: floats(n, 6), lambda n: softmax(floats(n, 2)))
    found = described(heads, labels(2))
    assert kinds(found) == ["values", "values", "class_scores"]
    assert [spec.shape for spec in found.specs] == [("batch", 4), ("batch", 6), ("batch", 2)]
    assert found.target == 2
    assert "sum to one" in found.specs[2].evidence
    assert [spec.compared_by for spec in found.specs] == ["r2_agreement", "r2_agreement", "top1_agreement"]


def test_integer_labels_that_fit_one_output_make_it_class_scores():
    found = described((lambda n: floats(n, 3),), labels(3))
    assert kinds(found) == ["class_scores"]
    assert found.specs[0].evidence == "integer labels fit its shape"
    assert kinds(described((lambda n: floats(n, 3),))) == ["values"]


def test_labels_that_fit_several_outputs_are_refused_with_the_names():
    heads = (lambda n: floats(n, 4), lambda n: floats(n, 6))
    found = described(heads, labels(2), names=["corners", "classes"])
    assert found.target is None
    with pytest.raises(DataError, match="fit the shapes of several outputs") as raised:
        found.require_target()
    assert "corners, classes" in raised.value.why
    assert "target_output='classes'" in raised.value.fix
    with pytest.raises(DataError) as raised:
        described((lambda n: floats(n, 4),) * 2, labels(2), names=["out", "aux"]).require_target()
    assert "target_output='out'" in raised.value.fix
    chosen = described(heads, labels(2), names=["corners", "classes"], target_output="classes")
    assert chosen.require_target().name == "classes"
    assert kinds(chosen) == ["values", "class_scores"]


def test_an_output_with_fewer_classes_than_the_labels_have_is_none_of_theirs():
    found = described((lambda n: floats(n, 2), lambda n: floats(n, 6)), labels(3))
    assert found.target == 1


def test_an_output_called_logits_holds_class_scores():
    found = described((lambda n: floats(n, 7, 8), lambda n: floats(n, 7, 8)), names=["hidden", "logits"])
    assert kinds(found) == ["values", "class_scores"]


def test_scores_of_one_class_are_values_since_a_class_alone_always_agrees():
    masks, tokens = (lambda n: floats(n, 1, 6, 6)), (lambda n: floats(n, 9, 1))
    found = described((masks, tokens), names=["mask_logits", "scores"])
    assert kinds(found) == ["values", "values"]
    found = described((masks,), metric="top1_agreement")
    assert (found.specs[0].kind, found.specs[0].class_axis) == ("class_scores", None)


def test_similarities_of_all_samples_of_a_batch_are_no_classes():
    found = described((lambda n: floats(n, n), lambda n: floats(n, 4)), names=["logits_per_image", "logits"])
    assert kinds(found) == ["values", "class_scores"]
    assert "pair of samples" in found.specs[0].evidence


def test_scores_of_several_positions_are_known_as_probabilities_too():
    found = described((lambda n: softmax(floats(n, 7, 8)), lambda n: floats(n, 7, 8)), names=["probs", "logits"])
    assert [spec.probabilities for spec in found.specs] == [True, False]


def test_labels_that_fit_no_output_say_all_shapes():
    found = described((lambda n: floats(n, 2, 3),), lambda n: np.zeros((n, 9), int))
    with pytest.raises(DataError, match="do not fit") as raised:
        found.require_target()
    assert "(batch, 2, 3)" in raised.value.why
    assert "(5, 9)" in raised.value.why


def test_float_labels_belong_to_the_output_of_their_shape():
    found = described((lambda n: floats(n, 4), lambda n: floats(n, 1)), lambda n: floats(n))
    assert found.target == 1
    assert kinds(found) == ["values", "number"]


def test_counts_are_no_classes_of_a_single_number():
    found = described((lambda n: floats(n, 1),), lambda n: np.arange(n))
    assert kinds(found) == ["number"]


def test_values_that_are_missing_from_the_labels_do_not_matter_to_the_outputs():
    found = described((lambda n: floats(n, 3),), lambda n: np.where(np.eye(n, 3) > 0, np.nan, 1.5))
    assert (found.labels, found.target) == ("values", 0)


def test_a_state_is_an_output_of_the_shape_of_an_input():
    inputs = (
        InputTensor("x", "float32", ("batch", 8), False),
        InputTensor("state", "float32", ("batch", 32), False),
    )
    found = described((lambda n: floats(n, 1), lambda n: floats(n, 32)), inputs=inputs)
    assert kinds(found) == ["number", "state"]
    assert "'state'" in found.specs[1].evidence


def test_the_batch_axis_is_the_one_that_changes_with_the_batch():
    found = described((lambda n: floats(n, 4), lambda n: floats(5, n, 2), lambda n: np.zeros((2, n), np.int64)))
    assert [spec.batch_axis for spec in found.specs] == [0, 1, 1]
    assert kinds(found) == ["values", "values", "integers"]
    assert found.specs[1].shape == (5, "batch", 2)


def test_a_single_number_for_the_whole_batch_is_left_out():
    found = described((lambda n: np.float32(1.0).reshape(()), lambda n: floats(n, 4)))
    assert [spec.weight for spec in found.specs] == [0.0, 1.0]
    with pytest.raises(DataError, match="scalar"):
        described((lambda n: np.float32(1.0).reshape(()),))


def test_ignored_outputs_have_no_weight_and_an_unknown_name_is_refused_with_the_nearest():
    heads = (lambda n: floats(n, 4), lambda n: floats(n, 6))
    found = described(heads, names=["boxes", "points"], ignored=["1"])
    assert [spec.weight for spec in found.specs] == [1.0, 0.0]
    assert found.specs[1].compared_by == "not compared"
    with pytest.raises(RequestError, match="no output 'point'") as raised:
        described(heads, names=["boxes", "points"], ignored=["point"])
    assert "points" in raised.value.why
    with pytest.raises(RequestError, match="every output"):
        described(heads, ignored=["0", "1"])


def test_a_constant_output_is_known_as_one_and_is_no_vector():
    found = described((lambda n: np.full((n, 3), 2.0, np.float32), lambda n: floats(n, 3), lambda n: floats(n, 1)))
    assert [spec.constant for spec in found.specs] == [True, False, False]
    assert found.specs[0].spread == pytest.approx(2.0)
    assert [spec.is_vector for spec in found.specs] == [False, True, False]


@pytest.mark.parametrize(
    ("shape", "target", "layout"),
    [
        ((4, 3), (4,), (-1, 3)),
        ((4,), (4,), (None, 2)),
        ((4, 1), (4,), (None, 2)),
        ((4, 7, 3), (4, 7), (-1, 3)),
        ((4, 3, 5, 5), (4, 5, 5), (1, 3)),
        ((4, 3), (4, 3), (None, 2)),
        ((4, 3), (4, 2), None),
        ((4, 3), (5,), None),
    ],
)
def test_the_class_axis_follows_from_the_shapes(shape, target, layout):
    assert class_layout(shape, target) == layout
