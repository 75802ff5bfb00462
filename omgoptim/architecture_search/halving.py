"""Asynchronous successive halving (ASHA): a trial continues while it is in the best third at its rung.

Source: Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning, arXiv:1810.05934. Differs: a trial is
evaluated once, when it reaches a rung, and not promoted later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ETA = 3
"""Reduction factor; the paper uses 4, and 3 of Hyperband (arXiv:1603.06560) keeps more of few trials."""
RUNGS = (1 / 9, 1 / 3, 1.0)
"""Fractions of the whole training at which a trial is evaluated: powers of 1 / `ETA`, as in the paper."""


def is_promoted(quality: float, others: Sequence[float], eta: int = ETA) -> bool:
    """Return whether a trial with this quality at a rung continues.

    Args:
        quality: higher is better.
        others: qualities of the earlier trials at the same rung.
        eta: about one in `eta` of the trials at a rung trains on.
    """
    ahead = sum(other > quality for other in others)
    return math.isfinite(quality) and ahead < math.ceil((len(others) + 1) / eta)


def rung_epochs(epochs: int) -> tuple[int, ...]:
    """Return the whole epochs that each rung adds, first to last; fewer rungs where there are too few epochs.

    They sum to `epochs`, which is at least 1.
    """
    ends = sorted({max(1, round(fraction * epochs)) for fraction in RUNGS})
    return tuple(end - start for start, end in zip([0, *ends], ends, strict=False))


def qualities_at_rung(histories: Sequence[Sequence[float]], rung: int) -> list[float]:
    """Return the qualities of the trials that reached a rung, counted from 0."""
    return [history[rung] for history in histories if len(history) > rung]


def expected_final_qualities(histories: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    """Return the expected final quality of each trial.

    The last quality of a trial, plus the mean gain from rung to rung of the trials that went on: paired differences,
    so that the selection of the best trials is not counted as a gain. Shape [trials].
    """
    longest = max((len(history) for history in histories), default=0)
    gains = np.zeros(max(longest, 1))
    for rung in range(1, longest):
        pairs = [history[rung] - history[rung - 1] for history in histories if len(history) > rung]
        gains[rung] = float(np.mean(pairs))
    return np.array([history[-1] + gains[len(history) :].sum() for history in histories], dtype=np.float64)


def most_promising(histories: Sequence[Sequence[float]], count: int = 3) -> list[int]:
    """Return the indices of the trials that are expected to end best, the best first; all train to the end."""
    return [int(index) for index in np.argsort(-expected_final_qualities(histories), kind="stable")[:count]]
