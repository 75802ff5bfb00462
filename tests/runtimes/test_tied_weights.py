"""An embedding tied to a linear head, by hand: V x D weights are in the file once, whatever the exporter folded."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx, tied_weights
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

IDS = Signature((InputTensor("ids", "int64", (BATCH, 5), False),), "tensor")


class Tied(nn.Module):
    """V = 60 words, D = 16: below the size above which the exporter leaves a transposed weight alone."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mid, self.head = nn.Embedding(60, 16), nn.Linear(16, 16), nn.Linear(16, 60, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(self.words.weight)
        if tie:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.mid(self.words(ids))))
        return logits


def exported(module: nn.Module, path: Path) -> onnx.ModelProto:
    export_onnx(module.eval(), {"ids": torch.arange(10).view(2, 5)}, IDS, path)
    return onnx.load(path)


def entries(model: onnx.ModelProto) -> int:
    return sum(int(torch.tensor(list(each.dims)).prod()) for each in model.graph.initializer if each.data_type == 1)


def test_a_weight_tied_between_an_embedding_and_a_head_is_stored_once(tmp_path: Path) -> None:
    module = Tied()
    assert tied_weights(module) == [["words.weight", "head.weight"]]
    model = exported(module, tmp_path / "tied.onnx")
    assert entries(model) == 60 * 16 + 16 * 16 + 16
    ids = torch.arange(15).view(3, 5)
    session = ENGINES["onnxruntime"].open(tmp_path / "tied.onnx", IDS, SessionSettings(1))
    with torch.no_grad():
        assert_allclose(session.run({"ids": ids.numpy()})[0], module(ids), rtol=1e-4, atol=1e-5)


def test_weights_that_are_equal_but_not_tied_are_left_as_two(tmp_path: Path) -> None:
    model = exported(Tied(tie=False), tmp_path / "two.onnx")
    assert entries(model) == 2 * 60 * 16 + 16 * 16 + 16


def test_the_engine_multiplies_by_a_constant_and_transposes_nothing(tmp_path: Path) -> None:
    exported(Tied(), tmp_path / "tied.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "tied.onnx"), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "opened.onnx").graph
    assert [node.op_type for node in graph.node if node.op_type == "Transpose"] == []
    constants = {each.name for each in graph.initializer}
    assert all(node.input[1] in constants for node in graph.node if node.op_type in ("MatMul", "Gemm"))


@pytest.mark.parametrize("tie", [True, False])
def test_the_head_is_still_named_by_its_module(tie: bool, tmp_path: Path) -> None:
    from omgoptim.models.onnx_graph import find_layers

    found = find_layers(exported(Tied(tie), tmp_path / "tied.onnx"))
    assert [one.op for one in found if one.path in ("head", "words")].count("MatMul") == 1
