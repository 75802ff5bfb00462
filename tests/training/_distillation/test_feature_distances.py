from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from omgoptim.training._distillation.distances import (
    ANGLE_ROWS,
    attention_distance,
    hint_distance,
    relation_divergence,
    relation_heads,
    relational_distance,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_hint_costs_its_squared_error_over_the_teachers_variance() -> None:
    teacher = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # variance 5
    assert hint_distance(teacher + 2, teacher).item() == pytest.approx(4 / 5)
    assert hint_distance(torch.full((2, 2), 4.0), teacher).item() == pytest.approx(1.0)
    assert hint_distance(1000 * (teacher + 2), 1000 * teacher).item() == pytest.approx(4 / 5)


def test_padded_tokens_are_left_out_of_a_hint_and_of_attention() -> None:
    student, teacher, real = drawn(2, 4, 3), drawn(2, 4, 3, seed=1), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    expected = hint_distance(student[:, :3], teacher[:, :3])
    maps = student.square().mean(-1), teacher.square().mean(-1)
    of_maps = attention_distance(maps[0][:, :3], maps[1][:, :3])
    torch.testing.assert_close(attention_distance(*maps, real), of_maps)
    student[:, 3] = 1e6
    torch.testing.assert_close(hint_distance(student, teacher, real), expected)
    assert hint_distance(student, teacher, torch.zeros(2, 4)).item() == 0.0


def test_attention_maps_are_compared_as_directions() -> None:
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    assert attention_distance(one, other).item() == pytest.approx(0.4**2 + 0.8**2)  # (0.6, 0.8) against (1, 0)
    assert attention_distance(one, other).item() == pytest.approx(2 - 2 * F.cosine_similarity(one, other).item())
    assert attention_distance(7 * one, one).item() == pytest.approx(0.0, abs=1e-6)
    assert attention_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == pytest.approx(2.0)


def test_relations_of_three_samples_by_hand() -> None:
    right = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # sides 3, 4, 5; cosines 0, 3/5, 4/5
    even = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])  # sides 1, cosines 1/2

    def huber(x: float) -> float:
        return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5

    sides = sum(huber(side / 4 - 1) for side in (3, 4, 5)) / 3
    angles = sum(huber(cosine - 0.5) for cosine in (0, 0.6, 0.8)) / 3
    assert relational_distance(right, even).item() == pytest.approx(sides + 2 * angles, rel=1e-5)


def test_relations_do_not_see_scale_rotation_or_width() -> None:
    teacher = drawn(8, 3)
    turned, _ = torch.linalg.qr(drawn(5, 5, seed=1))
    student = 10 * F.pad(teacher, (0, 2)) @ turned + 3
    assert relational_distance(student, teacher).item() == pytest.approx(0.0, abs=1e-6)
    assert relational_distance(drawn(8, 5, seed=2), teacher).item() > 0.01


def test_angles_are_those_of_all_triples() -> None:
    student, teacher = drawn(5, 4), drawn(5, 3, seed=1)

    def cosine(rows: Tensor, i: int, j: int, k: int) -> Tensor:
        return F.cosine_similarity(rows[j] - rows[i], rows[k] - rows[i], dim=0)

    triples = [(i, j, k) for i in range(5) for j, k in itertools.combinations(range(5), 2) if i not in (j, k)]
    angles = [torch.stack([cosine(rows, *triple) for triple in triples]) for rows in (student, teacher)]
    distances = [d / d.mean() for d in (torch.pdist(student), torch.pdist(teacher))]
    expected = F.smooth_l1_loss(*distances) + 2 * F.smooth_l1_loss(*angles)
    torch.testing.assert_close(relational_distance(student, teacher), expected)


def test_samples_that_are_equal_and_small_batches_have_finite_relations() -> None:
    student = torch.ones(4, 3).requires_grad_()
    relational_distance(student, drawn(4, 3)).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    doubled = drawn(4, 3, seed=3)[[0, 1, 1, 2]].requires_grad_()
    relational_distance(doubled, drawn(4, 3)).backward()
    assert doubled.grad is not None
    assert doubled.grad.abs().max() < 10
    assert relational_distance(drawn(1, 3), drawn(1, 3, seed=1)).item() == 0.0
    assert relational_distance(drawn(2, 3), drawn(2, 3, seed=1)).item() == 0.0  # one distance is its own mean
    many = drawn(ANGLE_ROWS + 40, 2)
    assert torch.isfinite(relational_distance(many, many + drawn(*many.shape, seed=1)))


def test_relations_of_tokens_by_hand() -> None:
    student = torch.zeros(1, 2, 1)  # all relations even
    teacher = torch.tensor([[[1.0], [2.0]]])  # products 1, 2 / 2, 4
    divergences = []
    for row in ((1.0, 2.0), (2.0, 4.0)):
        p = [math.exp(x) / sum(math.exp(y) for y in row) for x in row]
        divergences.append(sum(a * math.log(a / 0.5) for a in p))
    got = relation_divergence(student, teacher, 1)
    assert got.item() == pytest.approx(sum(divergences) / 2, rel=1e-5)


def test_relations_of_tokens_are_torchs_attention_weights_and_kl() -> None:
    student, teacher = drawn(2, 5, 8), drawn(2, 5, 12, seed=1)

    def weights(vectors: Tensor) -> Tensor:
        split = vectors.unflatten(2, (4, -1)).transpose(1, 2)
        eye = torch.eye(5).expand(2, 4, 5, 5)
        return F.scaled_dot_product_attention(split, split, eye)  # what is attended to is which token it is

    p, q = weights(teacher), weights(student)
    expected = F.kl_div(q.log().flatten(0, 2), p.flatten(0, 2), reduction="batchmean")
    torch.testing.assert_close(relation_divergence(student, teacher, 4), expected)


def test_padded_tokens_have_no_relations() -> None:
    student, teacher, real = drawn(2, 5, 8), drawn(2, 5, 8, seed=1), torch.ones(2, 5)
    real[:, 3:] = 0
    expected = relation_divergence(student[:, :3], teacher[:, :3], 2)
    student[:, 3:], teacher[:, 3:] = 50.0, -50.0
    torch.testing.assert_close(relation_divergence(student, teacher, 2, real), expected)
    assert relation_divergence(teacher, teacher, 2).item() == 0.0


def test_relation_heads_divide_both_widths_and_leave_eight_features_each() -> None:
    assert relation_heads(384, 768) == 48
    assert relation_heads(384, 384) == 48
    assert relation_heads(64, 96) == 8
    assert relation_heads(8, 16) == 1
    assert relation_heads(100, 30) == 2
