"""Models whose code makes the batch a number: all is done at batch 1 and said, or the model is refused by its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import omgoptim
from omgoptim.errors import ModelError
from omgoptim.models.onnx_file import declared_signature
from omgoptim.operations.loaded_model import declared_batch
from omgoptim.requests import parse
from omgoptim.runtimes.export import export_onnx
from omgoptim.runtimes.signature import BATCH, InputTensor, Signature

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

NET = """
import torch
from torch import nn

class Token(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))
        self.first, self.head = nn.Linear(20, 32), nn.Linear(36, 3)

    def forward(self, x):
        return self.head(torch.cat([self.token.expand(int(x.shape[0]), -1), self.first(x).relu()], 1))

def build():
    torch.manual_seed(0)
    return Token().eval()

def load(split):
    generator = torch.Generator().manual_seed(len(split))
    return [(rows, None) for rows in torch.randn(64, 20, generator=generator).split(16)]
"""
LINE = "self.token.expand(int(x.shape[0]), -1)"
COMMON: dict[str, Any] = {"timing": "quick", "samples": 32, "threads": 1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fixed_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMGOPTIM_PROJECT", str(tmp_path))
    return tmp_path


def exported(batch: int) -> nn.Module:
    return torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(batch, 3),)).module()


def test_every_engine_is_tried_at_the_batch_that_can_be_exported(home: Path) -> None:
    report = omgoptim.quantize("fixed_net.py:build", data="fixed_net.py:load", runtime="onnxruntime", **COMMON)
    assert report.before is not None
    assert report.after is not None
    assert report.artifact is not None
    assert (report.after.runtime, report.after.batch) == ("onnxruntime", 1)
    assert report.before.throughput_per_s is None
    assert report.after.throughput_per_s is None
    assert any(LINE in warning and "without throughput" in warning for warning in report.warnings)
    opened = omgoptim.open_artifact(report.artifact.path, threads=1)
    assert opened(np.ones((1, 20), np.float32)).shape == (1, 3)
    with pytest.raises(ModelError, match="has the fixed batch size 1 and was called with 5 samples") as error:
        opened(np.ones((5, 20), np.float32))
    assert "x.shape[0]" in error.value.fix


@pytest.mark.slow
def test_profile_and_compare_of_a_fixed_batch_have_no_throughput(home: Path) -> None:
    profiled = omgoptim.profile("fixed_net.py:build", data="fixed_net.py:load", runtime="onnxruntime", **COMMON)
    assert profiled.before is not None
    assert profiled.before.throughput_per_s is None
    assert any(LINE in warning for warning in profiled.warnings)
    made = omgoptim.quantize("fixed_net.py:build", data="fixed_net.py:load", runtime="onnxruntime", **COMMON)
    compared = omgoptim.compare(made.run_id, made.run_id, **COMMON)
    assert compared.after is not None
    assert (compared.after.throughput_per_s, compared.after.batch) == (None, 1)
    assert any("the batch of A and B is fixed at 1" in warning for warning in compared.warnings)


@pytest.mark.slow
def test_a_live_module_with_a_fixed_batch_is_profiled_and_pruned_at_batch_1(home: Path) -> None:
    scope: dict[str, Any] = {"__name__": "fixed_net"}
    exec(NET, scope)
    data = {split: scope["load"](split) for split in ("train", "calibration", "eval")}
    report = omgoptim.profile(scope["build"](), data=data, **COMMON)
    assert report.before is not None
    assert (report.before.throughput_per_s, report.before.batch) == (None, 1)
    pruned = omgoptim.prune(scope["build"](), data=data, method="magnitude", sparsity=0.3, epochs=1, **COMMON)
    assert pruned.artifact is not None
    assert omgoptim.open_artifact(pruned.artifact.path, threads=1)(torch.ones(1, 20)).shape == (1, 3)


@pytest.mark.slow
def test_a_model_that_trains_runs_on_an_onnx_engine_at_batch_1_and_its_result_trains_on(home: Path) -> None:
    given: dict[str, Any] = {**COMMON, "data": "fixed_net.py:load", "epochs": 1, "max_quality_drop": 1.0}
    pruned = omgoptim.prune("fixed_net.py:build", runtime="onnxruntime", method="magnitude", sparsity=0.3, **given)
    assert pruned.training is not None
    for report in (pruned, omgoptim.distill(pruned.run_id, student="narrow", **given)):
        assert report.before is not None
        assert report.after is not None
        assert (report.after.runtime, report.after.batch) == ("onnxruntime", 1)
        assert (report.before.throughput_per_s, report.after.throughput_per_s) == (None, None)
    assert any(LINE in warning for warning in pruned.warnings)


@pytest.mark.slow
def test_a_pt2_of_batch_1_is_measured_at_it(home: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2).eval(), (torch.ones(1, 3),)), home / "one.pt2")
    report = omgoptim.profile("one.pt2", inputs=["1x3"], **COMMON)
    assert report.before is not None
    assert report.before.throughput_per_s is None
    assert any("'one.pt2' was exported for a batch of 1" in warning for warning in report.warnings)


def test_another_fixed_batch_than_1_is_refused_with_the_export_that_mends_it() -> None:
    profiled, pruned = (parse(verb, {"model": "net.pt2"}) for verb in ("profile", "prune"))
    free = torch.export.export(
        nn.Linear(3, 2), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    assert declared_batch(free, None, profiled) is None  # type: ignore[arg-type]
    assert declared_batch(nn.Linear(3, 2), None, profiled) is None  # type: ignore[arg-type]
    assert declared_batch(exported(1), None, profiled) == 1  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"'net.pt2' accepts only batches of 8 samples") as error:
        declared_batch(exported(8), None, profiled)  # type: ignore[arg-type]
    assert "dynamic_shapes" in error.value.fix
    with pytest.raises(ModelError, match="cannot be trained"):
        declared_batch(exported(1), None, pruned)  # type: ignore[arg-type]
    one_at_a_time = Signature((InputTensor("input", "float32", (1, 3), False),), "tensor")
    assert declared_batch(nn.Linear(3, 2), one_at_a_time, pruned) == 1  # only its program has that batch


@pytest.mark.parametrize(("size", "taken"), [(BATCH, None), (1, 1)])
def test_a_users_onnx_file_may_take_one_sample_at_a_time(tmp_path: Path, size: int | str, taken: int | None) -> None:
    signature = Signature((InputTensor("input", "float32", (size, 3), False),), "tensor")
    example: Tensor = torch.ones(2 if size == BATCH else 1, 3)
    export_onnx(nn.Linear(3, 2).eval(), {"input": example}, signature, tmp_path / "user.onnx")
    assert declared_signature(tmp_path / "user.onnx").batch == taken
    model = onnx.load(tmp_path / "user.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "four.onnx")
    with pytest.raises(ModelError, match="has no dynamic batch dimension"):
        declared_signature(tmp_path / "four.onnx")
