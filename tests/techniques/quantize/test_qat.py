from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from omgoptim.models.onnx_file import load
from omgoptim.models.onnx_graph import find_layers
from omgoptim.requests.quantize import Qat
from omgoptim.runtimes import ENGINES, SessionSettings
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import InputTensor, Signature, structure_of
from omgoptim.techniques.quantize._onnx.program import lacks_int8_dot_product
from omgoptim.techniques.quantize._ptq.qat_state import (
    QatState,
    compute_scaling,
    read_qat_state,
    with_trained_ranges,
    write_qat_state,
)
from omgoptim.techniques.quantize.qat import static_of
from omgoptim.techniques.registry import ProgramRun, apply_to_program
from omgoptim.training.fake_quantization import FakeQuantized, IntegerFormats

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

LEVELS = 64 if lacks_int8_dot_product() else 127


class Spread(nn.Module):
    """Convolutions with batch normalization whose channels reach differently far; the function is a plain one's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 6, 1)
        with torch.no_grad():
            factors = torch.logspace(-1.5, 1.5, 8)
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.copy_(factors)
            self.depth.weight.div_(factors.reshape(-1, 1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.point(torch.relu(self.depth(torch.relu(self.norm(self.stem(x))))))


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, list[dict[str, Any]], Signature]:
    torch.manual_seed(0)
    module = Spread().eval()
    images = torch.randn(64, 1, 8, 8)
    signature = Signature((InputTensor("x", "float32", ("batch", 1, 8, 8), False),), structure_of(module(images[:2])))
    path = tmp_path_factory.mktemp("spread") / "float.onnx"
    export_onnx(module, {"x": images[:2]}, signature, path)
    return module, path, [{"x": images.numpy()}], signature


@pytest.mark.parametrize("equalize", [True, False])
def test_what_was_simulated_is_what_is_converted(spread: Any, tmp_path: Path, equalize: bool) -> None:
    module, source, batches, signature = spread
    params = Qat(equalize=equalize)
    scaling = compute_scaling(source, static_of(params), batches, tmp_path) if equalize else None
    factors = {path: torch.from_numpy(array) for path, array in scaling.factors.items()} if scaling else {}
    assert set(factors) == ({"depth", "point"} if equalize else set())
    simulated = FakeQuantized(module, IntegerFormats(weight_levels=LEVELS, factors=factors), 1)
    images = torch.from_numpy(batches[0]["x"])
    simulated.calibrate([((images,), {})])
    simulated.high.mul_(0.6)  # a range that no program would read by itself
    program = tmp_path / "trained.onnx"
    program.write_bytes(source.read_bytes())
    write_qat_state(program, QatState(simulated.ranges(), scaling.peaks if scaling else {}))
    target = tmp_path / "int8.onnx"
    outcome = apply_to_program(program, target, params, ProgramRun(batches, tmp_path))
    assert {change.path for change in outcome.changed} == {"stem", "depth", "point"}
    assert all(layer.is_quantized for layer in find_layers(load(target)))
    assert read_qat_state(load(target)) is None  # the artifact does not carry it on
    (converted,) = ENGINES["onnxruntime"].open(target, signature, SessionSettings(1)).run(batches[0])
    with torch.no_grad():
        expected, plain = simulated.eval()(images).numpy(), module(images).numpy()
    lost = np.abs(expected - plain).mean()
    assert np.abs(converted - expected).mean() < 0.25 * lost


def test_a_program_without_learnt_ranges_is_quantized_as_scheme_static_would(spread: Any, tmp_path: Path) -> None:
    _, source, batches, _ = spread
    params = Qat(equalize=False, symmetric=True)
    written = [tmp_path / "qat.onnx", tmp_path / "static.onnx"]
    for target, asked in zip(written, (params, static_of(params)), strict=True):
        apply_to_program(source, target, asked, ProgramRun(batches, tmp_path))
    assert written[0].read_bytes() == written[1].read_bytes()


def test_layers_that_read_one_tensor_share_the_widest_learnt_range(spread: Any) -> None:
    model = load(spread[1])
    found = find_layers(model)
    first = next(layer for layer in found if layer.op == "Conv")
    name = next(node.input[0] for node in model.graph.node if node.name == first.node)
    told = with_trained_ranges(
        {name: (0.0, 1.0), "other": (0.0, 2.0)}, model, [first], QatState({first.path: (-3.0, 4.0)})
    )
    assert told == {name: (-3.0, 4.0), "other": (0.0, 2.0)}
    twice = [first, replace(first, path="twin")]
    told = with_trained_ranges(
        {name: (0.0, 1.0)}, model, twice, QatState({first.path: (-3.0, 4.0), "twin": (-5.0, 1.0)})
    )
    assert told == {name: (-5.0, 4.0)}
