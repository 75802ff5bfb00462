"""What a model returns, output by output, and how far the result still gives the same."""

from __future__ import annotations

from typing import Literal

from omgoptim.reports.base import Record


class OutputRecord(Record):
    """One output of the model, against the original's on the evaluation data."""

    name: str
    shape: list[int | str]
    """Sizes, or the names of free dimensions (`batch`)."""
    dtype: str
    kind: Literal["class_scores", "number", "values", "state", "integers"]
    evidence: str
    """What the kind was read from."""
    compared_by: Literal["top1_agreement", "r2_agreement", "exact_agreement", "not compared"]
    """`r2_agreement` is 1 - (relative error)^2."""
    weight: float = 1.0
    """0 for an output that is neither compared nor taught: an ignored one, or a single number for a whole batch."""
    labelled: bool = False
    """Whether the labels belong to it."""
    agreement: float | None = None
    """With the original, 0..1; null where it was not measured."""
    relative_error: float | None = None
    """Of numbers, values and states: root mean square of the difference, over that of the original about its mean."""
    cosine: float | None = None
    """Mean over samples, of outputs that are vectors; for information, nothing is judged by it."""
    ruined: bool = False
    """Whether what the original gives here is lost: relative error above 0.5, or fewer than half of the classes or
    integers equal. A run whose metric never reads a ruined output ends as `guard_failed`."""
    reopened: float | None = None
    """How far the artifact, reopened in fresh processes, was from the model in memory on the samples in `check.npz`:
    the largest difference, relative to the output's largest value."""
