from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omgoptim.errors import TechniqueError
from omgoptim.requests.quantize import Dynamic
from omgoptim.techniques.quantize._onnx.program import lacks_int8_dot_product


def ops(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(str(path)).graph.node)


def weight_bytes(path: Path) -> int:
    return sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(str(path)).graph.initializer)


def matmul_program(path: Path, weight: list[list[float]]) -> None:
    """A user's own ONNX file: no names on nodes, no module paths."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["output"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(np.array(weight, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


def test_linear_layers_become_integer_products_and_the_output_stays_close(program, apply, cosine):
    source = program("mlp")
    target, outcome = apply(source, Dynamic())
    assert ops(target)["MatMulInteger"] == 3
    assert [change.path for change in outcome.changed] == ["body.0", "body.2", "head"]
    assert outcome.skipped == []
    assert cosine(source, target) > 0.999
    assert weight_bytes(source.path) / weight_bytes(target) > 3


def test_an_exported_lstm_whose_weights_are_computed_in_the_graph_becomes_an_integer_lstm(program, apply, cosine):
    source = program("lstm")
    graph = onnx.load(str(source.path)).graph
    recurrent = next(node for node in graph.node if node.op_type == "LSTM").input[2]
    assert recurrent not in {tensor.name for tensor in graph.initializer}, "the case that needs folding is gone"
    target, outcome = apply(source, Dynamic())
    assert ops(target)["DynamicQuantizeLSTM"] == 1
    assert ops(target)["LSTM"] == 0
    assert [change.path for change in outcome.changed] == ["rnn", "head"]
    assert cosine(source, target) > 0.999
    assert weight_bytes(source.path) / weight_bytes(target) > 3


def test_an_attention_encoder_is_quantized_with_its_embedding_and_stays_close(program, apply, cosine):
    source = program("encoder")
    target, outcome = apply(source, Dynamic())
    assert ops(target)["MatMulInteger"] == 5
    assert {change.path for change in outcome.changed} == {
        "emb",
        "layer.self_attn",
        "layer.self_attn.out_proj",
        "layer.linear1",
        "layer.linear2",
        "head",
    }
    assert cosine(source, target) > 0.999
    assert "emb.weight" not in {tensor.name for tensor in onnx.load(str(target)).graph.initializer}


def test_convolutions_stay_float_and_are_listed_with_the_reason(program, apply, cosine):
    target, outcome = apply(program("cnn"), Dynamic())
    assert ops(target)["Conv"] == 2
    assert ops(target)["ConvInteger"] == 0
    assert [change.path for change in outcome.changed] == ["head"]
    assert [skip.path for skip in outcome.skipped] == ["stem.0", "block.0"]
    assert all("scheme static" in skip.reason for skip in outcome.skipped)
    assert cosine(program("cnn"), target) > 0.999


def test_a_gru_is_stored_in_int8_computed_in_float_and_reported_so(program, apply, cosine):
    source = program("gru")
    target, outcome = apply(source, Dynamic())
    assert ops(target)["GRU"] == 1
    assert [change.path for change in outcome.changed] == ["rnn", "head"]
    assert outcome.changed[0].after == "int8 weight on disk, computed in float"
    assert weight_bytes(source.path) / weight_bytes(target) > 3.5
    assert cosine(source, target) > 0.999


def test_a_program_with_nothing_to_quantize_is_an_error_that_names_the_scheme_that_helps(program, apply):
    with pytest.raises(TechniqueError, match="no layer") as caught:
        apply(program("conv_only"), Dynamic())
    assert "scheme static" in caught.value.fix


def test_ignored_layers_stay_float_bit_for_bit(program, apply):
    source = program("mlp")
    target, outcome = apply(source, Dynamic(ignore=["head"]))
    assert ops(target)["MatMulInteger"] == 2
    assert [skip.path for skip in outcome.skipped] == ["head"]
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(source.path)).graph.initializer}
    floats = [numpy_helper.to_array(t) for t in onnx.load(str(target)).graph.initializer]
    assert any(np.array_equal(before["head.weight"].T, array) for array in floats)


def test_a_glob_on_a_module_means_all_layers_inside(program, apply):
    _, outcome = apply(program("mlp"), Dynamic(targets=["body"]))
    assert [change.path for change in outcome.changed] == ["body.0", "body.2"]


def test_a_glob_that_names_no_layer_is_an_error_that_offers_the_nearest(program, apply):
    with pytest.raises(TechniqueError, match="'haed' matches no layer") as caught:
        apply(program("mlp"), Dynamic(ignore=["haed"]))
    assert "'head'" in caught.value.why


def test_globs_that_leave_nothing_are_an_error(program, apply):
    with pytest.raises(TechniqueError, match="no layer") as caught:
        apply(program("mlp"), Dynamic(ignore=["*"]))
    assert "narrow ignore" in caught.value.fix


@pytest.mark.skipif(lacks_int8_dot_product(), reason="weights are kept to 7 bits on this CPU")
@pytest.mark.parametrize(
    ("granularity", "scales"),
    [("per_channel", [1.27 / 127, 2.54 / 127]), ("per_tensor", [2.54 / 127])],
)
def test_the_scales_of_a_2x2_weight_are_those_computed_by_hand(tmp_path, apply, program, granularity, scales):
    source = type(program("mlp"))(tmp_path / "w.onnx", lambda batch, seed: np.ones((batch, 2), np.float32))
    matmul_program(source.path, [[1.27, 0.5], [-0.3, -2.54]])  # one output channel a column
    target, outcome = apply(source, Dynamic(granularity=granularity))
    assert [change.path for change in outcome.changed] == ["MatMul_0"]
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(target)).graph.initializer}
    np.testing.assert_allclose(np.sort(stored["w_scale"].reshape(-1)), scales, rtol=1e-6)
    per_column = np.array(scales) if len(scales) == 2 else np.array(scales * 2)
    np.testing.assert_array_equal(stored["w_quantized"], np.rint(np.array([[1.27, 0.5], [-0.3, -2.54]]) / per_column))


def test_a_quantized_program_is_refused_and_not_quantized_twice(program, apply, tmp_path):
    target, _ = apply(program("mlp"), Dynamic())
    again = type(program("mlp"))(tmp_path / "again.onnx", program("mlp").sample)
    again.path.write_bytes(target.read_bytes())
    with pytest.raises(TechniqueError) as caught:
        apply(again, Dynamic())
    assert "quantized already" in caught.value.why


def test_the_batch_stays_free_and_the_names_stay(program, apply):
    target, _ = apply(program("lstm"), Dynamic())
    graph = onnx.load(str(target)).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["x", "output"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_paths_of_the_users_files_do_not_reach_the_program(program, apply):
    target, _ = apply(program("mlp"), Dynamic())
    assert b"conftest.py" in program("mlp").path.read_bytes()
    assert b"conftest.py" not in target.read_bytes()
