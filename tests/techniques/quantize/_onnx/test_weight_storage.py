"""Weight-only storage: 16 bits, embeddings, recurrent layers and packed groups."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from omgoptim.measure.program_macs import count_program
from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import count_params, find_layers
from omgoptim.requests.quantize import Dynamic, WeightOnly
from omgoptim.techniques.quantize._onnx.weight_storage import (
    quantize_rows,
    store_recurrent,
    to_half,
)


def test_rows_have_the_scales_computed_by_hand():
    weight = np.array([[1.27, -0.635], [0.0, 0.0]], np.float32)
    values, scales = quantize_rows(weight, per_row=True)
    np.testing.assert_allclose(scales, [[0.01], [1.0]])
    np.testing.assert_array_equal(values, [[127, -64], [0, 0]])  # -63.5 to the even -64


def test_one_scale_for_all_rows_is_the_largest_value_over_127():
    values, scales = quantize_rows(np.array([[2.54, 0.0], [0.0, -0.2]], np.float32), per_row=False)
    np.testing.assert_allclose(scales, [[0.02]])
    np.testing.assert_array_equal(values, [[127, 0], [0, -10]])


@pytest.mark.parametrize(("half", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_the_bits_are_those_that_torch_rounds_to(half, dtype):
    values = np.random.default_rng(0).standard_normal((64, 33)).astype(np.float32) * 100
    values[0, :5] = [0.0, -0.0, 1e-30, -np.inf, 1.00390625]  # the last lies halfway between two bfloat16
    want = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    got = to_half(values, half)
    assert got is not None
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("half", "value"), [("float16", 65520.0), ("bfloat16", np.finfo(np.float32).max)])
def test_a_finite_value_that_would_become_infinite_is_refused(half, value):
    assert to_half(np.array([1.0, value], np.float32), half) is None


def test_nan_stays_nan():
    for half, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        bits = to_half(np.array([np.nan, 1.0], np.float32), half)
        assert bits is not None
        assert torch.from_numpy(bits.view(np.int16)).view(dtype).isnan().tolist() == [True, False]


class Reader(nn.Module):
    """Two layers, both ways, and a state to begin with that is computed: every input that a GRU can have."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(16, 72, batch_first=True, **options)
        ways = 2 if options.get("bidirectional") else 1
        self.first = nn.Linear(16, 72)
        self.states = int(options.get("num_layers", 1)) * ways
        self.head = nn.Linear(72 * ways, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = torch.tanh(self.first(x[:, 0])).expand(self.states, -1, -1)
        begin = (first, torch.zeros_like(first)) if isinstance(self.rnn, nn.LSTM) else first
        return self.head(self.rnn(x, begin)[0].mean(1))


class Stepper(nn.Module):
    """A cell called in a loop of fixed length: the exporter unrolls it."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(16, 48)
        self.head = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], 48)
        for step in range(5):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, step], (h, c))
            else:
                h = self.cell(x[:, step], h)
        return self.head(h)


def series(batch: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 5, 16), np.float32)


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_scales_of_a_row_are_those_computed_by_hand():
    w_DRK = np.array([[[1.27, -0.3], [0, 0]]], np.float32)
    q, s = quantize_rows(w_DRK, per_row=True)
    np.testing.assert_allclose(s, [[[0.01], [1]]], rtol=1e-6)
    np.testing.assert_array_equal(q, [[[127, -30], [0, 0]]])
    assert quantize_rows(w_DRK, per_row=False)[1].shape == (1, 1, 1)


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_a_gru_of_any_form_is_stored_in_int8_and_stays_close(exported, apply, cosine, options):
    source = exported(Reader(nn.GRU, **options), series)
    target, outcome = apply(source, Dynamic())
    kept = load(target)
    assert ops(kept)["GRU"] == ops(load(source.path))["GRU"]
    recurrent = [layer for layer in find_layers(kept) if layer.op == "GRU"]
    assert recurrent
    assert all(layer.is_quantized for layer in recurrent)
    assert {c.after for c in outcome.changed if c.path == "rnn"} == {"int8 weight on disk, computed in float"}
    assert cosine(source, target) > 0.9995
    assert count_params(target)[0] == count_params(source.path)[0]
    sample = {"x": source.sample(1, 0)}
    assert count_program(target, sample).macs == count_program(source.path, sample).macs


def test_onnx_runtime_folds_the_stored_weight_so_that_the_float_gru_runs(program, apply, tmp_path):
    import onnxruntime

    target, _ = apply(program("gru_only"), Dynamic())
    assert ops(load(target))["Cast"] >= 2
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "ran.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    ran = onnx.load(str(tmp_path / "ran.onnx"))
    stored = {t.name for t in ran.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    gru = next(node for node in ran.graph.node if node.op_type == "GRU")
    assert {gru.input[1], gru.input[2]} <= stored
    assert not any(node.op_type == "Cast" and node.input[0].startswith(gru.input[1]) for node in ran.graph.node)


def test_openvino_runs_the_same_file(program, apply, cosine):
    target, _ = apply(program("gru_only"), WeightOnly())
    assert cosine(program("gru_only"), target, "openvino") > 0.9995


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_an_lstm_of_any_form_becomes_an_integer_lstm(exported, apply, cosine, options):
    source = exported(Reader(nn.LSTM, **options), series)
    target, _ = apply(source, Dynamic())
    assert ops(load(target))["LSTM"] == 0
    assert cosine(source, target) > 0.998


def test_an_lstm_that_is_batch_first_in_the_file_is_stored_in_int8_and_keeps_its_layout():
    """ONNX Runtime does not run this layout on a CPU, so nothing is run: what is written must say the same."""
    shapes = {"w": (1, 4 * 72, 16), "r": (1, 4 * 72, 72)}
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.random(shape, np.float32), name) for name, shape in shapes.items()]
    node = onnx.helper.make_node("LSTM", ["x", "w", "r"], ["output"], "lstm", hidden_size=72, layout=1)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], weights))
    before = find_layers(model)
    store_recurrent(model, before)
    (after,) = find_layers(model)
    assert (after.op, after.shape, after.is_quantized) == ("LSTM", (1, 288, 72), True)
    assert [a.i for a in model.graph.node[-1].attribute if a.name == "layout"] == [1]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_cell_in_a_loop_is_quantized_once_and_reported_once_a_weight(exported, apply, cosine, infer, kind):
    source = exported(Stepper(kind), series)
    target, outcome = apply(source, Dynamic())
    model = load(target)
    integers = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert sorted(numpy_helper.to_array(t).size for t in integers) == sorted(
        p.numel() for p in Stepper(kind).parameters() if p.dim() == 2
    )
    assert ops(model)["MatMulInteger"] == 11  # two products a step, and the head
    assert [change.path for change in outcome.changed] == ["cell", "cell", "head"]
    assert cosine(source, target) > 0.999
    packed, outcome = apply(source, WeightOnly(num_bits=8, group_size=16))
    assert [change.path for change in outcome.changed] == ["cell", "cell"]  # the head is too small
    assert cosine(source, packed) > 0.999
    assert infer(packed, source.sample(3, 0)).shape == (3, 5)
