"""Choice among the finalists, and their order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omgoptim.errors import ModelError
from omgoptim.measure.quality import Quality
from omgoptim.measure.timing import Ratio, Timing
from omgoptim.operations.final_measurement import FinalChoice, MeasuredEntry, PairedTimings, TimedEntry
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.final_choice import (
    CandidateChoice,
    CandidateRanking,
    Finalist,
    replacement_sentence,
)
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference
from omgoptim.requests.quantize import Bf16, Dynamic, Fp32, Static

GUARD = 0.01


class Sized(BuiltCandidate):
    """Stands in for a saved candidate: only its size is asked for."""

    @property
    def size_bytes(self) -> int | None:
        return 500


def finalist(params: Any, drop: float, reference: bool = False) -> Finalist:
    timing = Timing(1.0, 1.0, None, None, Ratio(2.0, 1.9, 2.1), None, 5)
    result = CandidateResult(Sized(CandidateSpec(params, "openvino"), Path("x")), timing=timing, reference=reference)
    quality = Quality("top1_accuracy", 0.9, 0.9 - drop, drop, drop, drop, 1.0, 500)
    unused: Any = None
    return MeasuredEntry(result, timing, quality, unused, unused, unused, Path("outputs"), [])


def chosen(*finalists: Finalist) -> CandidateChoice:
    unused: Any = None
    request: Any = SimpleNamespace(max_quality_drop=GUARD)
    measured = FinalChoice(request, unused, unused, unused, list(finalists))
    return CandidateChoice(measured, Preference("balanced", 1000), 1.0)


def test_the_first_in_the_order_that_holds_the_guard_is_chosen() -> None:
    failing, holding, later = finalist(Static(), 0.1), finalist(Dynamic(), 0.005), finalist(Static(), 0.0)
    plain = finalist(Fp32(), 0.0, reference=True)
    choice = chosen(failing, holding, later, plain)
    assert choice.measured.winner is holding
    assert choice.measured.holds
    assert choice.rejected == [failing]


def test_float32_that_nobody_asked_for_is_delivered_only_where_nothing_else_holds_the_guard() -> None:
    failing, plain = finalist(Static(), 0.1), finalist(Fp32(), 0.0, reference=True)
    choice = chosen(failing, plain)
    assert choice.measured.winner is plain
    assert choice.rejected == [failing]
    words = replacement_sentence(plain, failing, GUARD)
    assert words.startswith("Nothing was quantized: static on openvino loses 0.1000, more than 0.01. ")
    assert words.endswith("fp32 on openvino, float32 on that engine, which passes the guard.")


def test_where_nothing_holds_the_guard_the_first_that_was_asked_for_is_chosen() -> None:
    failing, plain = finalist(Static(), 0.1), finalist(Fp32(), 0.1, reference=True)
    choice = chosen(failing, plain)
    assert choice.measured.winner is failing
    assert not choice.measured.holds
    assert choice.rejected == [failing]


def test_references_come_last_and_a_candidate_that_failed_is_in_no_order() -> None:
    plain, failing, holding = (
        finalist(Fp32(), 0.0, reference=True).entry,
        finalist(Static(), 0.1).entry,
        finalist(Dynamic(), 0.0).entry,
    )
    for one, drop in ((plain, 0.0), (failing, 0.1), (holding, 0.0)):
        one.drop = one.high = drop
    broken = finalist(Bf16(), 0.0).entry
    timing = Timing(1.0, 1.0, None, None, Ratio(4.0, 3.9, 4.1), None, 5)
    timed = [TimedEntry(one, timing, Path("outputs")) for one in (plain, failing, holding)]
    timings = PairedTimings(
        timing, Path("outputs"), 0.0, timed, [(broken, ModelError("it crashed", "the engine died"))]
    )
    order = CandidateRanking([plain, failing, holding, broken], GUARD, Preference("speed", 1000))
    assert [one.entry for one in order.order(timings)] == [holding, failing, plain]
    assert holding.timing is timing
    assert (broken.status, broken.why) == ("failed", "it crashed: the engine died")
    first = CandidateRanking([plain, failing, holding, broken], GUARD, Preference("speed", 1000), failing)
    assert [one.entry for one in first.order(timings)] == [failing, holding, plain]
