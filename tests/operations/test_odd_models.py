"""Unusual models, data and machines: each gives true numbers or a clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import omgoptim
from omgoptim.errors import DataError, ModelError, RequestError, SetupError
from omgoptim.models.manifest import Manifest
from omgoptim.requests import parse

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))


def load(split: str) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(len(split)))
    with torch.no_grad():
        return [(inputs, net()(inputs).argmax(1))]


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(nn.functional.dropout(x, 0.5))


def test_a_model_that_is_random_in_eval_mode_is_told_so(project: Path) -> None:
    with pytest.raises(ModelError, match="not deterministic"):
        omgoptim.profile(Random(), data=load, timing="quick")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_this_machine_lacks_is_refused_before_the_data_is_read(project: Path) -> None:
    def unread(split: str) -> list[Tensor]:
        pytest.fail(f"{split} was read")

    with pytest.raises(SetupError, match="device cuda cannot be used"):
        omgoptim.profile(net(), data=unread, timing="quick", device="cuda")


def test_a_program_of_a_fixed_batch_is_refused_with_the_way_out(project: Path) -> None:
    torch.onnx.export(net(), (torch.zeros(4, 8),), str(project / "fixed.onnx"), dynamo=True, verbose=False)
    with pytest.raises(ModelError, match="has no dynamic batch dimension") as caught:
        omgoptim.profile("fixed.onnx", timing="quick")
    assert "is 4;" in caught.value.why


def test_data_of_another_dtype_than_a_program_states_is_named(project: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = str(project / "net.onnx")
    torch.onnx.export(net(), (torch.zeros(2, 8),), program, dynamo=True, dynamic_shapes=shapes, verbose=False)
    np.savez(project / "doubles.npz", input=np.random.default_rng(0).normal(size=(40, 8)))
    with pytest.raises(DataError, match="does not match the program") as caught:
        omgoptim.profile("net.onnx", data="doubles.npz", timing="quick")
    assert "float64" in caught.value.why


@pytest.mark.slow
def test_a_half_precision_artifact_is_profiled_and_an_int8_one_is_not_quantized_again(project: Path) -> None:
    half = omgoptim.quantize(net(), data=load, scheme="bf16", runtime="torch_eager", timing="quick", max_quality_drop=1)
    profiled = omgoptim.profile(half.run_id, data=load, timing="quick")
    assert profiled.before is not None
    assert profiled.before.precision == "bfloat16"
    assert profiled.before.quality == pytest.approx(half.after.quality if half.after else None)
    int8 = omgoptim.quantize(
        net(), data=load, scheme="dynamic", runtime="onnxruntime", timing="quick", max_quality_drop=1
    )
    with pytest.raises(RequestError, match="quantized already"):
        omgoptim.quantize(int8.run_id, data=load, timing="quick")


@pytest.mark.slow
def test_the_report_tells_of_calibration_on_evaluation_data_and_its_calls_can_be_made(project: Path) -> None:
    torch.set_num_threads(1)
    state = torch.get_rng_state()
    report = omgoptim.quantize(
        net(), data=lambda split: load("eval"), scheme="static", runtime="onnxruntime", timing="quick", threads=2,
        max_quality_drop=1,
    )  # fmt: skip
    assert any("are evaluation samples too" in warning for warning in report.warnings)
    assert report.repeat.startswith("omgoptim.quantize(model, data=data, ")
    for step in report.next_steps:
        parse(step.tool, step.arguments)
        assert "(live" not in step.command
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_of_any_shape_reach_the_users_own_metric(project: Path) -> None:
    def boxes(split: str) -> list[tuple[Tensor, dict[str, Tensor]]]:
        return [(inputs, {"classes": target}) for inputs, target in load(split)]

    def hits(outputs: Tensor, targets: list[dict[str, Tensor]]) -> float:
        classes = torch.cat([target["classes"] for target in targets])
        return float((outputs.argmax(1) == classes).float().mean())

    report = omgoptim.quantize(
        net(), data=boxes, metric=hits, scheme="fp32", runtime="onnxruntime", timing="quick", max_quality_drop=0
    )
    assert report.before is not None
    assert (report.before.metric, report.before.quality) == ("hits", 1.0)


@pytest.mark.slow
def test_float32_is_delivered_where_the_scheme_fails_the_guard_and_that_is_said_first(project: Path) -> None:
    report = omgoptim.quantize(
        "net.py:net", checkpoint="net.pt", data="net.py:load", scheme="static", runtime="onnxruntime",
        metric="cosine", max_quality_drop=0, timing="quick", output="small",
    )  # fmt: skip
    assert report.summary.startswith("Nothing was quantized")
    assert Manifest.read(project / "small").precision == "float32"
    assert all(candidate.why for candidate in report.candidates)


def test_agreement_of_a_model_with_itself_is_no_quality(project: Path) -> None:
    report = omgoptim.profile(net(), data=load, metric="cosine", timing="quick")
    assert report.before is not None
    assert report.before.quality is None
