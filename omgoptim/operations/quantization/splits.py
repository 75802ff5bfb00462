"""What calibrates and what chooses a quantization: parts of the calibration split, never evaluation data."""

from __future__ import annotations

from dataclasses import dataclass, field

from omgoptim.errors import DataError, OmgoptimError
from omgoptim.models.samples import Samples, shared_samples
from omgoptim.operations.data_overlap import OVERLAP, overlap_notes
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.quantization.candidates import Proposal
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Qat, WeightOnly
from omgoptim.techniques.registry import technique_of

SELECTION_SAMPLES, MOST_SELECTION_SAMPLES = 256, 1024
"""Samples that candidates are chosen on: more where there are more and the model is cheap to run."""

SELECTION_MACS = 5e11
"""Multiply-accumulates of one pass over the selection samples that more of them may take."""

FEWEST_OTHERS = 32
"""Fewer samples than these judge nothing again."""

EPOCH_SAMPLES = 1000
"""The same where epochs of a training are chosen too: their differences are small."""


@dataclass(frozen=True, slots=True)
class Splits:
    """What calibrates and what selects; neither is evaluation data."""

    calibration: Samples
    selection: Samples
    others: Samples = field(default_factory=lambda: Samples([], []))
    """Of the same split, and used for nothing so far: they judge again where the evaluation data contradicts."""
    notes: list[str] = field(default_factory=list)


def splits_of(request: QuantizeRequest, loaded: LoadedModel, proposal: Proposal) -> Splits:
    """Calibration and selection samples: two parts of the calibration split, or of calibration and train."""
    wanted = getattr(request.scheme, "calibration_samples", 256)
    needs_calibration = any(technique_of(option.params).needs_data for option in proposal.options)
    needs_calibration |= isinstance(request.scheme, WeightOnly) and loaded.data.real  # it does better with some
    choosing = EPOCH_SAMPLES if isinstance(request.scheme, Qat) else _choosing(loaded)
    drawn = loaded.samples("calibration", (wanted if needs_calibration else 0) + 2 * choosing)
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
            "there is no data to choose a candidate on",
            "splits 'calibration' and 'train' are both empty, and choices are never made on evaluation data",
            "let load('calibration') give a few hundred samples",
        )
    if needs_calibration and drawn.count == 1:
        calibration, selection = drawn, loaded.samples("train", choosing)
        chosen_on = "training samples" if selection.count else "that sample, too"
        selection = selection if selection.count else drawn
        notes.append(f"the calibration split has one sample: candidates were chosen on {chosen_on}")
    else:
        first = min(wanted, max(drawn.count // 2, drawn.count - SELECTION_SAMPLES)) if needs_calibration else 0
        calibration, selection = drawn.split(first)
    if needs_calibration and calibration.count < min(wanted, 32):
        plural = "" if calibration.count == 1 else "s"
        notes.append(f"only {calibration.count} calibration sample{plural}: ranges read from so few may not hold")
    notes += overlap_notes(drawn, "that calibrate and choose", loaded)
    selection, others = selection.split(choosing)
    return Splits(calibration, selection, others, notes)


def _choosing(loaded: LoadedModel) -> int:
    """How many samples candidates are chosen on: as many as the model's cost allows, within bounds."""
    macs = loaded.macs.macs if loaded.macs else None
    affordable = int(SELECTION_MACS / macs) if macs else SELECTION_SAMPLES
    return min(max(affordable, SELECTION_SAMPLES), MOST_SELECTION_SAMPLES)


def other_samples(request: QuantizeRequest, loaded: LoadedModel, splits: Splits) -> Samples | None:
    """Samples that were used for nothing so far: the rest of the calibration split, else training samples; None where
    there are too few, or they are evaluation samples."""
    if splits.others.count >= min(SELECTION_SAMPLES, max(splits.selection.count, FEWEST_OTHERS)):
        return splits.others
    if isinstance(request.scheme, Qat):
        return None  # it was trained on the training samples
    try:
        drawn = loaded.samples("train", max(SELECTION_SAMPLES, splits.selection.count))
    except OmgoptimError:  # there is no such split
        return None
    known = [splits.calibration, splits.selection, loaded.evaluation]
    if drawn.count < FEWEST_OTHERS or any(shared_samples(drawn, other) > OVERLAP * drawn.count for other in known):
        return None
    return drawn
