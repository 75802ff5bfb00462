"""How far a module's outputs are from the original's on the selection samples: what decides between equal scores."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from omgoptim.training.evaluator import Evaluator


def distance_to_original(evaluator: Evaluator, module: nn.Module) -> float:
    """RMS of the difference over the RMS of the original about its mean, averaged over the floating outputs.

    Only values that are finite in the original count. Infinite where an output is not finite there, 0 without floating
    outputs.
    """
    made = evaluator.outputs_of(module)
    distances = []
    for index, first in enumerate(evaluator.outputs[0]):
        if first.dtype.kind != "f":
            continue
        ours = [batch[index].astype(np.float64).ravel() for batch in made]
        originals = [batch[index].astype(np.float64).ravel() for batch in evaluator.outputs]
        if [each.size for each in ours] != [each.size for each in originals]:
            return math.inf
        own, original = np.concatenate(ours), np.concatenate(originals)
        finite = np.isfinite(original)
        if not finite.any():
            continue
        own, original = own[finite], original[finite]
        spread = max(float(original.std()), 1e-12)
        distances.append(float(np.sqrt(np.mean((own - original) ** 2))) / spread)
    distance = float(np.mean(distances)) if distances else 0.0
    return distance if math.isfinite(distance) else math.inf
