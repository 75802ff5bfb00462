"""The words and choices of an explanation; its measured parts are in `test_guard.py`."""

from __future__ import annotations

from omgoptim.measure.engine_profile import speedup_bound, time_shares
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.explain import _candidate_to_explain, _spec_without, _time_sentence
from omgoptim.operations.quantization.mixed_precision import MixedPrecision
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.reports import Guard
from omgoptim.requests.quantize import Bf16, Static
from omgoptim.techniques.quantize._diagnostics.diagnostics import Diagnostic

PLAIN = CandidateSpec(Static(algorithm="nncf"), "openvino")
MIXED = CandidateSpec(Static(algorithm="nncf", ignore=["head"]), "openvino", "1 layer in float", 1)
TIMES = time_shares([("QLinearConv", 3.0, "int8"), ("Resize", 1.0, "float32")])


def result(spec: CandidateSpec, drop: float) -> CandidateResult:
    return CandidateResult(BuiltCandidate(spec), drop=drop)


def test_a_mixed_artifact_is_explained_by_the_candidate_without_layers_in_float() -> None:
    base, mixed = result(PLAIN, 0.2), result(MIXED, 0.0)
    record = Guard(
        kept_in_float=["head"], float_bytes=1, evaluations=1, quality_drop=0.0, holds=True, seconds=1.0, why="."
    )
    about = _candidate_to_explain([base, mixed], mixed, MixedPrecision(record, base, mixed, {}, None))
    assert about is not None
    assert about.result is base
    assert about.is_artifact
    assert about.in_float == 1


def test_another_artifact_is_explained_by_the_static_candidate_that_lost_least() -> None:
    half = result(CandidateSpec(Bf16(), "openvino"), 0.0)
    worse, better = result(PLAIN, 0.2), result(CandidateSpec(Static(algorithm="onnxruntime"), "openvino"), 0.1)
    about = _candidate_to_explain([half, worse, better, result(MIXED, 0.05)], half, None)
    assert about is not None
    assert about.result is better
    assert not about.is_artifact
    assert _candidate_to_explain([half], half, None) is None


def test_the_time_is_told_with_its_bound_and_with_what_the_processor_lacks() -> None:
    words = _time_sentence(TIMES, speedup_bound(TIMES), "", ["avx2", "avx512_vnni"])
    assert "75% of the artifact's time is in integer kernels" in words
    assert "Resize (25%)" in words
    assert "at most 4.00x" in words
    assert "VNNI" not in words
    floats = _time_sentence(time_shares([("Conv", 1.0, "float32")]), None, "", [])
    assert floats == "0% of the artifact's time is in integer kernels, most of it in Conv (100%)."
    assert "no int8 dot product (VNNI)" in _time_sentence(TIMES, 4.0, "", ["avx2"])
    assert "VNNI" not in _time_sentence(TIMES, 4.0, "", [])
    assert _time_sentence([], None, "a GPU", []) == "The time per layer is unknown: a GPU."


def test_a_cause_is_undone_by_parameters_where_the_technique_has_them_else_by_layers_in_float() -> None:
    cause = Diagnostic("spread channels", ["head"], "", "", ["node_head"], {"equalize": True})
    undone = _spec_without(PLAIN, cause)
    assert undone is not None
    assert undone.params == Static(algorithm="nncf", equalize=True)
    other = _spec_without(PLAIN, Diagnostic("x", ["head"], "", "", ["node_head"], {"unheard_of": True}))
    assert other is not None
    assert other.params == Static(algorithm="nncf", ignore=["node_head"])
    assert _spec_without(PLAIN, Diagnostic("mask fill", ["m"], "", "")) is None
