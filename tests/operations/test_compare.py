"""Tests of what a comparison says of where its two artifacts come from."""

from __future__ import annotations

import pytest

from omgoptim.models.artifact import Manifest
from omgoptim.operations.compare import common_lineage, origin_words
from omgoptim.runtimes.signature import Signature


def made_by(*lineage: str) -> Manifest:
    return Manifest("onnxruntime", "float32", Signature((), None), lineage=lineage)


@pytest.mark.parametrize(
    ("a", "b", "lineage"),
    [
        (("a",), ("b",), []),
        (("a",), ("a", "b"), ["a", "b"]),
        (("a", "b"), ("a",), ["a"]),
        (("first", "a"), ("first", "b"), ["first", "b"]),
        ((), ("b",), []),
    ],
)
def test_a_lineage_is_only_what_the_manifests_share(a: tuple[str, ...], b: tuple[str, ...], lineage: list[str]) -> None:
    assert common_lineage(made_by(*a), made_by(*b)) == lineage


def test_two_models_without_a_common_run_are_called_separate_unless_both_came_from_one_source() -> None:
    one, other = {"model": "net.py:build", "checkpoint": None}, {"model": "net.py:small", "checkpoint": None}
    assert "two separate models" in origin_words(one, other)
    assert "two separate models" in origin_words(one, one | {"checkpoint": "weights.pt"})
    assert "two separate models" in origin_words({}, {})
    assert origin_words(one, one) == " Both were made from net.py:build."


def test_nothing_is_said_of_models_that_only_their_process_knew() -> None:
    assert origin_words({"model": "(live module)"}, {"model": "(live module)"}) == ""
