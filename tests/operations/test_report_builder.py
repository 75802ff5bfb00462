"""The sentence about a control: distillation has an effect only where the interval excludes 0."""

from __future__ import annotations

import pytest

from omgoptim.operations.report_builder import control_sentence
from omgoptim.reports import Control


@pytest.mark.parametrize(
    ("low", "high", "effect"),
    [
        (0.0040, 0.0213, "significant improvement by distillation (+0.0127, 95 % interval +0.0040 to +0.0213)"),
        (-0.0020, 0.0260, "no significant effect of distillation (+0.0127, 95 % interval -0.0020 to +0.0260)"),
        (None, None, "no significant effect of distillation (+0.0127)"),
    ],
)
def test_the_effect_of_distillation_is_claimed_only_above_zero(
    low: float | None, high: float | None, effect: str
) -> None:
    control = Control(quality=0.954, gain=0.0127, gain_low=low, gain_high=high)
    assert control_sentence(control) == f"Without the teacher the same student reaches 0.9540: {effect}."


def test_a_better_control_is_named_as_the_artifact() -> None:
    words = control_sentence(Control(quality=0.954, gain=-0.01, gain_low=-0.02, gain_high=-0.001, kept=True))
    assert words.startswith("The artifact is the control")
    assert words.endswith("Effect of distillation on the evaluation data: -0.0100, 95 % interval -0.0200 to -0.0010.")


def test_without_a_control_nothing_is_said() -> None:
    assert control_sentence(None) == ""
