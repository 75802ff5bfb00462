"""Choice of a candidate: by speed, size or their product, and never by the evaluation data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from omgoptim.errors import TechniqueError
from omgoptim.measure.timing import Ratio, Timing
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference, dominated_by, order_candidates, select_finalists
from omgoptim.requests import Params
from omgoptim.requests.quantize import Bf16, Dynamic, Fp32, Static

BASELINE_BYTES = 1000
GUARD = 0.01


class Sized(BuiltCandidate):
    """Stands in for a saved candidate: only its size is asked for."""

    @property
    def size_bytes(self) -> int | None:
        return self.outcome  # type: ignore[return-value]


def result(
    params: Params, speedup: float, size: int, drop: float = 0.0, high: float | None = None, **given: Any
) -> CandidateResult:
    spread = given.pop("spread", 1.01)
    timing = Timing(1.0, 1.0, None, None, Ratio(speedup, speedup / spread, speedup * spread), None, 5)
    spec = CandidateSpec(params, given.pop("runtime", "openvino"), "", given.pop("float_layers", 0))
    built = Sized(spec, Path("x"), size)  # type: ignore[arg-type]
    return CandidateResult(built, timing=timing, drop=drop, high=drop if high is None else high, **given)


def preference(prefer: Any = "balanced", **given: Any) -> Preference:
    return Preference(prefer, BASELINE_BYTES, **given)


def test_balanced_is_speedup_times_size_ratio_speed_and_size_are_themselves() -> None:
    int8, plain = result(Static(), 6.1, 286), result(Fp32(), 6.9, 1060)
    tiny = result(Dynamic(), 1.2, 250)
    assert preference().ranked([plain, tiny, int8]) == [int8, plain, tiny]
    assert preference("speed").ranked([tiny, int8, plain]) == [plain, int8, tiny]
    assert preference("size").ranked([plain, int8, tiny]) == [tiny, int8, plain]


def test_of_those_that_are_equally_fast_the_smaller_one_is_preferred() -> None:
    fast, small = result(Fp32(), 5.0, 1000, spread=1.1), result(Static(), 4.8, 300, spread=1.1)
    assert preference("speed").ranked([fast, small]) == [small, fast]
    apart = result(Static(), 4.0, 300, spread=1.1)
    assert preference("speed").ranked([fast, apart]) == [fast, apart]


def test_of_one_size_the_faster_one_is_preferred_where_size_decides() -> None:
    slow, fast = result(Static(), 2.0, 300), result(Static(algorithm="nncf"), 3.0, 303)
    assert preference("size").ranked([slow, fast]) == [fast, slow]


def test_where_speed_cannot_be_told_size_decides_and_a_larger_float_file_never_wins() -> None:
    int8, plain = result(Static(), 1.0, 300), result(Fp32(), 9.0, 1000)
    for prefer in ("balanced", "speed", "size"):
        assert order_candidates([plain, int8], GUARD, preference(prefer, speed_known=False)) == [int8, plain]


def test_what_holds_the_guard_with_a_margin_comes_before_what_only_just_does_and_float_after_both() -> None:
    close, safe = result(Static(), 6.0, 300, 0.009, 0.02), result(Static(algorithm="nncf"), 5.0, 300, 0.001, 0.002)
    half, plain = result(Bf16(), 2.0, 500), result(Fp32(), 1.5, 1000)
    failing = result(Dynamic(), 9.0, 100, 0.5)
    assert order_candidates([failing, plain, half, close, safe], GUARD, preference()) == [safe, close, half, plain]


def test_float_that_is_better_comes_first_whatever_the_margin_of_int8() -> None:
    half, int8 = result(Bf16(), 8.0, 500), result(Static(), 2.0, 300)
    assert order_candidates([int8, half], GUARD, preference()) == [half, int8]


def test_mixed_precision_that_is_hardly_better_than_float_is_not_delivered() -> None:
    plain = result(Fp32(), 5.3, 1000)
    mixed = result(Static(), 4.9, 770, 0.005, float_layers=46)
    assert dominated_by(mixed, [mixed, plain], GUARD, preference()) is plain
    assert order_candidates([mixed, plain], GUARD, preference()) == [plain]
    good = result(Static(), 4.9, 300, 0.005, float_layers=2)
    assert order_candidates([good, plain], GUARD, preference()) == [good, plain]
    plain.reference = True  # a scheme that was asked for by name has no rival
    assert dominated_by(mixed, [mixed, plain], GUARD, preference()) is None


def test_finalists_include_the_fastest_the_smallest_the_best_float_one_and_float32_on_their_engines() -> None:
    best, near = result(Static(), 6.0, 300), result(Static(algorithm="nncf"), 5.9, 301)
    third, small = result(Static(granularity="per_tensor"), 5.8, 302), result(Dynamic(), 1.1, 200)
    half, plain = result(Bf16(), 2.0, 500), result(Fp32(), 1.5, 1000)
    other = result(Fp32(), 1.0, 1000, runtime="onnxruntime")
    chosen = select_finalists([plain, other, half, third, small, near, best], GUARD, preference())
    assert {id(one) for one in chosen} == {id(one) for one in (best, near, small, half, plain)}
    assert all(one.status == "finalist" for one in chosen)
    assert third.status == other.status == "dropped"
    assert "speed times size ratio of the best" in third.why


def test_where_none_holds_the_guard_the_closest_is_measured_beside_float32_on_its_engine() -> None:
    bad, worse = result(Static(), 6.0, 300, 0.2), result(Static(algorithm="nncf"), 9.0, 300, 0.3)
    plain = result(Fp32(), 2.0, 1000)
    plain.reference, plain.drop, plain.timing = True, None, None  # references are not screened
    assert select_finalists([worse, bad, plain], GUARD, preference()) == [bad, plain]
    assert worse.why == "quality drop 0.3000 on the selection samples is above the guard 0.01"


def test_no_measured_candidate_is_an_error_with_every_reason() -> None:
    broken = result(Static(), 1.0, 300)
    broken.error = TechniqueError("it gives NaN")
    with pytest.raises(TechniqueError, match="no candidate could be measured") as caught:
        select_finalists([broken], GUARD, preference())
    assert "it gives NaN" in caught.value.why
