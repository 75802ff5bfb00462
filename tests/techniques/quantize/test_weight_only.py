from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from omgoptim.errors import DataError, TechniqueError
from omgoptim.measure.program_macs import count_program
from omgoptim.models.onnx_file import load, tensor_bytes
from omgoptim.models.onnx_graph import count_params, find_layers
from omgoptim.requests.quantize import WeightOnly
from omgoptim.techniques.quantize._onnx.weight_storage import pack_nibbles


def gemm_program(kind: type, path: Path, weight: np.ndarray, **attributes: float):
    inputs, outputs = weight.shape[::-1] if attributes.get("transB") else weight.shape
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["output"], "product", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.arange(outputs, dtype=np.float32), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return kind(path, lambda batch, seed: np.random.default_rng(seed).standard_normal((batch, inputs), np.float32))


def stored(path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in load(path).graph.initializer}


def test_two_integers_go_into_a_byte_the_first_into_its_low_half():
    assert pack_nibbles(np.array([-1, 7, -8, -3], np.int8).view(np.uint8)) == bytes([0x7F, 0xD8])
    assert pack_nibbles(np.array([[1, 2], [15, 0]], np.uint8)) == bytes([0x21, 0x0F])
    assert pack_nibbles(np.array([3, 4, 5], np.uint8)) == bytes([0x43, 0x05])


