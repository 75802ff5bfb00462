"""Distances between outputs of student and teacher: functions of tensors that return a scalar.

Class scores come as rows (one per sample, token or pixel). The sums over classes of the papers are sums here too,
averaged over rows: no loss depends on the number of rows or on the length of a sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TARGET_WEIGHT, OTHERS_WEIGHT = 1.0, 8.0
"""Weights alpha and beta of decoupled distillation: arXiv:2203.08679, CIFAR-100 tables."""


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 x KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over rows.

    Args:
        student: logits of shape (rows, classes); -inf where a class is masked in both.
        teacher: of the same shape.
        temperature: T, above 0.

    Returns:
        A scalar; 0 without rows. For T to infinity it is the squared distance of the rows' centred logits over twice
        the number of classes.
    """
    if not len(student):
        return student.sum() * 0.0
    return temperature**2 * _divergences(student / temperature, teacher / temperature).mean()


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared differences of logits, averaged over classes and rows, neither centred nor softened.

    Source: Kim et al. 2021, arXiv:2105.08919, whose loss this is (their code has torch's MSELoss, a mean). It learns
    the logits' mean as well, which no softmax sees: the limit of KL for a high temperature, with the means free, is
    what `softened_divergence` has.

    Args:
        student: logits of shape (rows, classes); -inf where a class is masked in both, which is left out.
        teacher: of the same shape.

    Returns:
        A scalar; 0 without rows.
    """
    if not len(student):
        return student.sum() * 0.0
    masked = (student == -math.inf) & (teacher == -math.inf)
    differences = student.masked_fill(masked, 0.0) - teacher.masked_fill(masked, 0.0)
    return differences.square().sum() / (~masked).sum().clamp(min=1)


def decoupled_divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    target_weight: float = TARGET_WEIGHT,
    others_weight: float = OTHERS_WEIGHT,
) -> Tensor:
    """Return T^2 x (target_weight x TCKD + others_weight x NCKD), averaged over rows: decoupled distillation (DKD).

    TCKD is the divergence of (p of the label, p of all others together), NCKD that of the others among themselves. KL
    is TCKD + (1 - the teacher's p of the label) x NCKD: what a sure teacher says of the other classes is lost in it.

    Source: Zhao et al. 2022, arXiv:2203.08679, equations 6 and 7; without the warm-up of its code.

    Args:
        student: logits of shape (rows, classes); -inf where a class is masked in both.
        teacher: of the same shape.
        labels: int64 of shape (rows), each in 0..classes - 1.
        temperature: T, above 0.
        target_weight: alpha in the paper.
        others_weight: beta in the paper.

    Returns:
        A scalar; 0 without rows. With two classes NCKD is 0.
    """
    if not len(student):
        return student.sum() * 0.0
    targets = torch.zeros_like(student, dtype=torch.bool).scatter_(1, labels.reshape(-1, 1), True)
    z, t = student / temperature, teacher / temperature
    others_z, others_t = z.masked_fill(targets, -math.inf), t.masked_fill(targets, -math.inf)
    two_z = torch.stack([z[targets], others_z.logsumexp(1)], 1)  # as logits: softmax of them is (p, 1 - p)
    two_t = torch.stack([t[targets], others_t.logsumexp(1)], 1)
    parts = target_weight * _divergences(two_z, two_t) + others_weight * _divergences(others_z, others_t)
    return temperature**2 * parts.mean()


def correlation_distance(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the DIST loss: T^2 x (1 - mean Pearson correlation of rows, plus the same of columns).

    Rows: how a sample's classes relate; columns: how a class's samples do. Any scale and shift of a row of
    probabilities costs nothing, so a student far smaller than its teacher is not asked for the same confidence.

    Source: Huang et al. 2022, arXiv:2205.10536, equations 8 to 10 with beta = gamma = 1, as its official code has them.
    A single row has no columns to correlate: its intra part is left out.

    Args:
        student: logits of shape (rows, classes); -inf where a class is masked in both.
        teacher: of the same shape.
        temperature: T, above 0.

    Returns:
        A scalar, 0..4 T^2; 0 without rows.
    """
    if not len(student):
        return student.sum() * 0.0
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    distance = 1 - _correlations(p, q).mean()
    if len(student) > 1:
        distance = distance + 1 - _correlations(p.T, q.T).mean()
    return temperature**2 * distance


def relative_distance(
    student: Tensor, teacher: Tensor, keep: Tensor | None = None, cosine: bool = True, spread: float | None = None
) -> Tensor:
    """Return the mean squared error over the teacher's variance, plus 1 - mean cosine of the rows.

    Args:
        student: (…, D), or (N) for one value per sample.
        teacher: of the same shape.
        keep: of the shape of the rows, True where a row counts.
        cosine: False for the first part alone.
        spread: root of the teacher's variance over many samples; default: that of this batch.

    Returns:
        A scalar, 0 where both are the same; the first part is 1 for a student that always answers the teacher's mean.
        The cosine is left out where D is 1: it would be a sign.
    """
    if not teacher.numel():
        return student.sum() * 0.0
    if student.ndim < 2:
        student, teacher = student.reshape(-1, 1), teacher.reshape(-1, 1)
    rows, goals = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    if keep is not None:
        rows, goals = rows[keep.reshape(-1)], goals[keep.reshape(-1)]
    if not len(rows):
        return student.sum() * 0.0
    variance = goals.var(unbiased=False).clamp(min=1e-12) if spread is None else spread**2
    distance = F.mse_loss(rows, goals) / variance
    if rows.shape[1] == 1 or not cosine:
        return distance
    return distance + 1 - F.cosine_similarity(rows, goals, dim=1).mean()


def _divergences(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(softmax(teacher) || softmax(student)) of each row."""
    log_p = F.log_softmax(teacher, 1)
    log_q = F.log_softmax(student, 1)
    p = log_p.exp()
    none = p == 0  # 0 x (-inf - -inf) is 0 here
    return (p * (log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))).sum(1)


def _correlations(student: Tensor, teacher: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Return Pearson's correlation of each pair of rows; 0 where one of them is constant."""
    a, b = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    correlations: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + epsilon)
    return correlations
