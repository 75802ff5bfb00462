"""The control: distillation has an effect only where the interval excludes 0, and the control is a fallback."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from omgoptim.measure.quality import Quality
from omgoptim.operations.compression_job import Job
from omgoptim.operations.distill import _final_model
from omgoptim.operations.report_builder import control_sentence
from omgoptim.operations.rounds.checkpoint import RoundState
from omgoptim.reports import Control, Round
from omgoptim.requests import DistillRequest, parse
from omgoptim.techniques.registry import Outcome


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


@pytest.mark.parametrize(
    ("control", "chosen", "following"), [(0.895, 0.895, 0.89), (0.88, 0.89, 0.88), (0.8, 0.89, None)]
)
def test_the_other_of_student_and_control_follows_where_the_better_one_fails_on_the_evaluation_data(
    control: float, chosen: float, following: float | None
) -> None:
    request = cast(
        DistillRequest,
        parse(
            "distill",
            {
                "model": "net.py:build",
                "data": "net.py:load",
                "student": "narrow",
                "control": True,
                "max_quality_drop": 0.02,
            },
        ),
    )
    metric = SimpleNamespace(name="top1_accuracy")
    datasets = SimpleNamespace(evaluator=SimpleNamespace(original=0.9, metric=metric), loss="labels")
    loaded = SimpleNamespace(params=(10, 10), device="cpu")
    job = Job(request, cast(Any, None), cast(Any, loaded), cast(Any, datasets), nn.Identity(), "torch_eager")
    student = SimpleNamespace(
        name="narrow",
        notes=[],
        params=5,
        loaded=SimpleNamespace(recipe=None),
        module=nn.Identity(),
        changes=Outcome([]),
    )
    distilled, alone = (
        RoundState(nn.Identity(), Round(number=1), Outcome([]), quality=each) for each in (0.89, control)
    )
    first = _final_model(job, cast(Any, student), distilled, alone, [])
    assert first.module is (alone if chosen == control else distilled).module
    quality = Quality("top1_accuracy", 0.9, 0.85, 0.05, 0.04, 0.06, 0.9, 600)
    second = first.fallback(cast(Any, SimpleNamespace(quality=quality, missed=[])))
    if following is None:
        assert second is None
        return
    assert second is not None
    assert second.module is (alone if following == control else distilled).module
    assert "failed on the evaluation data (quality drop 0.0500, above the guard 0.02)" in second.warnings[-1]
    assert second.fallback(cast(Any, SimpleNamespace(quality=quality, missed=[]))) is None
