"""Scores by hand."""

from __future__ import annotations

import pytest
import torch

from omgoptim.techniques.prune._unstructured.saliency import lamp, wanda


def test_lamp_divides_by_the_energy_of_what_is_not_smaller() -> None:
    # squares 1, 4, 9: 1/14, 4/13, 9/9
    scores = lamp(torch.tensor([[-2.0, 1.0, 3.0]]))
    assert scores.flatten().tolist() == pytest.approx([4 / 13, 1 / 14, 1.0])


def test_lamp_of_equals_falls_with_their_position_and_of_zeros_is_zero() -> None:
    assert lamp(torch.tensor([2.0, 0.0, -2.0])).tolist() == pytest.approx([0.5, 0.0, 1.0])
    assert lamp(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


def test_lamp_does_not_depend_on_a_layers_scale(drawn) -> None:  # type: ignore[no-untyped-def]
    weight = drawn(8, 4, 3, 3)
    assert torch.allclose(lamp(weight), lamp(1000 * weight))


def test_lamp_keeps_the_order_of_magnitudes_within_a_layer(drawn) -> None:  # type: ignore[no-untyped-def]
    weight = drawn(50)
    assert torch.equal(lamp(weight).argsort(), weight.abs().argsort())


def test_wanda_multiplies_magnitude_and_input_norm() -> None:
    rows = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert wanda(rows, torch.tensor([10.0, 2.0])).tolist() == [[10.0, 4.0], [30.0, 1.0]]
    each = torch.tensor([[1.0, 1.0], [0.0, 4.0]])
    assert wanda(rows, each).tolist() == [[1.0, 2.0], [0.0, 2.0]]
