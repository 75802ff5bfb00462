from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from torch import nn

from omgoptim.errors import RequestError
from omgoptim.models.onnx_graph import GraphTraits
from omgoptim.models.output_check import TOLERANCE
from omgoptim.models.samples import Samples
from omgoptim.operations.float_program import Program
from omgoptim.operations.quantization import splits
from omgoptim.operations.quantization.build_candidates import (
    PRECISIONS,
    precision_of,
    with_layers_that_never_ran,
    with_tied_weight_notes,
)
from omgoptim.operations.quantization.candidates import CandidatePlan, CandidateSpec, plan_candidates
from omgoptim.reports import Change, Skip
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Dynamic, WeightOnly
from omgoptim.techniques.registry import Outcome


def test_every_scheme_has_a_precision_that_an_artifact_may_have():
    schemes = [*(params() for params in PRECISIONS), WeightOnly(num_bits=4), WeightOnly(num_bits=8)]
    assert {precision_of(params) for params in schemes} <= set(TOLERANCE)
    assert precision_of(WeightOnly(num_bits=4)) == "int4"


@pytest.mark.parametrize(("embeddings", "tried"), [(3_100, True), (2_900, False)])
def test_auto_tries_embeddings_in_4_bits_where_tables_are_most_of_what_int8_leaves(tmp_path, embeddings, tried):
    traits = GraphTraits(
        has_gru=False,
        matmul_weight_bytes=10_000 - embeddings,
        conv_weight_bytes=0,
        recurrent_weight_bytes=0,
        embedding_weight_bytes=embeddings,
        total_weight_bytes=10_000,
    )
    path = tmp_path / "model.onnx"
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y"))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), path)
    bench = SimpleNamespace(target=None, cpu_features=[])
    loaded = SimpleNamespace(device="cpu", module=None, bench=bench, data=SimpleNamespace(real=True))
    request = QuantizeRequest(model="net.py:build", runtime="onnxruntime")
    names = [spec.name for spec in plan_candidates(request, loaded, Program(path, traits)).specs]
    assert ("dynamic, 4-bit embeddings on onnxruntime" in names) is tried
    assert any(name.startswith("static-onnxruntime, 4-bit embeddings") for name in names) is tried
    assert "dynamic on onnxruntime" in names


def test_embeddings_in_4_bits_are_refused_where_no_program_is_run():
    bench = SimpleNamespace(target=None, cpu_features=[])
    loaded = SimpleNamespace(device="cpu", module=nn.Linear(2, 2), bench=bench, data=SimpleNamespace(real=True))
    request = QuantizeRequest(model="net.py:build", runtime="torch_eager", scheme=Dynamic(embedding_bits=4))
    with pytest.raises(RequestError) as raised:
        plan_candidates(request, loaded, Program(None, None))
    assert "only ONNX programs store embeddings in 4 bits" in raised.value.why


@pytest.mark.parametrize("real", [True, False])
def test_weight_only_is_given_calibration_samples_where_there_are_real_ones(monkeypatch, real):
    rows = np.zeros((400, 3), np.float32)
    given = Samples([{"x": rows[i : i + 50]} for i in range(0, 400, 50)], [None] * 8)
    loaded = SimpleNamespace(samples=lambda split, count: given, data=SimpleNamespace(real=real), macs=None)
    monkeypatch.setattr(splits, "overlap_notes", lambda *_: [])
    params = WeightOnly()
    request = QuantizeRequest(model="net.py:build", scheme=params)
    found = splits.split_samples(request, loaded, CandidatePlan([CandidateSpec(params, "onnxruntime")], []))
    assert (found.calibration.count > 0) == real
    assert found.selection.count > 0


@pytest.mark.parametrize(
    ("head_too", "said"),
    [(True, "in int8 for each layer that reads it: 0.008 MB more"), (False, "in float and in int8: 0.008 MB more")],
)
def test_a_tied_weight_that_a_quantized_program_stores_twice_is_said(head_too, said):
    module = nn.ModuleDict({"words": nn.Embedding(500, 16), "head": nn.Linear(16, 500, bias=False)})
    module["head"].weight = module["words"].weight  # 8,000 entries
    gathered = Change(path="head", what="Gather 500x16", before="float32", after="int8")
    multiplied = Change(path="head", what="MatMul 16x500", before="float32", after="int8")
    skipped = [] if head_too else [Skip(path="head", reason="asked")]
    outcome = Outcome([gathered, multiplied] if head_too else [gathered], skipped)
    assert said in with_tied_weight_notes(outcome, module, "int8").notes[0]
    assert with_tied_weight_notes(outcome, module, "bfloat16") == outcome
    module["head"].weight = nn.Parameter(module["words"].weight.detach().clone())
    assert with_tied_weight_notes(outcome, module, "int8") == outcome


def test_a_layer_that_never_ran_is_listed_unless_it_is_named_already():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "a2": nn.Linear(2, 2), "spare": nn.Linear(2, 2), "bias": nn.ReLU()})
    loaded = SimpleNamespace(module=module, macs=SimpleNamespace(by_path={"(model)": 0, "a": 4}))
    change = Change(path="a", what="Gemm", before="float32", after="int8")
    changed = Outcome([change], [Skip(path="spare", reason="asked")])
    assert [skip.path for skip in with_layers_that_never_ran(changed, loaded).skipped] == ["spare", "a2"]
    assert with_layers_that_never_ran(Outcome([]), loaded).skipped == []
