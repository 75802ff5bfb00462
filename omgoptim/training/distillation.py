"""Knowledge distillation from a teacher's outputs: class scores by one of four losses, or values.

Sources: Hinton, Vinyals & Dean 2015, arXiv:1503.02531, section 2; Kim et al. 2021, arXiv:2105.08919; Zhao et al. 2022,
arXiv:2203.08679 (DKD); Huang et al. 2022, arXiv:2205.10536 (DIST). Deviations from each are noted in
`_distillation/distances.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omgoptim.errors import DataError, TechniqueError, argument
from omgoptim.models.labels import IGNORED
from omgoptim.models.outputs import ModelOutputs, OutputSpec
from omgoptim.training._distillation.distances import (
    correlation_distance,
    decoupled_divergence,
    relative_distance,
    softened_divergence,
    squared_distance,
)
from omgoptim.training.class_scores import ClassScores, is_distribution
from omgoptim.training.losses import OVER_SCALES, described_tensors, main_output, over_scales, tensor_outputs

Kind = Literal["auto", "classes", "values"]
Form = Literal["auto", "hinton", "mse", "dkd", "dist"]


class DistillationLoss(nn.Module):
    """Knowledge-distillation loss: a distance between outputs of student and teacher, mixed with a loss on targets.

    With p and q the softmax of the teacher's and of the student's logits over the temperature T, a row being a sample,
    a token or a pixel, the distance of class scores is by `form`, averaged over rows:
    hinton  T^2 x KL(p || q).
    mse     the mean square of the differences of logits, independent of T.
    dkd     T^2 x (KL of label against others, plus 8 x KL among the others). Needs labels.
    dist    T^2 x (1 - Pearson's correlation of p and q over classes, plus the same over the rows of the batch).
    Of anything else (embeddings, hidden states, regression), `auto`: squared error over the teacher's variance, plus
    1 - cosine of the rows along the last dimension where it has more than one entry; `mse`: the first of the two. Where
    entries are of far different scales (boxes in pixels beside scores), each is in units of its own spread.
    The mixture is alpha x loss on the targets + (1 - alpha) x distance.
    This applies to the main output: the one that the targets belong to, else the first. Each other floating output adds
    its own distance, whatever alpha is: KL divergence of class scores at T, else squared error over the variance.

    Args:
        temperature: what scores are divided by before the softmax; above 1 softens them.
        alpha: weight of the loss on the targets, 0..1; 1 - alpha is that of the teacher. At 1 the teacher is
            ignored, at 0 the targets.
        kind: of the main output: `classes`, `values`, or `auto`: integer targets that fit as labels make scores, and
            without them rows that sum to one, or a form that is for classes.
        form: the distance; `auto` is hinton for classes.

    Example:
        >>> import torch, omgoptim
        >>> loss = omgoptim.DistillationLoss(temperature=2.0, alpha=0.3)
        >>> student, teacher = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
        >>> value = loss(student, teacher, targets=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))
        >>> value.shape, value.requires_grad
        (torch.Size([]), True)
    """

    def __init__(self, temperature: float = 4.0, alpha: float = 0.5, kind: Kind = "auto", form: Form = "auto") -> None:
        super().__init__()
        if not temperature > 0 or not 0 <= alpha <= 1:
            raise ValueError(f"temperature must be above 0, alpha in 0..1, not {temperature:g} and {alpha:g}")
        if kind not in get_args(Kind) or form not in get_args(Form):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, form of {', '.join(get_args(Form))}")
        self.temperature, self.alpha, self.kind, self.form = temperature, alpha, kind, form
        self._main: _LearnedOutput | None = None
        self._others: tuple[_LearnedOutput, ...] = ()
        self._count: int | None = None

    @property
    def has_other_outputs(self) -> bool:
        """Return whether outputs other than the main one are learned; known once the loss is resolved."""
        return bool(self._others)

    @property
    def indices(self) -> frozenset[int]:
        """Positions of the learned outputs; known once the loss is resolved."""
        return frozenset(learned.spec.index for learned in (self._main, *self._others) if learned is not None)

    @property
    def others_name(self) -> str:
        """Description of the losses on the other outputs; empty without any."""
        names = ", ".join(learned.spec.name for learned in self._others)
        return f"distance to the teacher's {names}" if names else ""

    @property
    def name(self) -> str:
        """Description of the loss on the main output, for the report."""
        if self.kind == "values":
            scaled = OVER_SCALES if self._main is not None and self._main.spec.scales else ""
            return f"{'squared error against' if self.form == 'mse' else 'distance to'} the teacher's outputs{scaled}"
        if self.form == "mse":
            return "squared error against the teacher's logits"
        distance = {"dkd": "decoupled KL divergence to", "dist": "DIST (correlation) distance to"}
        words = distance.get(self.form, "KL divergence to")
        return f"{words} the teacher's outputs at temperature {self.temperature:g}"

    def resolved(self, teacher: Any, targets: Any = None, outputs: ModelOutputs | None = None) -> DistillationLoss:
        """Return this loss with its kinds resolved on one batch, so that they cannot change between batches.

        Args:
            teacher: the teacher's outputs for a batch.
            targets: of the same batch; None without.
            outputs: what the teacher's outputs are; default: read from this batch.

        Raises:
            TechniqueError: the main output is not class scores, and the form is one for those.
            DataError: dkd without a label for each row.
        """
        loss = DistillationLoss(self.temperature, self.alpha, self.kind, self.form)
        leaves = tensor_outputs(teacher, None if outputs is None else len(outputs.specs))
        main_output(leaves)  # raises where there is none at all
        outputs = outputs or described_tensors(leaves, targets)
        learnable = [spec for spec in outputs.compared if spec.kind != "integers" and "complex" not in spec.dtype]
        main = outputs.labelled if outputs.labelled in learnable else learnable[0] if learnable else None
        if main is None:
            raise TechniqueError(
                "the teacher has no floating-point output to distill from",
                f"its outputs: {', '.join(f'{spec.name} {spec.dtype}' for spec in outputs.specs)}",
                "return real tensors (torch.view_as_real for complex ones), or give labels and "
                f"{argument('loss', 'file.py:callable')}",
            )
        loss._count = len(outputs.specs)
        scores = (
            None if self.kind == "values" else _class_scores(leaves[main.index], targets, self.kind, self.form, main)
        )
        loss._main = _LearnedOutput(main, scores, None)
        loss._others = tuple(
            _LearnedOutput(spec, ClassScores.of_spec(spec, leaves[spec.index]), spec.spread)
            for spec in learnable
            if spec is not main
        )
        loss.kind = "classes" if scores is not None else "values"
        if loss.kind == "values" and self.form not in ("auto", "mse"):
            raise TechniqueError(
                f"output loss {self.form} needs class logits, and the teacher's output is not known to be any",
                f"without integer labels that fit it, an output of shape {tuple(leaves[main.index].shape)} is read as "
                "regression values",
                "use output loss auto or mse, or give integer labels; in Python, kind='classes' marks it as logits",
            )
        if scores is not None and self.form == "dkd":
            scores.check(_labels(leaves[main.index], scores, targets))
        return loss

    def forward(
        self, student: Any, teacher: Any, targets: Any = None, hard: Callable[[Any, Any], Tensor] | None = None
    ) -> Tensor:
        """Return the loss on the targets and the distance to the teacher, weighted; a scalar.

        alpha x loss on the targets + (1 - alpha) x distance of the main output + distances of the others; `soft` alone
        without targets.

        Args:
            student: what the student returns for a batch.
            teacher: what the teacher returns for it.
            targets: labels or values; None without.
            hard: the loss on the targets, `hard(outputs, targets)`; default: cross-entropy of class scores, mean
                squared error otherwise.

        Returns:
            A scalar.
        """
        resolved = self if self._main is not None else self.resolved(teacher, targets)
        if targets is None:
            return resolved.soft(student, teacher)
        return resolved.mix(
            lambda: (hard or resolved._hard)(student, targets),
            lambda: resolved.main(student, teacher, targets),
            lambda: resolved.others(student, teacher),
        )

    def mix(
        self, hard: Callable[[], Tensor], soft: Callable[[], Tensor], others: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Mix the two parts by alpha; a part of weight 0 is not computed, so that its infinities do not count."""
        if self.alpha == 1:
            value = hard()
        elif self.alpha == 0:
            value = soft()
        else:
            value = self.alpha * hard() + (1 - self.alpha) * soft()
        return value + others() if others is not None and self._others else value

    def soft(self, student: Any, teacher: Any, targets: Any = None, real: Tensor | None = None) -> Tensor:
        """Return the distance to the teacher in all outputs, a scalar.

        Args:
            student: what the student returns for a batch.
            teacher: what the teacher returns for it.
            targets: rows of the main output whose integer target is -100 are left out.
            real: of the rows' shape (batch, or batch and length), nonzero where a row is not padding.

        Raises:
            DataError: the outputs are of two shapes; dkd without labels.
            TechniqueError: as `resolved`.
        """
        if self._main is None:
            return self.resolved(teacher, targets).soft(student, teacher, targets, real)
        value = self.main(student, teacher, targets, real)
        return value + self.others(student, teacher, real) if self._others else value

    def main(self, student: Any, teacher: Any, targets: Any = None, real: Tensor | None = None) -> Tensor:
        """Return the distance to the teacher in the main output, as `soft`; the loss must be resolved."""
        if self._main is None:
            raise ValueError("call resolved() first: the loss does not know the model's outputs yet")
        output, target = self._pair(self._main, student, teacher)
        scores = self._main.scores
        if scores is None:
            keep = _row_mask(target.shape[:-1], targets, real)
            return self._main.distance(output, target, keep, cosine=self.form != "mse")
        rows, goals = scores.rows(output), scores.rows(target)
        labels = _labels(target, scores, targets).reshape(-1) if self.form == "dkd" else None
        keep = _row_mask(torch.Size([len(rows)]), targets, real)
        if keep is not None:
            keep = keep.reshape(-1)
            rows, goals, labels = rows[keep], goals[keep], None if labels is None else labels[keep]
        if labels is not None:
            return decoupled_divergence(rows, goals, labels, self.temperature)
        if self.form == "mse":
            return squared_distance(rows, goals)
        distance = correlation_distance if self.form == "dist" else softened_divergence
        return distance(rows, goals, self.temperature)

    def others(self, student: Any, teacher: Any, real: Tensor | None = None) -> Tensor:
        """Return the sum of the distances to the teacher in the other outputs; 0 without any."""
        total = torch.zeros(())
        for learned in self._others:
            output, target = self._pair(learned, student, teacher)
            if learned.scores is not None:
                rows, goals = learned.scores.rows(output), learned.scores.rows(target)
                distance = softened_divergence(rows, goals, self.temperature)
            else:
                keep = _row_mask(target.shape[:-1], None, real)
                distance = learned.distance(output, target, keep, cosine=False)
            total = total.to(distance.device) + distance
        return total

    def _pair(self, learned: _LearnedOutput, student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
        """Return an output of both, the teacher's without a gradient."""
        output, target = (tensor_outputs(each, self._count)[learned.spec.index] for each in (student, teacher))
        same_shape(output, target)
        return output, target.detach()

    def _hard(self, student: Any, targets: Any) -> Tensor:
        if self._main is None:
            raise ValueError("call resolved() first: the loss does not know the model's outputs yet")
        output = tensor_outputs(student, self._count)[self._main.spec.index]
        if targets.is_floating_point():
            return F.mse_loss(output.reshape(targets.shape).float(), targets)
        scores = ClassScores.of(output, targets)
        if scores is None:
            raise ValueError(f"integer targets {tuple(targets.shape)} do not fit outputs {tuple(output.shape)}")
        return scores.loss(output, targets)


@dataclass(frozen=True, slots=True)
class _LearnedOutput:
    """An output that the student learns."""

    spec: OutputSpec
    scores: ClassScores | None
    spread: float | None
    """Spread of the teacher's values over many samples; None: that of each batch."""

    def distance(self, student: Tensor, teacher: Tensor, keep: Tensor | None, cosine: bool) -> Tensor:
        """Return the relative distance, each entry over its own spread where scales differ by far."""
        scales = self.spec.scales
        student, teacher = over_scales(student.float(), scales), over_scales(teacher.float(), scales)
        return relative_distance(student, teacher, keep, cosine, 1.0 if scales else self.spread)


def other_outputs(student: int, teacher: int) -> DataError:
    """Return the error of a student with another number of outputs than its teacher."""
    return DataError(
        f"the student returns {student} output{'s' if student != 1 else ''} and the teacher {teacher}",
        "each output of the student is compared with the teacher's output at the same position",
        "let the student return the same outputs as the teacher, in the same order",
    )


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise a DataError if a teacher's output cannot be compared with a student's, entry by entry."""
    if student.shape == teacher.shape:
        return
    gave = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if len(student) != len(teacher):
        fix = "let both return one row per sample, predictions as the first output"
    else:
        fix = (
            "give the student as many outputs as the teacher (the same classes, or a projection to the same width), "
            "or distill from layers only: features relational, alpha 1"
        )
    raise DataError("the student's and the teacher's outputs have different shapes", f"{gave} for the same batch", fix)


def _class_scores(output: Tensor, targets: Any, kind: Kind, form: Form, spec: OutputSpec) -> ClassScores | None:
    """Return the layout of an output's class scores; None where it holds none."""
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        fitting = ClassScores.of(output, targets)
        if fitting is not None:
            return fitting
    if kind == "classes":
        return ClassScores(output.shape[-1], -1, is_distribution(output, -1))
    if isinstance(targets, Tensor) and targets.is_floating_point():
        return None
    if form in ("hinton", "dkd", "dist") and output.ndim == 2 and output.shape[1] > 1 and not _has_unit_rows(output):
        return ClassScores(output.shape[1], -1, is_distribution(output, -1))  # the request says so
    return ClassScores.of_spec(spec, output)


def _has_unit_rows(output: Tensor) -> bool:
    """Return whether rows have unit length, as embeddings."""
    return bool(((output.detach().float().norm(dim=1) - 1).abs() < 1e-3).all())


def _labels(output: Tensor, scores: ClassScores, targets: Any) -> Tensor:
    """Return the label of each row, in the rows' order."""
    rows = output.numel() // (scores.classes if scores.axis is not None else 1)
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == rows:
        return targets
    given = f"integer targets {tuple(targets.shape)}" if isinstance(targets, Tensor) else "no labels"
    if isinstance(targets, Tensor) and targets.is_floating_point():
        given = f"float targets {tuple(targets.shape)}"
    raise DataError(
        "decoupled distillation (dkd) needs the label of each row",
        f"given are {given} for outputs of shape {tuple(output.shape)}",
        "use output loss hinton, which needs none, or give integer labels",
    )


def _row_mask(shape: torch.Size, targets: Any, real: Tensor | None) -> Tensor | None:
    """Return which rows count, of the rows' shape or flat; None where all do."""
    keep = None
    if isinstance(targets, Tensor) and not targets.is_floating_point() and targets.numel() == shape.numel():
        keep = targets.reshape(shape) != IGNORED
    if real is not None and real.numel() == shape.numel():
        not_padding = real.reshape(shape) != 0
        keep = not_padding if keep is None else keep & not_padding
    return keep
