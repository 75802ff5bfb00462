"""Signal-to-quantization-noise ratio (SQNR) of a program's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SQNR_DB = 120.0
"""SQNR that is reported for outputs without noise."""


Outputs = Mapping[str, NDArray[Any]] | Sequence[NDArray[Any]]
"""Outputs of one batch, by name or in order."""


def sqnr_db(want: Sequence[Outputs], got: Sequence[Outputs], non_finite_db: float = -math.inf) -> float:
    """Return the SQNR of outputs in dB, batch by batch.

    Args:
        want: reference outputs, batch by batch.
        got: outputs for the same batches.
        non_finite_db: result where `got` is not finite and `want` is.
    """
    ratio = noise_to_signal(*([_arrays(batch) for batch in outputs] for outputs in (want, got)))
    return non_finite_db if math.isinf(ratio) else to_decibels(ratio)


def _arrays(outputs: Outputs) -> list[NDArray[Any]]:
    return list(outputs.values() if isinstance(outputs, Mapping) else outputs)


def noise_to_signal(want: Sequence[Sequence[NDArray[Any]]], got: Sequence[Sequence[NDArray[Any]]]) -> float:
    """Return E[(y - y')^2] / E[y^2] of outputs, given as one list of arrays per batch: the mean over outputs.

    An output of integers is ignored, and so are positions that are not finite in `want` (a mask). Infinite where `got`
    is not finite and `want` is.
    """
    ratios = []
    for index, first in enumerate(want[0]):
        if not np.issubdtype(np.asarray(first).dtype, np.floating):
            continue
        signal = noise = 0.0
        for before, after in ((np.asarray(a[index]), np.asarray(b[index])) for a, b in zip(want, got, strict=True)):
            counts = np.isfinite(before)
            known, given = before[counts].astype(np.float64), after[counts].astype(np.float64)
            if not np.isfinite(given).all():
                return math.inf
            signal += float(np.square(known).sum())
            noise += float(np.square(given - known).sum())
        ratios.append(noise / signal if signal > 0 else (1.0 if noise > 0 else 0.0))
    return float(np.mean(ratios)) if ratios else 0.0


def to_decibels(noise_over_signal: float) -> float:
    """Return -10 log10 of a noise-to-signal ratio; at most `MAX_SQNR_DB`, and -inf for an infinite one."""
    if math.isinf(noise_over_signal):
        return -math.inf
    return min(MAX_SQNR_DB, -10 * math.log10(noise_over_signal)) if noise_over_signal > 0 else MAX_SQNR_DB
