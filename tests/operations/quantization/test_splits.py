from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omgoptim.errors import DataError
from omgoptim.models.samples import Samples
from omgoptim.operations.quantization.candidates import CandidatePlan, CandidateSpec
from omgoptim.operations.quantization.splits import (
    MAX_SELECTION_SAMPLES,
    SELECTION_SAMPLES,
    split_samples,
    unused_samples,
)
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Static

STATIC = CandidatePlan([CandidateSpec(Static(), "onnxruntime")], [])
REQUEST = QuantizeRequest(model="net.py:net", scheme=Static())


def loaded(cheap: bool = False, **sizes: int) -> Any:
    """One whose splits have so many samples, each of another value."""
    starts = {"calibration": 0, "train": 1000, "eval": 2000}

    def samples(split: str, most: int) -> Samples:
        count = min(sizes.get(split, 0), most)
        values = np.arange(count, dtype=np.float32)[:, None] + starts[split]
        return Samples([{"x": values}], [None]) if count else Samples([], [])

    macs = SimpleNamespace(macs=10**6) if cheap else None
    return SimpleNamespace(samples=samples, data=SimpleNamespace(real=True), evaluation=samples("eval", 8), macs=macs)


def values(samples: Samples) -> list[float]:
    return [float(value) for batch in samples.batches for value in batch["x"][:, 0]]


def test_calibration_and_selection_are_two_parts_of_the_calibration_split() -> None:
    splits = split_samples(REQUEST, loaded(calibration=100), STATIC)
    assert values(splits.calibration) == list(range(50))
    assert values(splits.selection) == list(range(50, 100))
    assert splits.notes == []


@pytest.mark.parametrize(("train", "chosen_on"), [(3, [1000, 1001, 1002]), (0, [0])])
def test_one_calibration_sample_calibrates_and_others_choose_where_there_are_any(
    train: int, chosen_on: list[float]
) -> None:
    splits = split_samples(REQUEST, loaded(calibration=1, train=train), STATIC)
    assert values(splits.calibration) == [0]
    assert values(splits.selection) == chosen_on
    assert [note for note in splits.notes if "one sample" in note]
    assert [note for note in splits.notes if "only 1 calibration sample:" in note]


def test_no_calibration_sample_is_an_error() -> None:
    with pytest.raises(DataError, match="calibration data is empty"):
        split_samples(REQUEST, loaded(train=100), STATIC)


def test_a_small_split_gives_as_many_to_choose_on_as_to_calibrate() -> None:
    splits = split_samples(REQUEST, loaded(calibration=350), STATIC)
    assert (splits.calibration.count, splits.selection.count) == (175, 175)
    splits = split_samples(REQUEST, loaded(calibration=512), STATIC)
    assert (splits.calibration.count, splits.selection.count) == (256, SELECTION_SAMPLES)


def test_more_samples_choose_where_there_are_more_and_the_model_is_cheap() -> None:
    assert split_samples(REQUEST, loaded(calibration=5000), STATIC).selection.count == SELECTION_SAMPLES
    assert split_samples(REQUEST, loaded(cheap=True, calibration=5000), STATIC).selection.count == MAX_SELECTION_SAMPLES


def test_what_judges_again_is_the_rest_of_the_split_or_training_samples_and_was_used_for_nothing() -> None:
    found = loaded(calibration=256 + 2 * SELECTION_SAMPLES, train=400)
    splits = split_samples(REQUEST, found, STATIC)
    other = unused_samples(REQUEST, found, splits)
    assert other is not None
    assert values(other) == list(range(256 + SELECTION_SAMPLES, 256 + 2 * SELECTION_SAMPLES))
    found = loaded(calibration=100, train=400)
    other = unused_samples(REQUEST, found, split_samples(REQUEST, found, STATIC))
    assert other is not None
    assert values(other) == list(range(1000, 1000 + SELECTION_SAMPLES))
    assert unused_samples(REQUEST, loaded(calibration=100, train=20), splits) is not None  # the rest of the split
    few = loaded(calibration=100, train=20)
    assert unused_samples(REQUEST, few, split_samples(REQUEST, few, STATIC)) is None
