from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omgoptim.errors import TechniqueError
from omgoptim.requests.quantize import Fp16


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm", "gru", "encoder"])
def test_every_engine_opens_the_file_and_the_output_stays(program, apply, cosine, name, engine):
    pytest.importorskip(engine)
    target, outcome = apply(program(name), Fp16())
    assert outcome.changed
    assert cosine(program(name), target, engine) > 0.99999


def test_the_large_weights_take_half_the_bytes(program, apply):
    target, outcome = apply(program("lstm"), Fp16())
    sizes = [
        sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(str(path)).graph.initializer)
        for path in (program("lstm").path, target)
    ]
    assert sizes[0] / sizes[1] > 1.95
    assert any(change.path.startswith("rnn") for change in outcome.changed)


def shared_program(path, weight):
    """y = (x @ w) @ w: two readers of one weight."""
    size = weight.shape[0]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["output"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", size])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


def test_a_shared_weight_is_stored_once(program, apply, tmp_path):
    source = type(program("mlp"))(tmp_path / "shared.onnx", program("mlp").sample)
    shared_program(source.path, np.eye(32, dtype=np.float32))
    target, outcome = apply(source, Fp16())
    model = onnx.load(str(target))
    assert [(t.data_type, tuple(t.dims)) for t in model.graph.initializer] == [(TensorProto.FLOAT16, (32, 32))]
    assert len(outcome.changed) == 1


def test_a_weight_that_overflows_stays_float_and_is_listed(program, apply, tmp_path):
    source = type(program("mlp"))(tmp_path / "large.onnx", program("mlp").sample)
    weight = np.eye(32, dtype=np.float32)
    weight[0, 0] = 1e5
    shared_program(source.path, weight)
    model = onnx.load(str(source.path))
    model.graph.node.append(helper.make_node("MatMul", ["output", "v"], ["second"]))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(32, dtype=np.float32), "v"))
    model.graph.output[0].name = "second"
    onnx.save(model, str(source.path))
    target, outcome = apply(source, Fp16())
    assert [change.what for change in outcome.changed] == ["weight v 32x32"]
    assert [("overflow" in skip.reason, skip.path) for skip in outcome.skipped] == [(True, "MatMul_1")]
    kept = next(t for t in onnx.load(str(target)).graph.initializer if t.name == "w")
    np.testing.assert_array_equal(numpy_helper.to_array(kept), weight)


def test_nothing_that_fits_is_an_error_that_names_bf16(program, apply, tmp_path):
    source = type(program("mlp"))(tmp_path / "large.onnx", program("mlp").sample)
    shared_program(source.path, np.full((32, 32), 1e5, np.float32))
    with pytest.raises(TechniqueError) as caught:
        apply(source, Fp16())
    assert "bf16" in caught.value.fix
