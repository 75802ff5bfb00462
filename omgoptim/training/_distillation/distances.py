"""Distances between outputs or layers of student and teacher: functions of tensors that return a scalar.

Class scores come as rows (one per sample, token or pixel). The sums over classes of the papers are sums here too,
averaged over rows: no loss depends on the number of rows or on the length of a sequence. Distances of layers are scaled
to the order of 1 for unlike features, whatever the layers' widths and scales, so that a weight of 1 beside an output
loss is reasonable; the weights of the papers, for their own scales, do not apply.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TARGET_WEIGHT, OTHERS_WEIGHT = 1.0, 8.0
"""Weights alpha and beta of decoupled distillation: arXiv:2203.08679, CIFAR-100 tables."""

ANGLE_WEIGHT = 2.0
"""Weight of the angle term beside the distance term: arXiv:1904.05068, section 4 (lambda 1 and 2)."""

ANGLE_ROWS = 128
"""Maximum samples per batch whose angles are compared. Chosen by memory, which grows with their cube: 8 MB."""


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
