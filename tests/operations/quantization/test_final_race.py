"""Choice among the finalists, and their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omgoptim.measure.quality import Quality
from omgoptim.measure.timing import Ratio, Timing
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.final_race import FinalistResult, chosen_finalist, replacement_sentence
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.requests.quantize import Dynamic, Fp32, Static

GUARD = 0.01


def finalist(params: Any, drop: float, reference: bool = False) -> FinalistResult:
    timing = Timing(1.0, 1.0, None, None, Ratio(2.0, 1.9, 2.1), None, 5)
    result = CandidateResult(
        BuiltCandidate(CandidateSpec(params, "openvino"), Path("x")), timing=timing, reference=reference
    )
    quality = Quality("top1_accuracy", 0.9, 0.9 - drop, drop, drop, drop, 1.0, 500)
    return FinalistResult(result, timing, quality, [], None)


def test_the_first_in_the_order_that_holds_the_guard_is_chosen() -> None:
    failing, holding, later = finalist(Static(), 0.1), finalist(Dynamic(), 0.005), finalist(Static(), 0.0)
    plain = finalist(Fp32(), 0.0, reference=True)
    assert chosen_finalist([failing, holding, later, plain], GUARD) is holding


def test_float32_that_nobody_asked_for_is_delivered_only_where_nothing_else_holds_the_guard() -> None:
    failing, plain = finalist(Static(), 0.1), finalist(Fp32(), 0.0, reference=True)
    assert chosen_finalist([failing, plain], GUARD) is plain
    words = replacement_sentence(plain, failing, GUARD)
    assert words.startswith("Nothing was quantized: static on openvino loses 0.1000, more than 0.01. ")
    assert words.endswith("fp32 on openvino, float32 on that engine, which passes the guard.")


def test_where_nothing_holds_the_guard_the_first_that_was_asked_for_is_chosen() -> None:
    failing, plain = finalist(Static(), 0.1), finalist(Fp32(), 0.1, reference=True)
    assert chosen_finalist([failing, plain], GUARD) is failing
