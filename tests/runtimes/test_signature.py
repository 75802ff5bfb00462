from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

from omgoptim.runtimes.signature import (
    InputTensor,
    Outputs,
    Signature,
    flatten,
    holds_class,
    leaf_names,
    structure_of,
    unflatten,
)

A, B, C = (np.full((2, 3), value) for value in (1.0, 2.0, 3.0))

OUTPUTS: list[tuple[Any, Any, list[str]]] = [
    (A, "tensor", ["output"]),
    ((A,), {"tuple": ["tensor"]}, ["output_0"]),
    ((A, (B, C)), {"tuple": ["tensor", {"tuple": ["tensor", "tensor"]}]}, ["output_0", "1_0", "1_1"]),
    ([A, None], {"list": ["tensor", None]}, ["output_0"]),
    ({"logits": A, "states": [B, C]}, {"dict": {"logits": "tensor", "states": {"list": ["tensor", "tensor"]}}}, []),
    (None, None, []),
]


@pytest.mark.parametrize(("value", "structure", "names"), OUTPUTS)
def test_outputs_are_taken_apart_and_put_together_again(value: Any, structure: Any, names: list[str]) -> None:
    assert structure_of(value) == structure
    assert json.loads(json.dumps(structure)) == structure
    leaves = flatten(value)
    again = unflatten(structure, leaves)
    assert structure_of(again) == structure
    assert all(one is other for one, other in zip(flatten(again), leaves, strict=True))
    assert len(leaf_names(structure)) == len(leaves)
    if names:
        assert leaf_names(structure) == names


def test_dict_outputs_read_by_key_by_attribute_and_by_position() -> None:
    outputs = unflatten({"dict": {"loss": None, "logits": "tensor", "pooled": "tensor"}}, [A, B])
    assert isinstance(outputs, Outputs)
    assert outputs["logits"] is outputs.logits is outputs[0] is A
    assert outputs[-1] is B
    assert outputs.loss is None
    assert copy.deepcopy(outputs).keys() == outputs.keys()
    with pytest.raises(AttributeError, match="hidden"):
        outputs.hidden  # noqa: B018
    with pytest.raises(KeyError, match="hidden"):
        outputs["hidden"]


def test_an_output_that_is_no_tensor_is_named_by_its_type() -> None:
    for value, kind in ((3.0, "float"), ({"a": [A, "text"]}, "str"), (object(), "object")):
        with pytest.raises(TypeError, match=f"returned a {kind}"):
            structure_of(value)


def signature(outputs: Any = "tensor") -> Signature:
    inputs = (
        InputTensor("x", "float32", ("batch", 3), False),
        InputTensor("mask", "int64", ("batch", "mask_1"), True),
        InputTensor("y", "float32", ("batch",), False),
    )
    return Signature(inputs, outputs)


def test_a_batch_becomes_positional_and_keyword_arguments() -> None:
    args, kwargs = signature().to_call({"mask": C, "y": B, "x": A})
    assert args[0] is A
    assert args[1] is B
    assert kwargs["mask"] is C
    assert len(args) + len(kwargs) == 3


def test_a_signature_survives_json() -> None:
    record = json.loads(json.dumps(signature({"dict": {"a": "tensor"}}).to_json()))
    assert Signature.from_json(record) == signature({"dict": {"a": "tensor"}})


def test_no_output_has_the_name_of_an_input_or_of_another_output() -> None:
    outputs = {"dict": {"x": "tensor", "a_0": "tensor", "a": {"tuple": ["tensor"]}, "x_out": "tensor"}}
    assert signature(outputs).output_names == ["x_out", "a_0", "a_0_out", "x_out_out"]


class Found(NamedTuple):
    boxes: Any
    scores: Any


@dataclass
class Answer:
    logits: Any
    found: Found
    loss: Any = None


def test_fields_of_named_tuples_and_dataclasses_are_the_names_of_outputs() -> None:
    value = Answer(A, Found(B, C))
    structure = json.loads(json.dumps(structure_of(value)))
    assert [id(leaf) for leaf in flatten(value)] == [id(A), id(B), id(C)]
    assert signature(structure).output_names == ["logits", "found_boxes", "found_scores"]
    built = unflatten(structure, [1, 2, 3])
    assert (built.logits, built.found.scores, built.loss) == (1, 3, None)
    boxes, scores = built.found
    assert (boxes, scores) == (2, 3)


def test_only_a_structure_with_a_class_in_it_needs_plain_outputs() -> None:
    assert holds_class(structure_of({"a": (Answer(A, Found(B, C)),)}))
    assert holds_class(structure_of({"a": (A, Found(B, C), None)}))
    assert not holds_class(structure_of({"a": (A, [B, C], None)}))
