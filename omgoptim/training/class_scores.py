"""Layout of class scores in an output: class axis, number of classes, logits or probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from omgoptim.errors import DataError
from omgoptim.models.labels import IGNORED, refuse_out_of_range
from omgoptim.models.outputs import OutputSpec, class_layout

MIN_PROBABILITY = 1e-12
"""Lower bound of a probability before its logarithm: keeps log finite, far below the float32 epsilon of 1.2e-7."""

MIN_SCORES = 16
"""Minimum single scores, all in 0..1, that are taken for probabilities: 16 logits of N(0, 1) lie there once in 3e7."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Layout of class scores in an output.

    Shapes: (N, C), (N, C, …) or (N, …, C) with `axis` 1 or -1; a single score per target, (N), (N, 1) or the targets'
    own shape, has no class axis and two classes.
    """

    classes: int
    axis: int | None
    probabilities: bool
    """The scores are probabilities: after a softmax or sigmoid."""

    @staticmethod
    def of(output: Tensor, target: Tensor) -> ClassScores | None:
        """Return the layout that fits an output and its integer targets; None if there is none.

        Args:
            output: what the model gave for one batch; whether it is probabilities is read from it.
            target: integers, the batch first.
        """
        layout = class_layout(output.shape, target.shape) if output.is_floating_point() else None
        if layout is None:
            return None
        axis, classes = layout
        if axis is not None:
            return ClassScores(classes, axis, is_distribution(output, axis))
        low, high = output.detach().aminmax()
        return ClassScores(2, None, output.numel() >= MIN_SCORES and bool(low >= 0) and bool(high <= 1))

    @staticmethod
    def of_spec(spec: OutputSpec, output: Tensor) -> ClassScores | None:
        """Return the layout of an output's class scores by its specification; None if it holds none."""
        if spec.kind != "class_scores":
            return None
        classes = 2 if spec.class_axis is None else output.shape[spec.class_axis]
        return ClassScores(classes, spec.class_axis, spec.probabilities)

    @property
    def name(self) -> str:
        """Name of the loss in reports."""
        return "cross-entropy" if self.axis is not None else "binary cross-entropy"

    def check(self, target: object) -> None:
        """Raise a DataError if a label is none of the classes."""
        if not isinstance(target, Tensor):
            raise DataError(
                "a training batch has no labels",
                f"its target is a {type(target).__name__}; those of other batches are integer tensors",
                "give every training batch integer labels, -100 for those to ignore",
            )
        if target.is_floating_point():
            raise DataError("the targets are integers in some training batches and floats in others")
        refuse_out_of_range(target, self.classes)

    def rows(self, output: Tensor) -> Tensor:
        """Return the scores as (rows, classes) logits in float32, one row per target, in the targets' order."""
        scores = output.float()
        if self.axis is None:
            scores = scores.reshape(-1)
            if self.probabilities:
                scores = torch.logit(scores, eps=1e-6)
            return torch.stack([torch.zeros_like(scores), scores], 1)  # softmax over (0, z) is sigmoid(z)
        if self.axis == 1 and scores.ndim > 2:
            scores = scores.movedim(1, -1)
        scores = scores.reshape(-1, self.classes)
        return scores.clamp(min=MIN_PROBABILITY).log() if self.probabilities else scores

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean (binary) cross-entropy over the targets that count; 0 where none does."""
        rows, labels = self.rows(output), target.reshape(-1)
        if bool((labels == IGNORED).all()):
            return rows.sum() * 0.0  # a mean over nothing would be NaN
        return F.cross_entropy(rows, labels, ignore_index=IGNORED)


def is_distribution(output: Tensor, axis: int) -> bool:
    """Return whether scores along an axis are probabilities: none negative, their sum one."""
    values = output.detach().float()
    return bool((values >= 0).all()) and bool(((values.sum(axis) - 1).abs() < 1e-3).all())
