"""Second mixed precision search: its condition and its result, with a substitute for search and samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from omgoptim.measure.timing import Ratio, Timing
from omgoptim.operations.quantization import mixed_precision_retry
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference
from omgoptim.requests.quantize import Bf16, Static

GUARD = 0.01


def result(params: Any, drop: float, timed: bool = True) -> CandidateResult:
    timing = Timing(1.0, 1.0, None, None, Ratio(3.0, 2.9, 3.1), None, 5) if timed else None
    in_float = len(getattr(params, "ignore", []))
    made = BuiltCandidate(CandidateSpec(params, "openvino", float_layers=in_float), Path("nowhere"))
    return CandidateResult(made, timing=timing, drop=drop, high=drop)


def search_again(
    monkeypatch: pytest.MonkeyPatch, failed: list[CandidateResult], seen: float, found: CandidateResult | None
) -> Any:
    """Result of a second search, where the new samples show a drop of `seen` and the search finds `found`."""
    samples = SimpleNamespace(batches=[], targets=[], count=64)

    def new_reference(_search: Any, _samples: Any, base: CandidateResult) -> Any:
        base.drop = base.high = seen
        return object()

    def search_mixed_precision(again: Any, _attempts: Any, base: CandidateResult) -> Any:
        assert again.samples_name == "selection samples, 64 of them new,"
        if found is None:
            return None
        return SimpleNamespace(best=found, base=base, improved=found is not base)

    monkeypatch.setattr(mixed_precision_retry, "unused_samples", lambda *_: samples)
    monkeypatch.setattr(mixed_precision_retry, "_new_reference", new_reference)
    monkeypatch.setattr(mixed_precision_retry, "search_mixed_precision", search_mixed_precision)
    request = SimpleNamespace(max_quality_drop=GUARD)
    builder = SimpleNamespace(context=SimpleNamespace(progress=lambda *_: None), loaded=None)
    preference = Preference("balanced", 1000)
    search = mixed_precision_retry.MixedPrecisionSearch(request, builder, None, preference)  # type: ignore[arg-type]
    splits: Any = SimpleNamespace(selection=samples)
    final: Any = SimpleNamespace(rejected=[SimpleNamespace(entry=one) for one in failed])
    return mixed_precision_retry.retry_mixed_precision(search, splits, [], final, None)


MIXED = Static(ignore=["0"])


def test_a_candidate_that_holds_on_the_new_samples_is_a_finalist(monkeypatch: pytest.MonkeyPatch) -> None:
    best = result(MIXED, 0.002)
    again = search_again(monkeypatch, [result(Static(), 0.005)], 0.05, best)
    assert again.best is best
    assert best.status == "finalist"


@pytest.mark.parametrize(
    ("failed", "seen", "found"),
    [
        ([], 0.05, result(MIXED, 0.0)),  # nothing failed on the evaluation data
        ([result(Bf16(), 0.0)], 0.05, result(MIXED, 0.0)),  # it has no layers to keep in float
        ([result(Static(), 0.0)], 0.001, result(MIXED, 0.0)),  # the new samples see nothing wrong with it
        ([result(Static(), 0.0)], 0.05, None),  # nothing could be searched
        ([result(Static(), 0.0)], 0.05, result(MIXED, 0.02)),  # what was found fails on the new samples, too
        ([result(MIXED, 0.0)], 0.05, result(MIXED, 0.0)),  # it is what failed
        ([result(Static(), 0.0)], 0.05, result(MIXED, 0.0, timed=False)),
    ],
)
def test_otherwise_what_was_measured_stands(
    monkeypatch: pytest.MonkeyPatch, failed: list[CandidateResult], seen: float, found: CandidateResult | None
) -> None:
    assert search_again(monkeypatch, failed, seen, found) is None
