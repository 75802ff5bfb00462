"""The guard and the explanation, whole: a network whose one layer int8 ruins, on real engines."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import omgoptim
from omgoptim.errors import TechniqueError
from omgoptim.measure.timing import Ratio, Timing
from omgoptim.models.onnx_graph import OnnxLayer
from omgoptim.operations.quantization.build_candidates import BuiltCandidate
from omgoptim.operations.quantization.candidate_evaluator import CandidateEvaluator
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.operations.quantization.layer_search import SearchLayer, search_layers_of
from omgoptim.operations.quantization.mixed_precision import Searcher, mixed_precision_base, with_float_layers
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference
from omgoptim.requests.quantize import Bf16, Static
from omgoptim.techniques.quantize._diagnostics.sensitivity import LayerSensitivity, SensitivityReport

warnings_of_engines = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
PLAIN = {"range_method": "minmax", "equalize": False, "bias_correction": False, "rounding": "nearest"}
COMMON = {"timing": "quick", "checkpoint": "net.pt", "data": "net.py:load", "runtime": "onnxruntime"}


@pytest.fixture
def ruined(project: Path) -> Path:
    """The project's network with the channels between its convolutions spread; its float outputs are the same."""
    state = torch.load(project / "net.pt", weights_only=True)
    factors = torch.exp(torch.from_numpy(np.random.default_rng(0).uniform(-5, 5, 16)).float())
    state["1.weight"] *= factors
    state["1.bias"] *= factors
    state["3.weight"] /= factors[None, :, None, None]
    torch.save(state, project / "net.pt")
    return project


@warnings_of_engines
@pytest.mark.usefixtures("ruined")
def test_the_layer_that_int8_ruins_stays_in_float_and_the_explanation_says_why() -> None:
    report = omgoptim.quantize(
        "net.py:net", scheme="static", algorithm="onnxruntime", max_quality_drop=0.02, explain=True, **PLAIN, **COMMON
    )
    assert report.outcome == "ok"
    guard = report.guard
    assert guard is not None
    assert guard.holds
    assert set(guard.kept_in_float) == {"0", "3"}  # the writer also rounds what 0 gives, which is what 3 is given
    assert guard.evaluations <= 3
    assert guard.float_bytes == (16 * 9 + 16 * 32 * 9) * 4
    assert guard.quality_drop <= 0.02
    plain = next(candidate for candidate in report.candidates if candidate.name == "static-onnxruntime on onnxruntime")
    assert plain.status == "dropped"
    assert plain.quality_drop is not None
    assert plain.quality_drop > 0.02
    assert report.candidates[0].name == "static-onnxruntime, 2 layers in float on onnxruntime"
    assert {change.path for change in report.changed} == {"8"}
    assert guard.why in report.summary
    assert [one.name for one in report.alternatives] == ["fp32-on-onnxruntime"]
    assert report.gains_by is not None
    again = shlex.split(report.next_steps[-1].command)
    assert {again[place + 1] for place, word in enumerate(again) if word == "--ignore"} == {"0", "3"}

    found = report.explanation
    assert found is not None
    assert {layer.path for layer in found.layers[:2]} == {"0", "3"}
    assert all(layer.sqnr_db < 20 and layer.recovered is not None for layer in found.layers[:2])
    assert found.layers[2].sqnr_db > 30
    spread = next(finding for finding in found.findings if finding.name == "spread channels")
    assert spread.paths[0] == "3"
    assert spread.recovered is not None
    assert spread.recovered > 0.5 * plain.quality_drop
    assert "spread channels" in found.summary
    assert sum(time.share for time in found.times) == pytest.approx(1)
    assert any(time.quantized for time in found.times)
    assert found.speedup_bound is not None
    assert found.speedup_bound > 1


BY_SPEED = Preference("speed", 1000)


def result(params: Static | Bf16, runtime: str, speedup: float, drop: float) -> CandidateResult:
    timing = Timing(1.0, 1.0, None, None, Ratio(speedup, None, None), None, 1)
    return CandidateResult(BuiltCandidate(CandidateSpec(params, runtime)), timing=timing, drop=drop, high=drop)


def test_the_search_begins_with_what_loses_least_on_its_fastest_engine_and_only_if_it_can_pay() -> None:
    nncf, own = Static(algorithm="nncf"), Static(algorithm="onnxruntime")
    slow, fast = result(own, "onnxruntime", 3.0, 0.05), result(own, "openvino", 4.0, 0.052)
    worse, half = result(nncf, "openvino", 5.0, 0.2), result(Bf16(), "openvino", 2.0, 0.0)
    assert mixed_precision_base([worse, slow, fast, half], 0.01, BY_SPEED) is fast
    assert mixed_precision_base([worse, slow, fast, half], 0.05, BY_SPEED) is None  # one holds as it is
    near = result(own, "onnxruntime", 3.6, 0.05)
    assert mixed_precision_base([near, fast, half], 0.01, BY_SPEED) is near  # loses less, and is about as fast
    assert mixed_precision_base([half], 0.01, BY_SPEED) is None
    as_fast = result(Bf16(), "openvino", 4.0, 0.0)
    assert mixed_precision_base([slow, fast, as_fast], 0.01, BY_SPEED) is None
    broken = result(own, "openvino", 9.0, 0.02)
    broken.error = TechniqueError("it gives NaN")
    assert mixed_precision_base([broken, slow], 0.01, BY_SPEED) is slow


