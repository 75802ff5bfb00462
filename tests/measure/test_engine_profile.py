"""Mapping of an engine's own nodes to the layers of the file."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.bootstrap import IMPORT_OMGOPTIM, PACKAGE_FILE
from omgoptim.measure.engine_profile import GraphNode, costliest_nodes, graph_nodes, query_layers
from omgoptim.measure.measuring_process import MeasuringProcess, TimingSetup
from omgoptim.models.artifact import save_program
from omgoptim.models.manifest import Manifest
from omgoptim.models.output_check import OutputCheck
from omgoptim.requests.quantize import Dynamic
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.engine import NodeTime
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature
from omgoptim.techniques.registry import ProgramRun, technique_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIGNATURE = Signature((InputTensor("x", "float32", (BATCH, 8), False),), "tensor")
SAMPLE = {"x": np.ones((1, 8), np.float32)}


class Uneven(nn.Module):
    """One layer has a thousand times the work of the others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 1024)
        self.body = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU())
        self.head = nn.Linear(1024, 4)

    def forward(self, x):
        return self.head(self.body(self.first(x)))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    path = tmp_path_factory.mktemp("uneven") / "model.onnx"
    torch.manual_seed(0)
    export_onnx(Uneven().eval(), {"x": torch.randn(2, 8)}, SIGNATURE, path)
    return path


@pytest.fixture
def artifact(uneven, tmp_path):
    """`artifact(runtime)`: the program saved for an engine."""

    def make(runtime):
        pytest.importorskip(runtime)
        check = OutputCheck(SAMPLE, ENGINES[runtime].open(uneven, SIGNATURE, SessionSettings(1)).run(SAMPLE))
        save_program(tmp_path / runtime, uneven, Manifest(runtime, "float32", SIGNATURE), check)
        return tmp_path / runtime

    return make


@pytest.fixture
def batch(tmp_path):
    np.savez(tmp_path / "one.npz", **SAMPLE)
    return tmp_path / "one.npz"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_each_timed_layer_has_its_module_path_macs_and_bytes_the_slowest_first(artifact, batch, tmp_path, runtime):
    with MeasuringProcess(artifact(runtime), TimingSetup({"one": batch}, 1, 1, tmp_path)) as process:
        process.begin_open()
        process.end_open()
        layers = query_layers(process, "one", SAMPLE, {}, top=10)
    body = next(layer for layer in layers if layer.path == "body.0")
    assert body.macs == 1024 * 1024
    assert body.size_bytes == 4 * (1024 * 1024 + 1024)
    assert {"first", "head"} < {layer.path for layer in layers}
    shares = [layer.time_share for layer in layers]
    assert shares == sorted(shares, reverse=True)
    assert sum(layer.time_share for layer in layers) == pytest.approx(1)


LAYERS_TIMED = """
import omgoptim.measure.measuring_server as measuring_server
server = measuring_server.MeasuringServer()
measuring_server.LAYER_TIMING_S = 0.01
import os
policy = {"project": os.path.dirname(sys.argv[2]), "allowed": [], "modules": [], "trusted": True}
server.open(sys.argv[2], 1, None, policy, {"one": sys.argv[3]})
print(len(server.nodes("one")["nodes"]))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(("runtime", "other"), [("onnxruntime", "openvino"), ("openvino", "onnxruntime")])
def test_timing_a_programs_layers_loads_neither_torch_nor_another_engine(artifact, batch, tmp_path, runtime, other):
    command = [sys.executable, "-c", IMPORT_OMGOPTIM + LAYERS_TIMED, str(PACKAGE_FILE), str(artifact(runtime)), batch]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    count, modules = done.stdout.splitlines()
    assert int(count) >= 3
    assert not {"torch", "onnx", other} & set(modules.split())
    assert not list(tmp_path.glob("*profile*"))


def test_a_dynamically_quantized_program_still_knows_its_module_paths(uneven, tmp_path):
    (tmp_path / "scratch").mkdir()
    target = tmp_path / "int8.onnx"
    technique_of(Dynamic()).apply(uneven, target, Dynamic(), ProgramRun([SAMPLE], tmp_path / "scratch"))
    macs = {}
    for part in graph_nodes(target, SAMPLE):
        macs[part.path] = macs.get(part.path, 0) + part.macs
    assert {path: count for path, count in macs.items() if count} == {
        "first": 8 * 1024,
        "body.0": 1024 * 1024,
        "head": 1024 * 4,
    }


def part(node, op, path, inputs, outputs, macs=0, **weights):
    return GraphNode(node, op, path, tuple(inputs), tuple(outputs), macs, weights)


CONV_ADD_RELU = [
    part("n1", "Conv", "conv", ["x", "w"], ["a"], 100, w=40),
    part("n2", "Conv", "shortcut", ["x", "v"], ["b"], 10, v=4),
    part("n3", "Add", "block", ["a", "b"], ["c"]),
    part("n4", "Relu", "act", ["c"], ["d"]),
]


def test_a_fused_node_named_after_its_last_operation_is_the_product_it_began_with():
    """As ONNX Runtime names them: the shortcut stands for itself, so the sum and its activation are the other's."""
    times = [NodeTime("d_nchwc", "Conv", 3.0), NodeTime("n2_nchwc", "Conv", 1.0)]
    first, second = costliest_nodes(times, CONV_ADD_RELU)
    assert (first.path, first.kind, first.time_ms, first.time_share) == ("conv", "Conv", 3.0, 0.75)
    assert (first.macs, first.size_bytes) == (100, 40)
    assert (second.path, second.macs, second.size_bytes) == ("shortcut", 10, 4)


