"""Learning from a teacher's outputs: scores of classes in one of four ways, or the values themselves.

Sources: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2; Kim et al. 2021, arXiv:2105.08919; Zhao et al. 2022,
arXiv:2203.08679 (DKD); Huang et al. 2022, arXiv:2205.10536 (DIST). Where each differs is told beside its function, in
`output_distances`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omgoptim.errors import DataError, TechniqueError
from omgoptim.training.class_scores import IGNORED, ClassScores, is_distribution
from omgoptim.training.losses import main_output
from omgoptim.training.output_distances import (
    correlation_distance,
    decoupled_divergence,
    relative_distance,
    softened_divergence,
    squared_distance,
)

Kind = Literal["auto", "classes", "values"]
Form = Literal["auto", "hinton", "mse", "dkd", "dist"]


class DistillationLoss(nn.Module):
    """Distance between a student's outputs and its teacher's, and its mixture with a loss on targets.

    With p and q the softmax of the teacher's and of the student's logits over the temperature T, a row being a sample,
    a token or a pixel, the distance of class scores is by `form`, averaged over rows:
    hinton  T^2 x KL(p || q).
    mse     the mean square of the differences of logits, T having no part in it.
    dkd     T^2 x (KL of label against others, plus 8 x KL among the others). Needs labels.
    dist    T^2 x (1 - Pearson's correlation of p and q over classes, plus the same over the rows of the batch).
    Of anything else (embeddings, hidden states, regression), `auto`: squared error over the teacher's variance, plus
    1 - cosine of the rows along the last dimension where it has more than one entry; `mse`: the first of the two.
    The mixture is alpha x loss on the targets + (1 - alpha) x distance.

    Args:
        temperature: what scores are divided by before the softmax; above 1 softens them.
        alpha: weight of the loss on the targets, 0..1; 1 - alpha is that of the teacher. At 1 the teacher has no say,
            at 0 the targets have none.
        kind: `classes`, `values`, or `auto`: integer targets that fit as labels make scores; without them the rule
            by which agreement is measured (two-dimensional outputs whose rows are not of unit length).
        form: the distance; `auto` is hinton for classes.
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.5, kind: Kind = "auto", form: Form = "auto") -> None:
        super().__init__()
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"temperature must be above 0 and alpha in 0..1, not {temperature:g} and {alpha:g}")
        if kind not in get_args(Kind) or form not in get_args(Form):
            raise ValueError(f"kind is one of {', '.join(get_args(Kind))} and form one of {', '.join(get_args(Form))}")
        self.temperature, self.alpha, self.kind, self.form = temperature, alpha, kind, form
        self._scores: ClassScores | None = None

    @property
    def name(self) -> str:
        """In words, for the report."""
        if self.kind == "values":
            return f"{'squared error against' if self.form == 'mse' else 'distance to'} the teacher's outputs"
        if self.form == "mse":
            return "squared error against the teacher's logits"
        distance = {"dkd": "decoupled KL divergence to", "dist": "DIST (correlation) distance to"}
        words = distance.get(self.form, "KL divergence to")
        return f"{words} the teacher's outputs at temperature {self.temperature:g}"

    def decided(self, teacher: Any, targets: Any = None) -> DistillationLoss:
        """This loss with its kind settled by one batch, so that it cannot change from batch to batch.

        Raises:
            TechniqueError: the outputs are values, and the form is one for class scores.
            DataError: dkd without a label for each row.
        """
        made = DistillationLoss(self.temperature, self.alpha, self.kind, self.form)
        output = main_output(teacher)
        made._scores = None if self.kind == "values" else _class_scores(output, targets, self.kind)
        made.kind = "classes" if made._scores is not None else "values"
        if made.kind == "values" and self.form not in ("auto", "mse"):
            raise TechniqueError(
                f"{self.form} compares scores of classes, and the teacher's outputs are none",
                f"outputs of shape {tuple(output.shape)} without integer targets that fit them are taken for values",
                "use the output loss auto or mse, or give labels; in Python, kind='classes' says that they are scores",
            )
        if made._scores is not None and self.form == "dkd":
            made._scores.check(_labels(output, made._scores, targets))
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

        Raises:
            DataError: the outputs are of two shapes; dkd without labels.
            TechniqueError: as `decided`.
        """
        output, goal = main_output(student), main_output(teacher).detach()
        same_shape(output, goal)
        if self.kind == "auto" or (self.kind == "classes" and self._scores is None):
            return self.decided(teacher, targets).soft(student, teacher, targets, real)
        if self._scores is None:
            keep = _counting(goal.shape[:-1], targets, real)
            return relative_distance(output.float(), goal.float(), keep, cosine=self.form != "mse")
        rows, goals = self._scores.rows(output), self._scores.rows(goal)
        labels = _labels(goal, self._scores, targets).reshape(-1) if self.form == "dkd" else None
        keep = _counting(torch.Size([len(rows)]), targets, real)
        if keep is not None:
            keep = keep.reshape(-1)
            rows, goals, labels = rows[keep], goals[keep], None if labels is None else labels[keep]
        if labels is not None:
            return decoupled_divergence(rows, goals, labels, self.temperature)
        if self.form == "mse":
            return squared_distance(rows, goals)
        distance = correlation_distance if self.form == "dist" else softened_divergence
        return distance(rows, goals, self.temperature)

    def _hard(self, student: Any, targets: Any) -> Tensor:
        output = main_output(student)
        if targets.is_floating_point():
            return F.mse_loss(output.reshape(targets.shape).float(), targets)
        scores = ClassScores.of(output, targets)
        if scores is None:
            raise ValueError(f"integer targets {tuple(targets.shape)} do not fit outputs {tuple(output.shape)}")
        return scores.loss(output, targets)


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise a DataError if a teacher's output cannot be compared with a student's, entry by entry."""
    if student.shape == teacher.shape:
        return
    gave = f"the student gives {tuple(student.shape)} and the teacher {tuple(teacher.shape)}"
    if len(student) != len(teacher):
        fix = "let both return one row per sample of the batch, their predictions first"
    else:
        fix = (
            "give the student as many outputs as the teacher (the same classes, or a projection to the same width), "
            "or learn from its layers alone: features relational, alpha 1"
        )
    raise DataError(
        "the student's outputs and the teacher's are of different shapes", f"{gave} for the same batch", fix
    )


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
    if output.ndim != 2 or output.shape[1] < 2 or not is_distribution(output, -1):
        return None
    return ClassScores(output.shape[1], -1, probabilities=True)


def _labels(output: Tensor, scores: ClassScores, targets: Any) -> Tensor:
    """The label of each row, in the rows' order."""
    rows = output.numel() // (scores.classes if scores.axis is not None else 1)
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == rows:
        return targets
    got = f"integer targets {tuple(targets.shape)}" if isinstance(targets, Tensor) else "no labels"
    if isinstance(targets, Tensor) and targets.is_floating_point():
        got = f"float targets {tuple(targets.shape)}"
    raise DataError(
        "decoupled distillation (dkd) needs the label of each row",
        f"there are {got} for outputs of shape {tuple(output.shape)}",
        "use the output loss hinton, which needs none, or give labels",
    )


def _counting(shape: torch.Size, targets: Any, real: Tensor | None) -> Tensor | None:
    """Which rows count, of the rows' shape or flat; None where all do."""
    keep = None
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == shape.numel():
        keep = targets.reshape(shape) != IGNORED
    if real is not None and real.numel() == shape.numel():
        there = real.reshape(shape) != 0
        keep = there if keep is None else keep & there
    return keep
