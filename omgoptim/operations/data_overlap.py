"""Check for evaluation samples among training, calibration and selection samples."""

from __future__ import annotations

from omgoptim.models.samples import Samples, shared_samples
from omgoptim.operations.loaded_model import LoadedModel

OVERLAP = 0.1
"""Fraction of samples that may be evaluation samples too, since data contains duplicates."""


def overlap_notes(drawn: Samples, purpose: str, loaded: LoadedModel) -> list[str]:
    """Return a warning where samples are evaluation samples too."""
    shared = shared_samples(drawn, loaded.evaluation) if loaded.data.real else 0
    if shared <= drawn.count * OVERLAP:
        return []
    return [
        f"{shared} of the {drawn.count} samples {purpose} are evaluation samples too: "
        "the reported quality is optimistic; let load(split) give different samples for each split"
    ]