def test_a_fused_node_represents_the_costliest_of_its_parts():
    times = [NodeTime("n4", "Convolution", 2.0, covers=("n4", "n3", "n1/WithoutBiases"))]
    assert [layer.path for layer in costliest_nodes(times, CONV_ADD_RELU)] == ["conv"]


def test_an_activation_that_runs_by_itself_is_not_the_product_before_it():
    times = [NodeTime("n1_token_7", "QLinearConv", 2.0), NodeTime("n4", "Relu", 1.0)]
    assert [(layer.path, layer.macs) for layer in costliest_nodes(times, CONV_ADD_RELU)] == [("conv", 100), ("act", 0)]


def test_nodes_of_one_path_are_one_layer_whose_kind_is_where_its_time_goes():
    parts = [
        part("q", "MatMul", "attention", ["x", "w"], ["a"], 8, w=16),
        part("s", "Softmax", "attention", ["a"], ["b"]),
        part("o", "MatMul", "attention", ["b", "w"], ["c"], 8, w=16),
    ]
    times = [NodeTime("q", "MatMul", 1.0), NodeTime("s", "Softmax", 3.0), NodeTime("o", "MatMul", 1.0)]
    (layer,) = costliest_nodes(times, parts)
    assert (layer.path, layer.kind, layer.time_ms) == ("attention", "Softmax + MatMul", 5.0)
    assert (layer.macs, layer.size_bytes) == (16, 16)  # the weight is stored once


def test_a_node_of_the_engines_own_is_its_own_layer_without_macs():
    (layer,) = costliest_nodes([NodeTime("ReorderOutput", "ReorderOutput", 1.0)], CONV_ADD_RELU)
    assert (layer.path, layer.macs, layer.size_bytes) == ("ReorderOutput", None, None)


def test_an_engines_recurrent_node_without_a_name_is_the_only_recurrent_layer_but_no_guess_among_two():
    one = [part("a", "LSTM", "rnn", ["x"], ["h"], 9), part("b", "LSTM", "rnn", ["h"], ["y"], 9)]
    times = [NodeTime("LSTMSequence_12", "LSTMSequence", 1.0)]
    assert costliest_nodes(times, one)[0].path == "rnn"
    two = [one[0], part("b", "LSTM", "other", ["h"], ["y"], 9)]
    assert costliest_nodes(times, two)[0].path == "LSTMSequence_12"


def test_macs_that_could_not_be_counted_stay_unknown():
    (layer,) = costliest_nodes([NodeTime("n", "Conv", 1.0)], [part("n", "Conv", "p", ["x"], ["y"], None)])
    assert layer.macs is None


def test_no_more_layers_than_asked_for_are_given_the_slowest_first():
    times = [NodeTime(f"n{index}", "X", float(index)) for index in (2, 4, 1, 3)]
    assert [layer.time_ms for layer in costliest_nodes(times, [], top=2)] == [4.0, 3.0]