def test_the_search_begins_where_the_guard_holds_by_less_than_the_samples_can_tell() -> None:
    close = result(Static(), "openvino", 3.0, 0.094)
    close.high = 0.2
    assert mixed_precision_base([close], 0.1, BY_SPEED) is close
    close.high = 0.099
    assert mixed_precision_base([close], 0.1, BY_SPEED) is None


def test_float32_that_nobody_asked_for_does_not_end_the_search() -> None:
    ruined, plain = result(Static(), "openvino", 3.0, 0.5), result(Bf16(), "openvino", 9.0, 0.0)
    plain.reference = True
    assert mixed_precision_base([ruined, plain], 0.1, BY_SPEED) is ruined


def layer(node: str, path: str) -> OnnxLayer:
    return OnnxLayer(node, "Conv", path, f"{path}.weight", (f"{path}.weight",), (4, 4, 1, 1), 1, 64)


def test_every_layer_gets_a_name_that_means_it_alone() -> None:
    layers = [layer("n0", "body"), layer("n1", "body.0"), layer("n2", "head"), layer("n3", "head"), layer("n4", "a[0]")]
    noise = SensitivityReport(10.0, [LayerSensitivity(one, 20.0, True) for one in layers], 8)
    assert [layer.name for layer in search_layers_of(noise)] == ["n0", "body.0", "n2", "n3", "n4"]
    assert search_layers_of(noise)[0].noise == pytest.approx(0.01)


def test_the_users_own_ignore_is_kept_and_extended() -> None:
    spec = with_float_layers(CandidateSpec(Static(ignore=["stem"]), "openvino"), ("head", "body.0"))
    assert isinstance(spec.params, Static)
    assert spec.params.ignore == ["stem", "head", "body.0"]
    assert spec.name == "static, 2 layers in float on openvino"
    assert with_float_layers(spec, ()) is spec


def test_no_evaluation_begins_that_would_likely_end_past_the_deadline() -> None:
    now = [0.0]
    trials = CandidateEvaluator(*[None] * 3, deadline=10.0, clock=lambda: now[0])  # type: ignore[arg-type]
    assert not trials.out_of_time()
    trials.longest_s = 4.0
    now[0] = 5.9
    assert not trials.out_of_time()
    now[0] = 6.0
    assert trials.out_of_time()


LAYERS = [SearchLayer(name, name, 100, noise) for name, noise in (("a", 8.0), ("b", 4.0), ("c", 2.0), ("d", 1.0))]


class Trials:
    """Evaluations whose drop is that of the rounding, less what each layer in float restores."""

    def __init__(self, plain: float, adaround: float, restored: float) -> None:
        self.drops = {"small_kernels": plain, "adaround": adaround}
        self.restored, self.longest_s, self.names = restored, 0.0, []

    def out_of_time(self) -> bool:
        return False

    def of(self, spec: CandidateSpec, doing: str) -> CandidateResult:
        assert isinstance(spec.params, Static)
        drop = self.drops[spec.params.rounding] - self.restored * len(spec.params.ignore)
        found = CandidateResult(BuiltCandidate(spec), drop=drop, high=drop)
        self.names.append(spec.note)
        return found


def searched(trials: Trials, **params: object) -> tuple[str, int, bool]:
    """Return the name of the best candidate, its layers in float, and whether AdaRound was tried."""
    given = {"algorithm": "onnxruntime", "rounding": "small_kernels"} | params
    base = CandidateResult(BuiltCandidate(CandidateSpec(Static.model_validate(given), "openvino")))
    base.drop = base.high = trials.drops["small_kernels"]
    found, best, rounded = Searcher(trials, 0.02, LAYERS, None, lambda _: True).search(base)  # type: ignore[arg-type]
    assert best.built.spec.float_layers == len(found.best.kept)
    return best.built.spec.note, len(found.best.kept), rounded is not None


def test_adaround_is_tried_where_too_many_layers_would_stay_in_float() -> None:
    assert searched(Trials(plain=0.1, adaround=0.01, restored=0.03)) == ("AdaRound", 0, True)
    assert searched(Trials(plain=0.1, adaround=0.04, restored=0.03)) == ("AdaRound, 1 layer in float", 1, True)


def test_adaround_is_not_tried_where_few_layers_suffice_or_the_rounding_was_named() -> None:
    assert searched(Trials(plain=0.04, adaround=0.0, restored=0.03)) == ("1 layer in float", 1, False)
    trials = Trials(plain=0.1, adaround=0.0, restored=0.03)
    trials.drops["nearest"] = 0.1
    assert searched(trials, rounding="nearest") == ("3 layers in float", 3, False)


def test_adaround_that_loses_as_much_changes_nothing() -> None:
    assert searched(Trials(plain=0.1, adaround=0.1, restored=0.03)) == ("3 layers in float", 3, True)
