"""The data of a step: its evaluation samples are selection samples, so that no step sees the evaluation data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from omgoptim.errors import DataError
from omgoptim.models.data import DataSource, Split, batch_size, slice_samples, take_samples
from omgoptim.models.raw_batch import RawBatch

MOST_SELECTION = 2000
MOST_CALIBRATION = 2000
"""Samples of the calibration split that steps are judged on, and that they calibrate and choose with."""

FEWEST_SELECTION = 16
"""Fewer samples than these tell nothing of a guard."""


def selection_as_evaluation(data: DataSource) -> DataSource:
    """Return the same data with split `eval` taken from the second half of the calibration split.

    Training samples stay as they are. What calibrates and what a step chooses on is the first half.

    Raises:
        DataError: the calibration split has too few samples to divide.
    """
    total = sum(
        batch_size(raw.inputs) for raw in take_samples(data.batches("calibration"), MOST_SELECTION + MOST_CALIBRATION)
    )
    selection = min(total // 2, MOST_SELECTION)
    if selection < FEWEST_SELECTION:
        raise DataError(
            f"the calibration split has {total} samples, too few to choose with",
            "steps are judged on half of them, and never on the evaluation data",
            f"let load('calibration') give at least {2 * FEWEST_SELECTION}, better a few hundred",
        )
    calibration = min(total - selection, MOST_CALIBRATION)

    def batches(split: Split) -> Iterator[RawBatch]:
        if split == "train":
            return data.batches("train")
        first, last = (0, calibration) if split == "calibration" else (calibration, calibration + selection)
        return _window(lambda: data.batches("calibration"), first, last)

    return replace(data, batches=batches)


def _window(batches: Callable[[], Iterator[RawBatch]], first: int, last: int) -> Iterator[RawBatch]:
    """Yield samples first..last of a split, batch by batch."""
    begin = 0
    for raw in batches():
        size = batch_size(raw.inputs)
        start, stop = max(first - begin, 0), min(last - begin, size)
        if start < stop:
            yield RawBatch(slice_samples(raw.inputs, start, stop), slice_samples(raw.target, start, stop))
        begin += size
        if begin >= last:
            return