@pytest.mark.parametrize(("num_bits", "least"), [(4, 0.99), (8, 0.9999)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_one_file_runs_on_both_engines_and_stays_close(program, apply, cosine, num_bits, least, symmetric, engine):
    source = program("mlp")
    target, outcome = apply(source, WeightOnly(num_bits=num_bits, group_size=32, symmetric=symmetric))
    assert [change.path for change in outcome.changed] == ["body.0", "body.2", "head"]
    assert all(
        change.after == f"int{num_bits} weight in groups of 32, dequantized at run time" for change in outcome.changed
    )
    assert "often not faster" in outcome.notes[0]
    assert cosine(source, target, engine) > least


def test_a_4_bit_weight_is_half_a_byte_on_disk_with_its_scales_below_a_fifth_of_float(program, apply):
    source = program("mlp")
    target, _ = apply(source, WeightOnly(group_size=64, symmetric=True))
    tensors = stored(target)
    quantized = [node for node in load(target).graph.node if node.op_type == "DequantizeLinear"]
    for node in quantized:
        tensor = tensors[node.input[0]]
        assert tensor.data_type == TensorProto.INT4
        assert len(tensor.raw_data) == int(np.prod(tensor.dims)) / 2
    packed = sum(tensor_bytes(tensors[name]) for node in quantized for name in node.input)
    assert packed <= 0.2 * 4 * (32 * 64 + 64 * 64 + 64 * 10)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_parameters_and_products_count_as_those_of_the_float_program(program, apply, num_bits):
    source = program("mlp")
    target, _ = apply(source, WeightOnly(num_bits=num_bits, group_size=16))
    params, nonzero = count_params(target)
    assert params == count_params(source.path)[0]
    assert 0.8 * params < nonzero <= params
    sample = {"x": source.sample(1, 0)}
    assert count_program(target, sample).macs == count_program(source.path, sample).macs == 32 * 64 + 64 * 64 + 640
    assert [layer.path for layer in find_layers(load(target)) if layer.is_quantized] == ["body.0", "body.2", "head"]


def test_calibration_data_brings_the_output_closer(program, apply, infer):
    source = program("mlp")
    rng = np.random.default_rng(5)
    mix = rng.standard_normal((6, 32)).astype(np.float32)
    batches = [(rng.standard_normal((64, 6)) @ mix).astype(np.float32) for _ in range(5)]
    x = batches.pop()
    want = infer(source.path, x)
    alone, _ = apply(source, WeightOnly(group_size=32), [])
    off_alone = np.abs(infer(alone, x) - want).mean()
    together, outcome = apply(source, WeightOnly(group_size=32), batches)
    assert any("GPTQ was used" in note for note in outcome.notes)
    assert np.abs(infer(together, x) - want).mean() < 0.8 * off_alone


@pytest.mark.parametrize("samples", [1, 2])
def test_so_few_samples_as_one_do_no_harm(program, apply, cosine, samples):
    source = program("mlp")
    target, _ = apply(source, WeightOnly(group_size=32), [source.sample(samples, 3)])
    assert cosine(source, target) > 0.98


def test_calibration_data_with_nan_is_refused(program, apply):
    batch = program("mlp").sample(8, 0)
    batch[3, 2] = np.nan
    with pytest.raises(DataError, match="NaN"):
        apply(program("mlp"), WeightOnly(), [batch])


def test_an_attention_encoder_is_packed_with_its_embedding_in_int8(program, apply, cosine):
    source = program("encoder")
    target, outcome = apply(source, WeightOnly(group_size=32))
    assert {c.path: c.after for c in outcome.changed}["emb"] == "int8 weight, computed in float"
    assert any(path.startswith("layer.self_attn") for path in {c.path for c in outcome.changed})
    assert cosine(source, target) > 0.98
    assert cosine(source, target, "openvino") > 0.98


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_packed_whichever_way_its_weight_lies_and_keeps_its_bias(
    tmp_path, program, apply, cosine, transposed
):
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    source = gemm_program(
        type(program("mlp")), tmp_path / "g.onnx", weight.T.copy() if transposed else weight, transB=transposed
    )
    target, outcome = apply(source, WeightOnly(group_size=16))
    assert [change.path for change in outcome.changed] == ["product"]
    assert cosine(source, target) > 0.995
    quantized = next(n for n in load(target).graph.node if n.op_type == "DequantizeLinear")
    assert list(stored(target)[quantized.input[0]].dims) == [64, 48]


def test_a_gemm_that_scales_its_product_stays_with_a_reason(tmp_path, program, apply):
    source = gemm_program(type(program("mlp")), tmp_path / "g.onnx", np.ones((64, 48), np.float32), alpha=0.5)
    with pytest.raises(TechniqueError) as caught:
        apply(source, WeightOnly())
    assert "constant matrix" in caught.value.why


def test_a_group_that_does_not_divide_the_inputs_becomes_the_largest_that_does(tmp_path, program, apply):
    source = gemm_program(
        type(program("mlp")), tmp_path / "g.onnx", np.random.default_rng(0).random((96, 32), np.float32)
    )
    _, outcome = apply(source, WeightOnly(group_size=128))
    assert "groups of 32" in outcome.changed[0].after
    odd = gemm_program(
        type(program("mlp")), tmp_path / "odd.onnx", np.random.default_rng(0).random((100, 32), np.float32)
    )
    with pytest.raises(TechniqueError, match="no layer") as caught:
        apply(odd, WeightOnly())
    assert "no group size of 16" in caught.value.why


def test_a_network_of_convolutions_is_an_error_that_names_the_scheme_that_helps(program, apply):
    with pytest.raises(TechniqueError, match="no layer") as caught:
        apply(program("conv_only"), WeightOnly())
    assert "scheme static" in caught.value.fix


def test_ignored_layers_stay_float_and_a_packed_program_is_refused(program, apply, tmp_path):
    _, outcome = apply(program("mlp"), WeightOnly(ignore=["head"]))
    assert [skip.path for skip in outcome.skipped] == ["head"]
    packed, _ = apply(program("mlp"), WeightOnly())
    again = type(program("mlp"))(tmp_path / "again.onnx", program("mlp").sample)
    again.path.write_bytes(packed.read_bytes())
    with pytest.raises(TechniqueError) as caught:
        apply(again, WeightOnly())
    assert "quantized already" in caught.value.why


@pytest.mark.parametrize("name", ["encoder", "mlp"])
def test_onnx_runtime_fuses_every_packed_product(program, apply, tmp_path, name):
    """Not so in the network of 2-D products with activations, if their bias were added: it is taken away, negated."""
    import onnxruntime

    target, _ = apply(program(name), WeightOnly(group_size=32))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "ran.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    ran = Counter(node.op_type for node in onnx.load(str(tmp_path / "ran.onnx")).graph.node)
    packed = Counter(node.op_type for node in load(target).graph.node)["DequantizeLinear"]
    assert ran["MatMulNBits"] == packed > 0
    assert ran["DequantizeLinear"] == 0
