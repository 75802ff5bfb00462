"""Embedding tables in 8 and 4 bits: the rows that are looked up, their error, their bytes and what the report says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from omgoptim.models.onnx_file import initializers
from omgoptim.models.onnx_graph import count_params, find_layers
from omgoptim.requests.quantize import Dynamic, Static, WeightOnly
from omgoptim.techniques.quantize._onnx.embeddings import group_size, quantize_embeddings, quantize_groups


def lookup_model(index_shape: list[str], width: int = 4) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((6, width)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["w", "x"], ["output"], "look")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.INT64, index_shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [*index_shape, width])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def looked_up(model: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": ids})
    return np.asarray(got)


RANKS = [([], np.array(3)), (["n"], np.array([5, 0])), (["b", "s"], np.array([[1, 2, -1]]))]


@pytest.mark.parametrize(("shape", "ids"), RANKS)
@pytest.mark.parametrize("per_row", [True, False])
def test_a_lookup_gives_the_rows_within_half_a_step_for_indices_of_any_rank(shape, ids, per_row):
    model = lookup_model(shape)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    quantize_embeddings(model, find_layers(model), per_row)
    got = looked_up(model, ids)
    assert got.shape == weight[ids].shape
    assert np.abs(got - weight[ids]).max() <= np.abs(weight).max() / 127 / 2 + 1e-6


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("shape", "ids"), RANKS)
def test_in_4_bits_a_lookup_gives_the_rows_as_they_were_quantized(shape, ids, known):
    model = lookup_model(shape, width=96)  # three groups of 32
    if not known:  # indices of a rank that the file does not state
        model.graph.node[0].input[1] = "same"
        model.graph.node.insert(0, helper.make_node("Identity", ["x"], ["same"]))
    weight = numpy_helper.to_array(model.graph.initializer[0])
    integers, scales = quantize_groups(weight, 32)
    want = ((integers.reshape(6, 3, 32).astype(np.float32) - 8) * scales.astype(np.float32)).reshape(6, 96)
    quantize_embeddings(model, find_layers(model), per_row=True, num_bits=4)
    np.testing.assert_allclose(looked_up(model, ids), want[ids], rtol=0, atol=1e-6)


def test_groups_are_quantized_as_computed_by_hand():
    row = np.array([[-8.0, 7.0, 3.2, 0.0, *[0.0] * 12]], np.float32)
    integers, scales = quantize_groups(row, 16)
    assert scales.tolist() == [[[1.0]]]  # -8 is the largest: its scale covers it
    assert integers[0, :5].tolist() == [0, 15, 11, 8, 8]
    integers, scales = quantize_groups(np.zeros((1, 16), np.float32), 16)
    assert integers.tolist() == [[8] * 16]
    assert np.isfinite(scales).all()


def test_the_error_is_smaller_than_with_the_scale_that_covers_the_largest_weight():
    weight = np.random.default_rng(1).standard_normal((200, 64)).astype(np.float32)
    integers, scales = quantize_groups(weight, 64)
    got = (integers.astype(np.float32) - 8) * scales[:, :, 0].astype(np.float32)
    place = np.abs(weight).argmax(1)
    covering = (weight[np.arange(200), place] / -8).astype(np.float16).astype(np.float32)[:, None]
    plain = np.clip(np.rint(weight / covering), -8, 7) * covering
    assert np.square(got - weight).sum() < 0.95 * np.square(plain - weight).sum()
    assert np.square(got - weight).sum() < 0.012 * np.square(weight).sum()  # 19 dB: 16 levels on normal values


def test_a_row_that_no_group_divides_stays_in_8_bits():
    assert [group_size(width) for width in (384, 96, 48, 40)] == [32, 32, 16, None]
    model = lookup_model(["n"], width=40)
    quantize_embeddings(model, find_layers(model), per_row=True, num_bits=4)
    assert {t.data_type for t in initializers(model).values() if t.name.endswith("_quantized")} == {TensorProto.INT8}


def test_packed_parameters_are_counted_each_and_zeros_are_zeros(tmp_path: Path):
    model = lookup_model(["n"], width=64)
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[2] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    quantize_embeddings(model, find_layers(model), per_row=True, num_bits=4)
    del model.graph.initializer[0]  # the float table, which `finish` removes
    onnx.save(model, tmp_path / "m.onnx")
    params, nonzero = count_params(tmp_path / "m.onnx")
    assert params == 6 * 64
    assert 250 < nonzero <= 5 * 64


class Bag(nn.Module):
    """Two lookups of one table, and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(2000, 64), nn.Linear(64, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).mean(1) + self.words(ids[:, 0]))


SCHEMES = [
    Dynamic(embedding_bits=4),
    WeightOnly(embedding_bits=4, group_size=16),
    Static(embedding_bits=4, algorithm="onnxruntime"),
    Static(embedding_bits=4, algorithm="nncf"),
]


@pytest.mark.parametrize("params", SCHEMES, ids=lambda params: f"{params.scheme} {getattr(params, 'algorithm', '')}")
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_scheme_stores_the_table_in_4_bits_and_says_so(params, engine, exported, apply, cosine):
    if engine == "openvino" or getattr(params, "algorithm", "") == "nncf":
        pytest.importorskip("nncf")
    program = exported(Bag(), lambda batch, seed: np.random.default_rng(seed).integers(0, 2000, (batch, 12)))
    bytes_of = {}
    for bits in (8, 4):
        path, outcome = apply(program, params.model_copy(update={"embedding_bits": bits}))
        bytes_of[bits] = path.stat().st_size
    assert {change.path: change.after for change in outcome.changed}["words"] == "int4 weight, computed in float"
    assert bytes_of[8] / bytes_of[4] > 1.6
    assert cosine(program, path, engine) > 0.98
