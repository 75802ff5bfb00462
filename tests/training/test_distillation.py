from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omgoptim.errors import DataError, TechniqueError
from omgoptim.runtimes.signature import Outputs
from omgoptim.training._distillation.distances import (
    correlation_distance,
    decoupled_divergence,
    relative_distance,
    softened_divergence,
    squared_distance,
)
from omgoptim.training.distillation import DistillationLoss, Form


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 3, 1, 2, 1, 0])
STUDENT, TEACHER = drawn(6, 4), drawn(6, 4, seed=1) * 3


def test_at_alpha_one_it_is_cross_entropy_and_at_alpha_zero_the_divergence_exactly() -> None:
    assert torch.equal(DistillationLoss(4.0, 1.0)(STUDENT, TEACHER, LABELS), F.cross_entropy(STUDENT, LABELS))
    soft = softened_divergence(STUDENT, TEACHER, 4.0)
    assert torch.equal(DistillationLoss(4.0, 0.0)(STUDENT, TEACHER, LABELS), soft)
    mixed = 0.25 * F.cross_entropy(STUDENT, LABELS) + 0.75 * soft
    torch.testing.assert_close(DistillationLoss(4.0, 0.25)(STUDENT, TEACHER, LABELS), mixed)
    assert torch.equal(DistillationLoss(4.0, 0.25, form="hinton")(STUDENT, TEACHER), soft)


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
    assert DistillationLoss().resolved(TEACHER).kind == "values"
    assert DistillationLoss().resolved(TEACHER, LABELS).kind == "classes"
    assert DistillationLoss().resolved(TEACHER.softmax(1)).kind == "classes"
    assert DistillationLoss().resolved(unit).kind == "values"
    assert DistillationLoss().resolved(drawn(2, 5, 4)).kind == "values"
    assert DistillationLoss().resolved(drawn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long)).kind == "classes"
    assert DistillationLoss().resolved(TEACHER, torch.zeros(6, 4)).kind == "values"
    assert DistillationLoss(kind="classes").resolved(unit).kind == "classes"


def test_probabilities_and_single_scores_are_softened_as_the_scores_they_came_from() -> None:
    expected = softened_divergence(STUDENT, TEACHER, 2.0)
    torch.testing.assert_close(DistillationLoss(2.0).soft(STUDENT.softmax(1), TEACHER.softmax(1)), expected)
    z, y = drawn(6), drawn(6, seed=1)
    two = softened_divergence(torch.stack([0 * z, z], 1), torch.stack([0 * y, y], 1), 2.0)
    torch.testing.assert_close(DistillationLoss(2.0).soft(z, y, LABELS.clamp(max=1)), two)


def test_outputs_come_in_any_structure_and_the_teachers_have_no_gradient() -> None:
    teacher = TEACHER.clone().requires_grad_()
    student = STUDENT.clone().requires_grad_()
    value = DistillationLoss()(Outputs(loss=torch.tensor(1.0), logits=student), (teacher,))
    value.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_temperature_or_alpha_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        DistillationLoss(0.0)
    with pytest.raises(ValueError, match="alpha"):
        DistillationLoss(1.0, 1.5)
    with pytest.raises(ValueError, match="form"):
        DistillationLoss(form="l2")  # type: ignore[arg-type]


