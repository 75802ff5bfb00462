"""Learning from a teacher's outputs: softened class scores as Hinton et al. have it, or the values themselves.

Source: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2. The sum over classes is averaged over rows (every
token or pixel is one), so that the loss depends neither on the number of classes nor on the length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omgoptim.measure.quality import agreement_metric
from omgoptim.runtimes.torch_session import to_array
from omgoptim.training.class_scores import IGNORED, ClassScores, is_distribution
from omgoptim.training.losses import main_output

Kind = Literal["auto", "classes", "values"]


class DistillationLoss(nn.Module):
    """Distance between a student's outputs and its teacher's, and its mixture with a loss on targets.

    On class scores, KL divergence from the teacher's softened distribution to the student's, times temperature^2.
    On anything else (embeddings, hidden states, regression): squared error over the teacher's variance, plus 1 - cosine
    of the rows along the last dimension where it has more than one entry.

    Args:
        temperature: what scores are divided by before the softmax; above 1 softens them.
        alpha: weight of the loss on the targets, 0..1; 1 - alpha is that of the teacher. At 1 the teacher has no say,
            at 0 the targets have none.
        kind: `classes`, `values`, or `auto`: integer targets that fit as labels make scores; without them the rule
            by which agreement is measured (two-dimensional outputs whose rows are not of unit length).
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.5, kind: Kind = "auto") -> None:
        super().__init__()
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"temperature must be above 0 and alpha in 0..1, not {temperature:g} and {alpha:g}")
        self.temperature, self.alpha, self.kind = temperature, alpha, kind
        self._scores: ClassScores | None = None

    @property
    def name(self) -> str:
        """In words, for the report."""
        if self.kind == "values":
            return "distance to the original's outputs"
        return f"KL divergence to the original's outputs at temperature {self.temperature:g}"

    def decided(self, teacher: Any, targets: Any = None) -> DistillationLoss:
        """This loss with its kind settled by one batch, so that it cannot change from batch to batch."""
        made = DistillationLoss(self.temperature, self.alpha, self.kind)
        made._scores = None if self.kind == "values" else _class_scores(main_output(teacher), targets, self.kind)
        made.kind = "classes" if made._scores is not None else "values"
        return made

    def forward(
        self, student: Any, teacher: Any, targets: Any = None, hard: Callable[[Any, Any], Tensor] | None = None
    ) -> Tensor:
        """alpha x loss on the targets + (1 - alpha) x `soft`; `soft` alone without targets.

        Args:
            student, teacher: what the two modules return for the same batch.
            targets: labels or values; None without.
            hard: the loss on the targets, `hard(outputs, targets)`; default: cross-entropy of class scores, mean
                squared error otherwise.

        Returns:
            A scalar.
        """
        if targets is None:
            return self.soft(student, teacher)
        return self.mixed(lambda: (hard or self._hard)(student, targets), lambda: self.soft(student, teacher, targets))

    def mixed(self, hard: Callable[[], Tensor], soft: Callable[[], Tensor]) -> Tensor:
        """The two parts by alpha; a part of weight 0 is not computed, so that its infinities do not count."""
        if self.alpha == 1:
            return hard()
        if self.alpha == 0:
            return soft()
        return self.alpha * hard() + (1 - self.alpha) * soft()

    def soft(self, student: Any, teacher: Any, targets: Any = None, real: Tensor | None = None) -> Tensor:
        """The distance to the teacher, a scalar.

        Args:
            targets: rows whose integer target is -100 are left out.
            real: of the rows' shape (batch, or batch and length), nonzero where a row is no padding.
        """
        if self.kind == "auto" or (self.kind == "classes" and self._scores is None):
            return self.decided(teacher, targets).soft(student, teacher, targets, real)
        output, goal = main_output(student), main_output(teacher).detach()
        if self._scores is None:
            return relative_distance(output.float(), goal.float(), _counting(goal.shape[:-1], targets, real))
        rows, goals = self._scores.rows(output), self._scores.rows(goal)
        keep = _counting(torch.Size([len(rows)]), targets, real)
        if keep is not None:
            rows, goals = rows[keep.reshape(-1)], goals[keep.reshape(-1)]
        return softened_divergence(rows, goals, self.temperature)

    def _hard(self, student: Any, targets: Any) -> Tensor:
        output = main_output(student)
        if targets.is_floating_point():
            return F.mse_loss(output.reshape(targets.shape).float(), targets)
        scores = ClassScores.of(output, targets)
        if scores is None:
            raise ValueError(f"integer targets {tuple(targets.shape)} do not fit outputs {tuple(output.shape)}")
        return scores.loss(output, targets)


def softened_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """temperature^2 x KL(softmax(teacher / T) || softmax(student / T)), summed over classes, averaged over rows.

    Args:
        student, teacher: logits of shape (rows, classes); -inf where a class is masked in both.

    Returns:
        A scalar; 0 without rows. For T to infinity it is the squared distance of the rows' centred logits over twice
        the number of classes.
    """
    if not len(student):
        return student.sum() * 0.0
    log_p = F.log_softmax(teacher / temperature, 1)
    log_q = F.log_softmax(student / temperature, 1)
    p = log_p.exp()
    none = p == 0  # 0 x (-inf - -inf) is 0 here
    terms = p * (log_p.masked_fill(none, 0.0) - log_q.masked_fill(none, 0.0))
    return temperature**2 * terms.sum(1).mean()


def relative_distance(student: Tensor, teacher: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean squared error over the teacher's variance, plus 1 - mean cosine of the rows.

    Args:
        student, teacher: (…, D), or (N) for one value per sample.
        keep: of the shape of the rows, True where a row counts.

    Returns:
        A scalar, 0 where both are the same. The cosine is left out where D is 1: it would be a sign.
    """
    if student.ndim < 2:
        student, teacher = student.reshape(-1, 1), teacher.reshape(-1, 1)
    rows, goals = student.reshape(-1, student.shape[-1]), teacher.reshape(-1, teacher.shape[-1])
    if keep is not None:
        rows, goals = rows[keep.reshape(-1)], goals[keep.reshape(-1)]
    if not len(rows):
        return student.sum() * 0.0
    spread = goals.var(unbiased=False).clamp(min=1e-12)
    distance = F.mse_loss(rows, goals) / spread
    if rows.shape[1] == 1:
        return distance
    return distance + 1 - F.cosine_similarity(rows, goals, dim=1).mean()


def _class_scores(output: Tensor, targets: Any, kind: Kind) -> ClassScores | None:
    """How an output's class scores lie; None where it holds none."""
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        fitting = ClassScores.of(output, targets)
        if fitting is not None:
            return fitting
    if kind == "classes":
        return ClassScores(output.shape[-1], -1, is_distribution(output, -1))
    if isinstance(targets, Tensor) and targets.is_floating_point():
        return None
    if agreement_metric([[to_array(output)]]).name != "top1_agreement":
        return None
    return ClassScores(output.shape[1], -1, is_distribution(output, -1))


def _counting(shape: torch.Size, targets: Any, real: Tensor | None) -> Tensor | None:
    """Which rows count, of the rows' shape or flat; None where all do."""
    keep = None
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == shape.numel():
        keep = targets.reshape(shape) != IGNORED
    if real is not None and real.numel() == shape.numel():
        there = real.reshape(shape) != 0
        keep = there if keep is None else keep & there
    return keep
