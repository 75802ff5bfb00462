from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omgoptim.training._distillation.distances import (
    correlation_distance,
    decoupled_divergence,
    relative_distance,
    softened_divergence,
    squared_distance,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 3, 1, 2, 1, 0])
STUDENT, TEACHER = drawn(6, 4), drawn(6, 4, seed=1) * 3


def centred(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def softmax(z: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp(z.astype(np.float64) / temperature)
    return powers / powers.sum(-1, keepdims=True)


def test_the_divergence_of_two_rows_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3.0), 0.0]])
    p, q = (0.75, 0.25), (0.5, 0.5)  # at temperature 2 the teacher's odds are 3 to 1
    by_hand = 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert softened_divergence(student, teacher, 2.0).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_torchs_kl_div_with_batchmean_times_the_temperature_squared(temperature: float) -> None:
    expected = F.kl_div(
        F.log_softmax(STUDENT / temperature, 1), F.softmax(TEACHER / temperature, 1), reduction="batchmean"
    )
    torch.testing.assert_close(softened_divergence(STUDENT, TEACHER, temperature), expected * temperature**2)


def test_at_a_high_temperature_it_is_the_squared_distance_of_centred_logits() -> None:
    limit = squared_distance(centred(STUDENT), centred(TEACHER)) / 2
    got = softened_divergence(STUDENT.double(), TEACHER.double(), 1e4)
    assert got.item() == pytest.approx(limit.item(), rel=1e-3)


@pytest.mark.parametrize("distance", [softened_divergence, decoupled_divergence, squared_distance])
def test_classes_masked_in_both_do_not_count(distance: object) -> None:
    def of(student: Tensor, teacher: Tensor) -> Tensor:
        if distance is squared_distance:
            return squared_distance(student, teacher)
        if distance is decoupled_divergence:
            return decoupled_divergence(student, teacher, LABELS, 2.0)
        return softened_divergence(student, teacher, 2.0)

    student, teacher = (torch.cat([x, torch.full((6, 1), -math.inf)], 1) for x in (STUDENT, TEACHER))
    student.requires_grad_()
    value = of(student, teacher)
    torch.testing.assert_close(value, of(STUDENT, TEACHER))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_the_squared_distance_of_logits_is_torchs_mean_squared_error_and_sees_their_mean() -> None:
    torch.testing.assert_close(squared_distance(STUDENT, TEACHER), F.mse_loss(STUDENT, TEACHER))
    assert squared_distance(STUDENT + 2, STUDENT).item() == pytest.approx(4.0)
    assert softened_divergence(STUDENT + 2, STUDENT, 4.0).item() == pytest.approx(0.0, abs=1e-5)


def test_the_decoupled_divergence_of_one_row_by_hand() -> None:
    student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.log(torch.tensor([[0.5, 0.4, 0.1]]))
    label, third = torch.tensor([0]), 1 / 3
    of_target = 0.5 * math.log(0.5 / third) + 0.5 * math.log(0.5 / (2 * third))
    of_others = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    got = decoupled_divergence(student, teacher, label, 1.0)
    assert got.item() == pytest.approx(of_target + 8 * of_others, rel=1e-6)
    halved = decoupled_divergence(2 * student, 2 * teacher, label, 2.0)
    assert halved.item() == pytest.approx(4 * got.item(), rel=1e-6)


def test_the_parts_of_the_decoupled_divergence_make_up_the_whole_one() -> None:
    p = F.softmax(TEACHER / 2, 1)
    for row, label in enumerate(LABELS.tolist()):
        one, other = STUDENT[row : row + 1], TEACHER[row : row + 1]
        got = decoupled_divergence(one, other, LABELS[row : row + 1], 2.0, 1.0, 1 - float(p[row, label]))
        torch.testing.assert_close(got, softened_divergence(one, other, 2.0))


def test_a_very_sure_teacher_keeps_the_decoupled_divergence_finite() -> None:
    student = STUDENT.clone().requires_grad_()
    value = decoupled_divergence(student, F.one_hot(LABELS, 4) * 500.0, LABELS, 1.0)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_the_correlation_distance_is_one_minus_numpys_correlations_of_rows_and_of_columns() -> None:
    p, q = softmax(STUDENT.numpy(), 2.0), softmax(TEACHER.numpy(), 2.0)
    rows = np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    columns = np.mean([np.corrcoef(p[:, i], q[:, i])[0, 1] for i in range(4)])
    got = correlation_distance(STUDENT, TEACHER, 2.0)
    assert got.item() == pytest.approx(4 * (2 - rows - columns), rel=1e-5)


def test_the_correlation_distance_of_a_student_with_less_contrast_is_nothing() -> None:
    q = F.softmax(TEACHER, 1)
    flat = 0.3 * q + 0.7 / 4  # distributions still: scaled and shifted
    assert correlation_distance(flat.log(), TEACHER, 1.0).item() == pytest.approx(0.0, abs=1e-5)
    assert softened_divergence(flat.log(), TEACHER, 1.0).item() > 0.1
    assert correlation_distance(STUDENT[:1], STUDENT[:1] + 1, 1.0).item() == pytest.approx(0.0, abs=1e-5)


def test_values_cost_their_squared_error_over_the_teachers_variance_and_one_minus_the_cosine() -> None:
    teacher, student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # two of four entries are off by 1, variance 1/4; cosines 1 and 0
    assert relative_distance(student, teacher).item() == pytest.approx(0.5 / 0.25 + 0.5)
    assert relative_distance(student, teacher, cosine=False).item() == pytest.approx(0.5 / 0.25)
    assert relative_distance(teacher[:, 0] + 1, teacher[:, 0]).item() == pytest.approx(1 / 0.25)


def test_nothing_to_compare_costs_nothing() -> None:
    none = torch.zeros(0, 4, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.long)
    values = [
        softened_divergence(none, none.detach(), 2.0),
        squared_distance(none, none.detach()),
        decoupled_divergence(none, none.detach(), empty, 2.0),
        correlation_distance(none, none.detach(), 2.0),
        relative_distance(none, none.detach()),
    ]
    assert [value.item() for value in values] == [0.0] * 5
    assert all(value.requires_grad for value in values)


def test_outputs_without_any_value_have_no_distance() -> None:
    empty = torch.zeros(4, 0, requires_grad=True)
    distance = relative_distance(empty, torch.zeros(4, 0))
    distance.backward()
    assert distance.item() == 0
