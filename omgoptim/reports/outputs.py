"""Outputs of a model, each with its agreement with the original's."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class OutputRecord(Record):
    """One output of the model, compared with the original's on the evaluation data."""

    name: str
    shape: list[int | str]
    """Sizes, or the names of dynamic dimensions (`batch`)."""
    dtype: str
    kind: Literal["class_scores", "number", "values", "state", "integers"]
    evidence: str
    """Evidence for the kind."""
    compared_by: Literal["top1_agreement", "r2_agreement", "exact_agreement", "not compared"]
    """`r2_agreement` is 1 - (relative error)^2."""
    weight: float = 1.0
    """Weight in the comparison and in distillation; 0 for an ignored output, or a single number for a whole batch."""
    labelled: bool = False
    """Whether the labels belong to it."""
    agreement: float | None = None
    """Agreement with the original, 0..1; null where it was not measured."""
    relative_error: float | None = None
    """Relative error of numbers, values and states: root mean square of the difference, over that of the original about
    its mean.
    """
    cosine: float | None = None
    """Mean cosine similarity over samples, for vector outputs; informative only."""
    ruined: bool = False
    """Whether the output is ruined: relative error above 0.5, or fewer than half of the classes or integers equal; or
    relative error above 0.9 of entries whose scale is a tenth of the others' or less, such as scores beside boxes. A
    run whose metric does not show it ends as `guard_failed`.
    """
    reopened: float | None = None
    """Largest difference between the artifact, reopened in fresh processes, and the model in memory on the samples in
    `check.npz`, relative to the output's largest value.
    """
