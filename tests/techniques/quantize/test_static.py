from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import omgoptim
from omgoptim.errors import DataError, SetupError, TechniqueError
from omgoptim.requests.quantize import Static
from omgoptim.techniques.quantize._ptq import backends
from omgoptim.techniques.quantize._ptq.state import apply_preset
from omgoptim.techniques.quantize.static import variants

ALGORITHMS = [
    "onnxruntime",
    pytest.param("nncf", marks=pytest.mark.skipif(not backends.has_nncf(), reason="nncf is not installed")),
]
needs_nncf = pytest.mark.skipif(not backends.has_nncf(), reason="nncf is not installed")


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def stored(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_layers_get_quantizers_and_both_engines_stay_close(program, apply, cosine, algorithm, name):
    source = program(name)
    target, outcome = apply(source, Static(algorithm=algorithm))
    paths = {"cnn": ["stem.0", "block.0", "head"], "mlp": ["body.0", "body.2", "head"]}[name]
    assert [change.path for change in outcome.changed] == paths
    assert outcome.skipped == []
    assert ops(target)["QuantizeLinear"] >= 3
    assert ops(target)["DequantizeLinear"] >= 6
    assert cosine(source, target) > 0.995
    if backends.has_nncf():
        assert cosine(source, target, "openvino") > 0.995
    before, after = (sum(a.nbytes for a in stored(p).values()) for p in (source.path, target))
    assert before / after > 3


@pytest.mark.parametrize("range_method", ["entropy", "percentile", "mse"])
def test_ranges_from_a_histogram_work_over_several_batches(program, apply, cosine, range_method):
    target, _ = apply(program("cnn"), Static(algorithm="onnxruntime", range_method=range_method))
    assert cosine(program("cnn"), target) > 0.99


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ignored_layers_stay_float_bit_for_bit(program, apply, algorithm):
    source = program("cnn")
    target, outcome = apply(source, Static(algorithm=algorithm, ignore=["stem"], equalize=False))
    assert [change.path for change in outcome.changed] == ["block.0", "head"]
    assert [skip.path for skip in outcome.skipped] == ["stem.0"]
    np.testing.assert_array_equal(stored(target)["stem.0.weight"], stored(source.path)["stem.0.weight"])


def test_an_ignored_layer_may_have_its_channels_scaled_and_stays_float(program, apply, cosine):
    source = program("cnn")
    target, outcome = apply(source, Static(algorithm="onnxruntime", ignore=["block.0"]))
    assert [change.path for change in outcome.changed] == ["stem.0", "head"]
    assert stored(target)["block.0.weight"].dtype == np.float32
    assert cosine(source, target) > 0.999


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_targets_quantize_only_these(program, apply, algorithm):
    _, outcome = apply(program("mlp"), Static(algorithm=algorithm, targets=["body.?"]))
    assert [change.path for change in outcome.changed] == ["body.0", "body.2"]


def test_symmetric_activations_have_a_zero_point_of_zero(program, apply):
    target, _ = apply(program("mlp"), Static(algorithm="onnxruntime", symmetric=True))
    graph, arrays = onnx.load(str(target)).graph, stored(target)
    zero_points = [arrays[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
    assert zero_points
    assert all(zero.dtype == np.int8 and zero == 0 for zero in zero_points)


def test_the_input_scale_is_the_range_of_the_calibration_data_over_255(program, apply):
    low_to_high = np.linspace(-1, 3, 64, dtype=np.float32).reshape(2, 32)
    plain = apply_preset(Static(algorithm="onnxruntime"), "fast")
    target, _ = apply(program("mlp"), plain, [low_to_high])
    node = next(n for n in onnx.load(str(target)).graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "x")
    np.testing.assert_allclose(stored(target)[node.input[1]], 4 / 255, rtol=1e-5)
    assert stored(target)[node.input[2]] == 64  # where 0 lies in [-1, 3] on 0..255


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_granularity_decides_how_many_scales_a_weight_has(program, apply, algorithm, granularity):
    target, _ = apply(program("cnn"), Static(algorithm=algorithm, granularity=granularity))
    graph, arrays = onnx.load(str(target)).graph, stored(target)
    (scale,) = [
        n.input[1] for n in graph.node if n.op_type == "DequantizeLinear" and _shape(arrays, n) == (32, 16, 3, 3)
    ]
    assert arrays[scale].size == (32 if granularity == "per_channel" else 1)


def _shape(arrays: dict[str, np.ndarray], node: onnx.NodeProto) -> tuple[int, ...]:
    return arrays[node.input[0]].shape if node.input[0] in arrays else ()


def test_onnxruntime_refuses_attention_and_names_what_helps(program, apply):
    with pytest.raises(TechniqueError, match="attention") as caught:
        apply(program("encoder"), Static(algorithm="onnxruntime"))
    assert "nncf" in caught.value.fix
    assert "dynamic" in caught.value.fix


@needs_nncf
@pytest.mark.parametrize("name", ["encoder", "pooled_encoder"])
def test_auto_takes_nncf_for_attention_and_both_engines_stay_close(program, apply, cosine, name):
    target, outcome = apply(program(name), Static())
    assert {"layer.linear1", "layer.linear2", "layer.self_attn"} <= {change.path for change in outcome.changed}
    assert cosine(program(name), target) > 0.99
    assert cosine(program(name), target, "openvino") > 0.99


QUIET = """
import sys
from pathlib import Path
import numpy as np
from omgoptim.requests.quantize import Static
from omgoptim.techniques.registry import ProgramRun, technique_of
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
run = ProgramRun([{"x": np.ones((4, 32), np.float32)}], folder)
technique_of(Static()).apply(source, folder / "out.onnx", Static(algorithm="nncf"), run)
import os
from nncf.telemetry.wrapper import NNCFTelemetry, telemetry
print(isinstance(telemetry, NNCFTelemetry), "CI" in os.environ, "NNCF_CI" in os.environ)
"""


@needs_nncf
def test_nncf_keeps_off_stdout_reports_nothing_and_leaves_the_environment_alone(program, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI", "NNCF_DEV")}
    done = subprocess.run(  # a process of its own: nncf knows that it runs under pytest
        [sys.executable, "-c", QUIET, str(program("mlp").path), str(tmp_path)],
        cwd=Path(omgoptim.__file__).parents[1],
        env={**clean, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False False False\n"
    assert [path.name for path in home.rglob("*") if "intel" in str(path).lower()] == []


def test_missing_nncf_is_an_error_with_the_install_line(program, apply, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError) as caught:
        apply(program("mlp"), Static(algorithm="nncf"))
    assert caught.value.fix == 'pip install "omgoptim[openvino]"'


def test_variants_are_the_algorithms_worth_trying_on_the_graph(program, monkeypatch):
    monkeypatch.setattr(backends, "has_nncf", lambda: True)
    params = Static(symmetric=True)
    assert [v.algorithm for v in variants(params, program("cnn").path)] == ["onnxruntime", "nncf"]
    assert [v.algorithm for v in variants(params, program("encoder").path)] == ["nncf"]
    assert all(v.symmetric for v in variants(params, program("cnn").path))
    assert variants(Static(algorithm="nncf"), program("cnn").path) == [Static(algorithm="nncf")]
    monkeypatch.setattr(backends, "has_nncf", lambda: False)
    assert [v.algorithm for v in variants(params, program("cnn").path)] == ["onnxruntime"]


def test_without_calibration_data_it_is_an_error(program, apply):
    with pytest.raises(DataError, match="needs calibration data"):
        apply(program("mlp"), Static(), [])


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_bad_values_in_calibration_data_are_an_error_that_names_the_input(program, apply, value, word):
    batch = program("mlp").sample(4, 0)
    batch[2, 3] = value
    with pytest.raises(DataError, match=f"'x' contains .*{word}"):
        apply(program("mlp"), Static(), [batch])


def test_recurrent_layers_stay_float_and_are_listed_with_the_scheme_that_helps(program, apply):
    target, outcome = apply(program("lstm"), Static(algorithm="onnxruntime"))
    assert ops(target)["LSTM"] == 1
    assert [change.path for change in outcome.changed] == ["head"]
    assert [(skip.path, "scheme dynamic" in skip.reason) for skip in outcome.skipped] == [("rnn", True)]


def test_a_program_with_only_a_gru_is_an_error(program, apply):
    with pytest.raises(TechniqueError, match="changed no layer") as caught:
        apply(program("gru_only"), Static(algorithm="onnxruntime"))
    assert "scheme dynamic" in caught.value.why


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_users_program_of_an_old_opset_without_node_names_works(program, apply, cosine, tmp_path, algorithm):
    weight = np.random.default_rng(0).standard_normal((4, 1, 3, 3)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["h"]), onnx.helper.make_node("Relu", ["h"], ["output"])],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 1, 12, 12])],
        [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", 4, 10, 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    source = type(program("cnn"))(tmp_path / "old.onnx", program("cnn").sample)
    opsets = [onnx.helper.make_opsetid("", 11)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=6), str(source.path))
    target, outcome = apply(source, Static(algorithm=algorithm))
    assert [change.path for change in outcome.changed] == ["Conv_0"]
    assert cosine(source, target) > 0.99


class Detector(nn.Module):
    """Boxes in pixels and scores of classes in one tensor, as exported detectors give them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.box, self.score = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.body(x).relu()
        return torch.cat([self.box(hidden).sigmoid() * 640, (9 * self.score(hidden)).sigmoid()], 1).flatten(2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_scores_beside_boxes_in_pixels_do_not_share_their_scale(exported, apply, infer, algorithm):
    source = exported(
        Detector(),
        lambda batch, seed: 2 * np.random.default_rng(seed).standard_normal((batch, 1, 16, 16), dtype=np.float32),
    )
    target, _ = apply(source, Static(algorithm=algorithm))
    x = source.sample(32, 5)
    want, got = (infer(path, x, "onnxruntime")[:, 4:] for path in (source.path, target))
    assert np.sqrt(((got - want) ** 2).mean()) < 0.2 * want.std()
