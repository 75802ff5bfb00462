"""profile of programs: real engines, fresh measuring processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import omgoptim
from omgoptim.errors import OmgoptimError
from omgoptim.models.manifest import PROGRAM
from omgoptim.reports import EfficiencyReport
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

MACS = 8 * 8 * 16 * 9 + 4 * 4 * 32 * 16 * 9 + 128 * 10
"""Layers of `net.py`: two convolutions and the head."""


def check(report: EfficiencyReport) -> None:
    """The number is there, nothing is said about its lack, and the layers with the work have their paths."""
    assert report.before is not None
    assert report.before.macs == MACS
    assert report.before.flops == 2 * MACS
    assert not [text for text in report.warnings if "multiply-accumulates" in text]
    macs = {layer.path: layer.macs for layer in report.layers if layer.macs}
    assert macs == {"0": 8 * 8 * 16 * 9, "3": 4 * 4 * 32 * 16 * 9, "8": 128 * 10}
    assert all(layer.size_bytes for layer in report.layers if layer.path in macs)
    assert all(layer.time_ms is not None for layer in report.layers)


def test_a_users_onnx_file_has_macs_and_layers(project: Path) -> None:
    scope: dict[str, object] = {}
    exec((project / "net.py").read_text(), scope)
    net = scope["net"]().eval()  # type: ignore[operator]
    signature = Signature((InputTensor("input", "float32", (BATCH, 1, 8, 8), False),), "tensor")
    export_onnx(net, {"input": torch.randn(2, 1, 8, 8)}, signature, project / "user.onnx")
    check(omgoptim.profile("user.onnx", data="net.py:load", timing="quick", samples=50))


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_quantized_artifact_has_macs_and_layers_on_its_engine(project: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    common = {"data": "net.py:load", "timing": "quick", "samples": 50}
    made = omgoptim.quantize("net.py:net", checkpoint="net.pt", scheme="static", runtime=runtime, **common)
    assert made.artifact is not None
    assert (Path(made.artifact.path) / PROGRAM).is_file()
    check(omgoptim.profile(made.run_id, **common))


def scores(outputs: object, targets: object) -> float:
    raise ValueError("the metric met a sample it does not know")


def test_a_metric_that_raises_in_the_evaluation_shows_its_own_error(project: Path) -> None:
    with pytest.raises(OmgoptimError) as error:
        omgoptim.profile("net.py:net", data="net.py:load", metric=scores, timing="quick", samples=50)
    assert "the metric met a sample it does not know" in str(error.value)
    assert "omgoptim itself" not in str(error.value)


def test_data_that_raises_in_the_middle_shows_its_own_error(project: Path) -> None:
    def load(split: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.int64)
        raise OSError("the disk with the images is gone")

    with pytest.raises(OmgoptimError) as error:
        omgoptim.profile("net.py:net", data=load, timing="quick", samples=50)
    assert "the disk with the images is gone" in str(error.value)
    assert "omgoptim itself" not in str(error.value)


def test_a_live_module_in_training_mode_is_measured_in_eval_mode_and_that_is_said(project: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 3)).train()
    report = omgoptim.profile(module, inputs=["1x1x8x8"], timing="quick", samples=8)
    assert any("was in training mode and has Dropout" in warning for warning in report.warnings)
    assert module.training
    again = omgoptim.profile(module.eval(), inputs=["1x1x8x8"], timing="quick", samples=8)
    assert not any("training mode" in warning for warning in again.warnings)
