from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omgoptim.runtimes.signature import Outputs
from omgoptim.training.distillation import DistillationLoss
from omgoptim.training.output_distances import relative_distance, softened_divergence


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 3, 1, 2, 1, 0])
STUDENT, TEACHER = drawn(6, 4), drawn(6, 4, seed=1) * 3


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
    def centred(x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    limit = ((centred(STUDENT) - centred(TEACHER)) ** 2).sum(1).mean() / (2 * STUDENT.shape[1])
    got = softened_divergence(STUDENT.double(), TEACHER.double(), 1e4)
    assert got.item() == pytest.approx(limit.item(), rel=1e-3)


def test_at_alpha_one_it_is_cross_entropy_and_at_alpha_zero_the_divergence_exactly() -> None:
    assert torch.equal(DistillationLoss(4.0, 1.0)(STUDENT, TEACHER, LABELS), F.cross_entropy(STUDENT, LABELS))
    soft = softened_divergence(STUDENT, TEACHER, 4.0)
    assert torch.equal(DistillationLoss(4.0, 0.0)(STUDENT, TEACHER, LABELS), soft)
    mixed = 0.25 * F.cross_entropy(STUDENT, LABELS) + 0.75 * soft
    torch.testing.assert_close(DistillationLoss(4.0, 0.25)(STUDENT, TEACHER, LABELS), mixed)
    assert torch.equal(DistillationLoss(4.0, 0.25)(STUDENT, TEACHER), soft)


def test_a_student_equal_to_its_teacher_costs_nothing_and_has_no_gradient() -> None:
    for output in (TEACHER, drawn(3, 5, 4)):
        student = output.clone().requires_grad_()
        value = DistillationLoss()(student, output)
        value.backward()
        assert value.item() == pytest.approx(0.0, abs=1e-6)
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-6


def test_every_token_is_a_row_and_those_without_a_target_are_left_out() -> None:
    student, teacher = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    labels = torch.zeros(2, 5, dtype=torch.long)
    labels[:, 3:] = -100
    rows = student[:, :3].reshape(-1, 4), teacher[:, :3].reshape(-1, 4)
    got = DistillationLoss(2.0).soft(student, teacher, labels)
    torch.testing.assert_close(got, softened_divergence(*rows, 2.0))
    second = DistillationLoss(2.0).soft(student.movedim(-1, 1), teacher.movedim(-1, 1), labels)  # class axis second
    torch.testing.assert_close(second, got)


def test_padding_is_left_out_of_hidden_states() -> None:
    student, teacher = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    real = torch.ones(2, 5, dtype=torch.long)
    real[:, 3:] = 0
    expected = relative_distance(student[:, :3], teacher[:, :3])
    student[:, 3:] = 1e6
    torch.testing.assert_close(DistillationLoss().soft(student, teacher, None, real), expected)


def test_what_is_learnt_is_chosen_by_targets_and_as_agreement_is_measured() -> None:
    unit = F.normalize(drawn(6, 4), dim=1)
    assert DistillationLoss().decided(TEACHER).kind == "classes"
    assert DistillationLoss().decided(TEACHER.softmax(1)).kind == "classes"
    assert DistillationLoss().decided(unit).kind == "values"
    assert DistillationLoss().decided(drawn(2, 5, 4)).kind == "values"
    assert DistillationLoss().decided(drawn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)).kind == "classes"
    assert DistillationLoss().decided(TEACHER, torch.zeros(6, 4)).kind == "values"
    assert DistillationLoss(kind="classes").decided(unit).kind == "classes"


def test_probabilities_and_single_scores_are_softened_as_the_scores_they_came_from() -> None:
    expected = softened_divergence(STUDENT, TEACHER, 2.0)
    torch.testing.assert_close(DistillationLoss(2.0).soft(STUDENT.softmax(1), TEACHER.softmax(1)), expected)
    z, y = drawn(6), drawn(6, seed=1)
    two = softened_divergence(torch.stack([0 * z, z], 1), torch.stack([0 * y, y], 1), 2.0)
    torch.testing.assert_close(DistillationLoss(2.0).soft(z, y, LABELS.clamp(max=1)), two)


def test_classes_masked_in_both_do_not_count() -> None:
    student, teacher = (torch.cat([x, torch.full((6, 1), -math.inf)], 1) for x in (STUDENT, TEACHER))
    student.requires_grad_()
    value = softened_divergence(student, teacher, 2.0)
    torch.testing.assert_close(value, softened_divergence(STUDENT, TEACHER, 2.0))
    value.backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_values_cost_their_squared_error_over_the_teachers_variance_and_one_minus_the_cosine() -> None:
    teacher, student = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # two of four entries are off by 1, variance 1/4; cosines 1 and 0
    assert relative_distance(student, teacher).item() == pytest.approx(0.5 / 0.25 + 0.5)
    assert relative_distance(teacher[:, 0] + 1, teacher[:, 0]).item() == pytest.approx(1 / 0.25)


def test_outputs_come_in_any_structure_and_the_teachers_have_no_gradient() -> None:
    teacher = TEACHER.clone().requires_grad_()
    student = STUDENT.clone().requires_grad_()
    value = DistillationLoss()(Outputs(loss=torch.tensor(1.0), logits=student), (teacher, drawn(6, 2)))
    value.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_temperature_or_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        DistillationLoss(0.0)
    with pytest.raises(ValueError, match="alpha"):
        DistillationLoss(1.0, 1.5)
