"""Distances between features of student and teacher: functions of tensors that return a scalar.

Each is scaled to the order of 1 for unlike features, whatever the layers' widths and scales, so that a weight of 1
beside an output loss is reasonable. The weights of the papers, for their own scales, do not apply.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ANGLE_WEIGHT = 2.0
"""Weight of the angle term beside the distance term: arXiv:1904.05068, section 4 (lambda 1 and 2)."""

ANGLE_ROWS = 128
"""Maximum samples per batch whose angles are compared: memory grows with their cube (2 M angles, 8 MB at 128)."""


def hint_distance(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the mean squared error over the teacher's variance: 1 for a student that always gives the teacher's mean.

    Source: Romero et al. 2015, arXiv:1412.6550, equation 3; the division is ours.

    Args:
        student: (batch, D, …) or (batch, …, D).
        teacher: of the same shape.
        real: (batch, length), nonzero where a token is not padding; for outputs (batch, length, D).

    Returns:
        A scalar, 0 where both are the same.
    """
    if real is not None:
        student, teacher = student[real != 0], teacher[real != 0]
    if not student.numel():
        return student.sum() * 0.0
    return F.mse_loss(student, teacher) / teacher.var(unbiased=False).clamp(min=1e-12)


def attention_distance(student: Tensor, teacher: Tensor, real: Tensor | None = None) -> Tensor:
    """Return the squared distance of normalized attention maps, averaged over samples: 2 (1 - cosine), 0..2.

    A map is the mean of squared activations over channels. Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928,
    equation 2, squared as in its code, which then takes the mean over positions (and a weight of 1000) where this has
    the sum.

    Args:
        student: (batch, positions), maps that are not negative.
        teacher: of the same shape.
        real: (batch, positions), nonzero where a token is not padding.
    """
    if real is not None:
        student, teacher = student * (real != 0), teacher * (real != 0)
    return (F.normalize(student, dim=1) - F.normalize(teacher, dim=1)).square().sum(1).mean()


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return Huber losses between the samples' normalized distances and, with weight 2, between their angles.

    Distances are relative and angles cosines, so both are of the order of 1 whatever the widths, which may differ.
    Source: Park et al. 2019, arXiv:1904.05068, equations 4 to 9, weights 1 and 2. Means are over all pairs of two
    different samples and all triples of three, where its code counts each sample with itself too.

    Args:
        student: embeddings (batch, D).
        teacher: embeddings (batch, E).

    Returns:
        A scalar; 0 for a batch of one sample, and without angles for one of two.
    """
    if len(student) < 2:
        return student.sum() * 0.0
    distance = F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
    student, teacher = student[:ANGLE_ROWS], teacher[:ANGLE_ROWS]
    if len(student) < 3:
        return distance
    return distance + ANGLE_WEIGHT * F.smooth_l1_loss(_angles(student), _angles(teacher))


def relation_divergence(student: Tensor, teacher: Tensor, heads: int, real: Tensor | None = None) -> Tensor:
    """Return KL of the teacher's token relations to the student's, in nats, averaged over heads and tokens.

    A relation is the softmax of the scaled products of a token's vector with all tokens': attention without the model's
    own heads, so that widths and numbers of heads may differ. Source: Wang et al. 2021, arXiv:2012.15828, equations 3
    to 5.

    Args:
        student: queries, keys or values of an attention, (batch, length, D).
        teacher: those of the teacher, (batch, length, E).
        heads: relation heads; divides D and E.
        real: (batch, length), nonzero where a token is not padding.
    """
    log_q, log_p = _log_relations(student, heads, real), _log_relations(teacher, heads, real)
    divergences = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)  # (batch, length)
    if real is None:
        return divergences.mean()
    counts = real != 0
    return divergences.masked_fill(~counts, 0.0).sum() / counts.sum().clamp(min=1)


def relation_heads(student: int, teacher: int) -> int:
    """Return the most relation heads, up to 48, that divide both widths and leave 8 features each; 1 if none."""
    common = math.gcd(student, teacher)
    fitting = [heads for heads in range(1, 49) if common % heads == 0 and min(student, teacher) // heads >= 8]
    return max(fitting, default=1)


def _relative_distances(rows: Tensor) -> Tensor:
    """Return the distances of all pairs of rows over their mean, as one vector."""
    distances = torch.pdist(rows)
    return distances / distances.mean().clamp(min=1e-12)


def _angles(rows: Tensor) -> Tensor:
    """Return the cosine of the angle at sample i between samples j and k, for all distinct i, j < k, as one vector."""
    apart = rows.unsqueeze(0) - rows.unsqueeze(1)  # (i, j, D): from i to j
    norms = apart.norm(dim=2, keepdim=True)
    same = norms <= 1e-12  # samples that are equal have no direction between them, and no gradient through it
    to = (apart / norms.masked_fill(same, 1.0)).masked_fill(same, 0.0)
    cosines: Tensor = to @ to.transpose(1, 2)  # (i, j, k)
    index = torch.arange(len(rows), device=rows.device)
    i, j, k = index.view(-1, 1, 1), index.view(1, -1, 1), index.view(1, 1, -1)
    return cosines[(j < k) & (i != j) & (i != k)]


def _log_relations(vectors: Tensor, heads: int, real: Tensor | None) -> Tensor:
    """Return the logarithm of the relations, (batch, heads, length, length)."""
    batch, length, width = vectors.shape
    split = vectors.reshape(batch, length, heads, width // heads).transpose(1, 2)
    products = split @ split.transpose(2, 3) / math.sqrt(width // heads)
    if real is not None:  # padding is nobody's relation; a large number where -inf would make NaN of 0 x -inf
        products = products.masked_fill((real == 0)[:, None, None, :], -1e9)
    return F.log_softmax(products, -1)
