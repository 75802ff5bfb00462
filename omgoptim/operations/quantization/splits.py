"""Calibration and selection samples of a quantize run: parts of the calibration split, never evaluation data."""

from __future__ import annotations

from dataclasses import dataclass, field

from omgoptim.errors import DataError, OmgoptimError
from omgoptim.models.samples import Samples, shared_samples
from omgoptim.operations.datasets import OVERLAP, overlap_notes
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.candidates import CandidatePlan
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Qat, WeightOnly
from omgoptim.techniques.registry import technique_of
from omgoptim.text import plural

SELECTION_SAMPLES, MAX_SELECTION_SAMPLES = 256, 1024
"""Minimum and maximum number of selection samples, more for models that are cheap to run: the standard error of an
accuracy is up to 0.031 and 0.016 with these."""

SELECTION_MACS = 5e11
"""Multiply-accumulates of one pass over the selection samples, which bounds their number above the minimum: ten seconds
at 50 billion a second. Chosen."""

MIN_UNUSED_SAMPLES = 32
"""Minimum number of unused samples for a second selection: with fewer the interval of an
accuracy is wider than 0.3."""

EPOCH_SAMPLES = 1000
"""Number of selection samples where epochs are selected too, as `datasets.SELECTION_SAMPLES`."""


@dataclass(frozen=True, slots=True)
class Splits:
    """Calibration and selection samples; neither are evaluation data."""

    calibration: Samples
    selection: Samples
    others: Samples = field(default_factory=lambda: Samples([], []))
    """Unused samples of the same split, for a second selection."""
    notes: list[str] = field(default_factory=list)


def split_samples(request: QuantizeRequest, loaded: LoadedModel, plan: CandidatePlan) -> Splits:
    """Split calibration and selection samples from the calibration split, or from calibration and train."""
    calibration_samples = getattr(request.scheme, "calibration_samples", 256)
    needs_calibration = any(technique_of(spec.params).needs_data for spec in plan.specs)
    needs_calibration |= isinstance(request.scheme, WeightOnly) and loaded.data.real  # it does better with some
    choosing = EPOCH_SAMPLES if isinstance(request.scheme, Qat) else _selection_count(loaded)
    drawn = loaded.samples("calibration", (calibration_samples if needs_calibration else 0) + 2 * choosing)
    notes = []
    if not drawn.count:
        if needs_calibration and request.scheme.scheme in ("static", "qat"):
            raise DataError(
                "the calibration data is empty",
                "the data gave no batch for split 'calibration'",
                "give at least a few dozen samples, not those of the eval split",
            )
        drawn = loaded.samples("train", SELECTION_SAMPLES)
    if not drawn.count:
        raise DataError(
            "there are no samples to select a candidate on",
            "splits 'calibration' and 'train' are both empty, and evaluation data is never used for selection",
            "let load('calibration') give a few hundred samples",
        )
    if needs_calibration and drawn.count == 1:
        calibration, selection = drawn, loaded.samples("train", choosing)
        chosen_on = "training samples" if selection.count else "the same sample"
        selection = selection if selection.count else drawn
        notes.append(f"the calibration split has one sample: candidates were selected on {chosen_on}")
    else:
        first = (
            min(calibration_samples, max(drawn.count // 2, drawn.count - SELECTION_SAMPLES)) if needs_calibration else 0
        )
        calibration, selection = drawn.split(first)
    if needs_calibration and calibration.count < min(calibration_samples, 32):
        few = plural(calibration.count, "calibration sample")
        notes.append(f"only {few}: the calibrated ranges may not generalize")
    notes += overlap_notes(drawn, "for calibration and selection", loaded)
    selection, others = selection.split(choosing)
    return Splits(calibration, selection, others, notes)


def _selection_count(loaded: LoadedModel) -> int:
    """Return the number of selection samples that the model's cost allows, within bounds."""
    macs = loaded.macs.macs if loaded.macs else None
    affordable = int(SELECTION_MACS / macs) if macs else SELECTION_SAMPLES
    return min(max(affordable, SELECTION_SAMPLES), MAX_SELECTION_SAMPLES)


def unused_samples(request: QuantizeRequest, loaded: LoadedModel, splits: Splits) -> Samples | None:
    """Return unused samples: the rest of the calibration split, else training samples.

    None where there are too few, or they are evaluation samples too.
    """
    if splits.others.count >= min(SELECTION_SAMPLES, max(splits.selection.count, MIN_UNUSED_SAMPLES)):
        return splits.others
    if isinstance(request.scheme, Qat):
        return None  # it was trained on the training samples
    try:
        drawn = loaded.samples("train", max(SELECTION_SAMPLES, splits.selection.count))
    except OmgoptimError:  # there is no such split
        return None
    known = [splits.calibration, splits.selection, loaded.evaluation]
    if drawn.count < MIN_UNUSED_SAMPLES or any(shared_samples(drawn, other) > OVERLAP * drawn.count for other in known):
        return None
    return drawn
