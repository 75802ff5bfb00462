"""Doubts of a final measurement, and reasons for a missed goal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from omgoptim.measure.agreement import OutputAgreement
from omgoptim.measure.timing import Timing
from omgoptim.models.outputs import OutputSpec
from omgoptim.operations.final_measurement import FinalChoice, guard_reasons
from omgoptim.operations.timing import OVERLOADED
from omgoptim.reports import Gain, GainsBy
from omgoptim.requests import OptimizeRequest

BOXES = OutputSpec("boxes", 0, ("batch", 4), "float32", "values", "")
RUINED = (OutputAgreement(BOXES, 0.1, relative_error=0.9, read=False),)


def result(quality: float, drop: float = 0.0, ruined: tuple[OutputAgreement, ...] = ()) -> Any:
    return SimpleNamespace(
        before=SimpleNamespace(metric="top1_accuracy", quality=quality),
        after=SimpleNamespace(runtime="onnxruntime"),
        quality=SimpleNamespace(drop=drop, ruined=ruined),
        timing=Timing(1.0, 1.0, None, None, None, None, 1, idle=0.0),
        missed=["12 ms, target 4 ms"],
    )


def choice(loaded: Any, timings: Any, request: Any = None) -> FinalChoice[Any]:
    unused: Any = None
    return FinalChoice(request, unused, loaded, timings, [])


def test_a_time_target_on_an_overloaded_machine_is_undecided_and_that_is_said_first() -> None:
    loaded: Any = SimpleNamespace(evaluation=SimpleNamespace(targets=[]), device="cpu")
    timings = SimpleNamespace(original=result(0.95).timing, load=OVERLOADED + 0.01)
    asked = OptimizeRequest(model="m", target_latency_ms=8)
    (undecided,) = choice(loaded, timings, asked).leading_warnings(result(0.95))
    assert undecided == "Whether a latency of 8 ms is reached is undecided: the machine was overloaded."
    timings.load = 0.0
    assert choice(loaded, timings, asked).leading_warnings(result(0.95)) == []


def test_a_chance_level_and_a_model_that_waits_are_said_first() -> None:
    labels = [np.array([0] * 30 + [1] * 70)]
    loaded: Any = SimpleNamespace(evaluation=SimpleNamespace(targets=labels), device="cpu")
    timings = SimpleNamespace(original=Timing(1.0, 1.0, None, None, None, None, 1, idle=0.97), load=0.9)
    chosen = choice(loaded, timings)
    chance, waits = chosen.leading_warnings(result(0.7))
    assert chance.startswith("The original model is at chance level: its accuracy is 0.7000")
    assert "the original waits 97% of its time" in waits
    timings.original = result(0.7).timing
    assert chosen.leading_warnings(result(0.95)) == []


def test_a_speedup_of_the_engine_alone_that_kernels_cannot_explain_is_said_first() -> None:
    loaded: Any = SimpleNamespace(evaluation=SimpleNamespace(targets=[]), device="cpu")
    timings = SimpleNamespace(original=result(0.95).timing, load=0.0)
    parts = GainsBy(engine=Gain(speedup=200.0), precision=Gain(speedup=1.5))
    (first,) = choice(loaded, timings).leading_warnings(result(0.95), parts)
    assert first.startswith("Implausible speedup: float32 on onnxruntime alone is 200x faster")


def test_a_ruined_output_is_a_reason_though_the_metric_lost_nothing() -> None:
    ruined, missed = guard_reasons(result(0.9, ruined=RUINED), 0.01)
    assert ruined.startswith("Output 'boxes' (relative error 0.90")
    assert missed == "12 ms, target 4 ms"
    assert guard_reasons(result(0.9, drop=0.02), 0.01)[0] == "quality drop 0.0200, above the guard 0.01"