FORMS: dict[Form, Tensor] = {
    "auto": softened_divergence(STUDENT, TEACHER, 2.0),
    "hinton": softened_divergence(STUDENT, TEACHER, 2.0),
    "mse": squared_distance(STUDENT, TEACHER),
    "dkd": decoupled_divergence(STUDENT, TEACHER, LABELS, 2.0),
    "dist": correlation_distance(STUDENT, TEACHER, 2.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_its_distance_of_rows_and_mixes_by_alpha(form: Form) -> None:
    hard = F.cross_entropy(STUDENT, LABELS)
    assert torch.equal(DistillationLoss(2.0, 0.0, form=form)(STUDENT, TEACHER, LABELS), FORMS[form])
    assert torch.equal(DistillationLoss(2.0, 1.0, form=form)(STUDENT, TEACHER, LABELS), hard)
    mixed = DistillationLoss(2.0, 0.25, form=form)(STUDENT, TEACHER, LABELS)
    torch.testing.assert_close(mixed, 0.25 * hard + 0.75 * FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_leaves_out_tokens_without_a_target_and_padding(form: Form) -> None:
    student, teacher, labels = drawn(2, 5, 4), drawn(2, 5, 4, seed=1), torch.arange(10).reshape(2, 5) % 4
    labels[0, 3:] = -100
    real = torch.ones(2, 5, dtype=torch.long)
    real[1, 2:] = 0
    keep = (labels != -100) & (real != 0)
    loss = DistillationLoss(2.0, form=form)
    expected = loss.soft(student[keep], teacher[keep], labels[keep])
    student[~keep] = 1e4
    torch.testing.assert_close(loss.resolved(teacher, labels).soft(student, teacher, labels, real), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_settled_form_stays_and_is_named_for_the_report(form: Form) -> None:
    settled = DistillationLoss(2.0, form=form).resolved(TEACHER, LABELS)
    assert (settled.kind, settled.form) == ("classes", form)
    word = {"auto": "KL", "hinton": "KL", "mse": "squared error", "dkd": "decoupled", "dist": "DIST"}[form]
    assert word in settled.name
    assert ("temperature 2" in settled.name) == (form != "mse")


def test_values_have_a_form_without_cosine_and_refuse_those_for_classes() -> None:
    student, teacher = drawn(2, 5, 4), drawn(2, 5, 4, seed=1)
    settled = DistillationLoss(form="mse").resolved(teacher)
    assert settled.kind == "values"
    torch.testing.assert_close(settled.soft(student, teacher), relative_distance(student, teacher, cosine=False))
    for form in ("hinton", "dkd", "dist"):
        with pytest.raises(TechniqueError, match=form) as error:
            DistillationLoss(form=form).resolved(teacher)
        assert "auto or mse" in error.value.fix


@pytest.mark.parametrize("targets", [None, LABELS[:3]])
def test_decoupled_distillation_without_a_label_for_each_row_says_what_to_use(targets: Tensor | None) -> None:
    with pytest.raises(DataError, match="label of each row") as error:
        DistillationLoss(form="dkd").resolved(TEACHER, targets)
    assert "hinton" in error.value.fix
    with pytest.raises(DataError, match="out of range"):
        DistillationLoss(form="dkd").resolved(TEACHER, LABELS + 1)


@pytest.mark.parametrize("teacher", [drawn(6, 5), drawn(5, 4), drawn(6, 4, 4)])
def test_outputs_of_two_shapes_are_refused_with_both(teacher: Tensor) -> None:
    with pytest.raises(DataError, match="different shapes") as error:
        DistillationLoss()(STUDENT, teacher, LABELS)
    assert str(tuple(teacher.shape)) in error.value.why
    assert "(6, 4)" in error.value.why


BOXES, OTHER_BOXES = drawn(6, 3, seed=2), drawn(6, 3, seed=3)


def test_every_output_is_learnt_and_only_the_labelled_one_is_weighed_by_alpha() -> None:
    student, teacher = (BOXES, STUDENT.softmax(1)), (OTHER_BOXES, TEACHER.softmax(1))
    hard = F.cross_entropy(STUDENT, LABELS)
    soft = softened_divergence(STUDENT, TEACHER, 2.0)
    boxes = F.mse_loss(BOXES, OTHER_BOXES) / float(OTHER_BOXES.var(0).mean())
    for alpha in (0.0, 0.25, 1.0):
        got = DistillationLoss(2.0, alpha)(student, teacher, LABELS)
        torch.testing.assert_close(got, alpha * hard + (1 - alpha) * soft + boxes)
    torch.testing.assert_close(DistillationLoss(2.0).soft(student, teacher), soft_without_labels(student, teacher))


def soft_without_labels(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """The first output with its cosine, the scores by their divergence."""
    scores = softened_divergence(student[1].log(), teacher[1].log(), 2.0)
    return relative_distance(student[0], teacher[0]) + scores


def test_outputs_beside_the_main_one_are_named_and_integers_are_not_learnt() -> None:
    outputs = {"boxes": BOXES, "logits": TEACHER, "ids": torch.arange(6)}
    settled = DistillationLoss().resolved(outputs, LABELS)
    assert settled.indices == {0, 1}
    assert settled.others_name == "distance to the teacher's output_0"
    assert settled.has_other_outputs
    assert not DistillationLoss().resolved(TEACHER, LABELS).has_other_outputs


@pytest.mark.parametrize("main", [True, False])
def test_scores_beside_boxes_in_pixels_are_learnt_as_much_as_the_boxes(main: bool) -> None:
    spreads = torch.tensor([100.0, 100.0, 100.0, 100.0, 0.05, 0.05])[:, None]
    teacher = drawn(200, 6, 5) * spreads + 300 * (spreads > 1)
    wrapped = (lambda each: each) if main else lambda each: (drawn(200, 3, seed=2), each)
    loss = DistillationLoss(form="mse").resolved(wrapped(teacher))
    distances = []
    for channel in range(6):
        student = teacher.clone()
        student[:, channel] += spreads[channel]
        distances.append(float(loss.soft(wrapped(student), wrapped(teacher))))
    assert distances == pytest.approx([1 / 6] * 6, rel=0.1)  # one standard deviation wrong in one of six channels
    assert ("each column divided by its own standard deviation" in loss.name) == main
