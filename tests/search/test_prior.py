"""The prior of a model's own space: losses of single replacements, summed over a configuration."""

from __future__ import annotations

import numpy as np

from omgoptim.architecture_search.space import Knob, Space
from omgoptim.operations.architecture_search.predictions import prior_score_of

SPACE = Space((Knob("a", ("keep", "half", "drop")), Knob("b", ("keep", "half"))))


def test_a_hint_is_the_negated_sum_of_the_losses_of_the_options() -> None:
    hint = prior_score_of(SPACE, [0.1, 0.4, 0.03])
    np.testing.assert_allclose(hint(np.array([[0, 0], [1, 0], [2, 1]])), [0.0, -0.1, -0.43])
