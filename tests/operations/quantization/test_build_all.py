"""A quantization that would change nothing: the error's fix is a call that would."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import omgoptim
from omgoptim.errors import DataError, ModelError, NoLayerChanged, OmgoptimError, TechniqueError
from omgoptim.operations.quantization.build_all import no_candidate_error, with_suggested_call
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.command import in_shell
from omgoptim.requests.quantize import Dynamic, Fp32

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CONVOLUTIONS = NoLayerChanged(
    "dynamic quantization would change no layer", "w", "scheme static, with data, does", schemes=["static"]
)


DYNAMIC = CandidateSpec(Dynamic(), "onnxruntime")


def request(**arguments: Any) -> QuantizeRequest:
    asked = parse("quantize", {"model": "net.py:net", "scheme": "dynamic", **arguments})
    assert isinstance(asked, QuantizeRequest)
    return asked


def fixed(error: TechniqueError, asked: QuantizeRequest) -> str:
    return in_shell(with_suggested_call(error, asked).fix)


def test_the_call_is_the_request_with_the_scheme_that_the_technique_names() -> None:
    asked = request(data="net.py:load", runtime="onnxruntime", max_quality_drop=0.02)
    call = (
        "omgoptim quantize net.py:net --data net.py:load --scheme static --runtime onnxruntime --max-quality-drop 0.02"
    )
    assert fixed(CONVOLUTIONS, asked) == f"scheme static, with data, does: {call}"


def test_without_data_the_call_is_one_that_needs_none() -> None:
    assert fixed(CONVOLUTIONS, request()).endswith(": omgoptim quantize net.py:net --scheme bf16")
    two = NoLayerChanged("nothing", "", "scheme static with data, or scheme fp32", schemes=["static", "fp32"])
    assert fixed(two, request()).endswith("--scheme fp32")


def test_a_glob_that_leaves_no_layer_is_left_out_of_the_call() -> None:
    error = NoLayerChanged("nothing", "targets leave none", "widen targets")
    assert fixed(error, request(targets=["nothing"])) == "widen targets: omgoptim quantize net.py:net --scheme dynamic"


def test_a_glob_that_names_no_layer_has_the_call_for_its_fix() -> None:
    error = NoLayerChanged("'nothing' matches no layer of this model", "Known: 0, 3.")
    assert fixed(error, request(targets=["nothing"])) == "omgoptim quantize net.py:net --scheme dynamic"


def test_another_error_and_one_without_a_way_out_stay_as_they_are() -> None:
    other = DataError("the calibration data is empty", "", "scheme dynamic needs none")
    assert with_suggested_call(other, request()) is other
    stuck = NoLayerChanged("nothing", "it is quantized", "start from the float model")
    assert with_suggested_call(stuck, request()) is stuck


def test_candidates_that_all_change_nothing_are_one_error_with_the_call() -> None:
    torch = NoLayerChanged("another text", "w", "another fix", schemes=["static"])
    error = no_candidate_error([(DYNAMIC, CONVOLUTIONS), (CandidateSpec(Fp32(), "torch_eager"), torch)], request())
    assert error.what == CONVOLUTIONS.what
    assert in_shell(error.fix).endswith("--scheme bf16")


def test_one_technique_that_fails_alike_on_every_engine_is_one_error() -> None:
    first, second = ModelError("it cannot run", "the engine died", "use another"), ModelError("it did not run")
    other = replace(DYNAMIC, runtime="openvino")
    assert no_candidate_error([(DYNAMIC, first), (other, second)], request()) is first
    unlike = no_candidate_error([(DYNAMIC, first), (other, DataError("it cannot run"))], request())
    assert unlike.why == "dynamic on onnxruntime: it cannot run; dynamic on openvino: it cannot run"
    both = no_candidate_error(
        [(DYNAMIC, first), (replace(other, params=Fp32()), ModelError("it cannot run"))], request()
    )
    assert (both.what, both.fix) == ("no candidate could be built", "use another")


def test_an_error_that_only_reads_like_one_of_no_layer_stays_as_it_is() -> None:
    other = TechniqueError("it would change no layer", "", "scheme static")
    assert with_suggested_call(other, request(data="net.py:load")) is other


def test_the_kind_crosses_processes_as_that_of_a_technique() -> None:
    assert type(OmgoptimError.from_dict(CONVOLUTIONS.to_dict())) is TechniqueError


def test_candidates_that_fail_for_other_reasons_are_all_named() -> None:
    other = TechniqueError("the engine cannot run it", "", "another runtime")
    error = no_candidate_error([(DYNAMIC, other), (replace(DYNAMIC, runtime="openvino"), CONVOLUTIONS)], request())
    assert (error.what, in_shell(error.fix)) == ("no candidate could be built", "another runtime")
    assert error.why == (
        "dynamic on onnxruntime: the engine cannot run it; "
        "dynamic on openvino: dynamic quantization would change no layer"
    )


def test_dynamic_quantization_of_a_pure_cnn_is_an_error_whose_fix_runs(project: Path) -> None:
    del project
    with pytest.raises(TechniqueError, match="no layer") as caught:
        omgoptim.quantize("conv.py:conv", scheme="dynamic", data="net.py:load", timing="quick")
    command = shlex.split(in_shell(caught.value.fix).partition(": ")[2])
    assert command[:3] == ["omgoptim", "quantize", "conv.py:conv"]
    assert command[command.index("--scheme") + 1] == "static"
    assert command[command.index("--data") + 1] == "net.py:load"


@pytest.fixture(autouse=True)
def pure_cnn(project: Path) -> None:
    """A network without any Linear."""
    code = "from torch import nn\n\ndef conv():\n    return nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())\n"
    (project / "conv.py").write_text(code)
