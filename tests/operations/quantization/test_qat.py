"""Quantization-aware training: notes, refusals and restored weights; and one whole run on digits."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import omgoptim
from omgoptim.errors import DataError, RequestError, TechniqueError
from omgoptim.measure.metrics import RequestedFunction
from omgoptim.models.onnx_file import load as load_program
from omgoptim.models.onnx_graph import find_layers
from omgoptim.operations.context import RunContext
from omgoptim.operations.float_program import Program, float_program
from omgoptim.operations.loaded_model import Live
from omgoptim.operations.prepare import prepare
from omgoptim.operations.quantization import qat
from omgoptim.operations.quantization.candidates import plan_candidates
from omgoptim.operations.quantization.qat import ConvertedEvaluator
from omgoptim.operations.quantization.splits import split_samples
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Qat
from omgoptim.techniques.quantize._ptq.qat_state import read_qat_state
from omgoptim.training.evaluator import COLLAPSED, Evaluator

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def blobs(count: int, seed: int, labelled: bool = True) -> list[Any]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    points = random.normal(size=(count, 4)) + np.eye(3, 4)[labels] * 3
    inputs, targets = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)
    pairs = zip(inputs.split(32), targets.split(32), strict=True)
    return [(x, y) if labelled else (x,) for x, y in pairs]


def module() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


SPLITS = {"train": (256, 1), "calibration": (256, 2), "eval": (64, 3)}


class QatRun:
    """Training alone, without measuring processes."""

    def __init__(self, folder: Path, labelled: bool = True, data: Any = None, **arguments: Any) -> None:
        def load(split: str) -> Any:
            return blobs(*SPLITS[split], labelled)

        raw = {"model": "(live module)", "data": "(live data)", "scheme": "qat", "threads": 1, "equalize": False}
        request = parse("quantize", raw | arguments)
        assert isinstance(request, QuantizeRequest)
        assert isinstance(request.scheme, Qat)
        self.told: list[str] = []
        self.request, self.params = request, request.scheme
        self.context = RunContext(
            folder, "run", folder, sys.executable, "test", lambda stage, _: self.told.append(stage)
        )
        self.live = Live(module=module(), data=data or load)
        self.loaded = prepare(request, self.context, self.live)

    def run(self) -> qat.TrainedModel:
        program = float_program(self.loaded, self.context)
        splits = split_samples(self.request, self.loaded, plan_candidates(self.request, self.loaded, program))
        return qat.train_in_int8(self.request, self.context, self.loaded, program, splits, self.live)


def test_training_that_hurts_is_undone_and_the_weights_from_before_compete(tmp_path: Path) -> None:
    trial = QatRun(tmp_path, epochs=1, learning_rate=50.0, clip_norm=0, metric="cosine", ignore=["2"])
    trained = trial.run()
    assert trained.training is not None
    assert [epoch.best for epoch in trained.training.epochs] == [False]
    assert "No improvement by training" in trained.fact
    assert trained.loaded.module is not None
    assert all(
        torch.equal(kept, weight)
        for kept, weight in zip(trained.loaded.module.parameters(), module().parameters(), strict=True)
    )
    assert trained.program.path is not None
    assert read_qat_state(load_program(trained.program.path)) is None


def test_an_epoch_is_judged_by_the_program_it_becomes_and_carries_its_ranges(tmp_path: Path) -> None:
    seen: list[str] = []

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        seen.append(f"{float(outputs.sum()):.9g}")
        return len(seen) / 100  # the later the better

    trial = QatRun(tmp_path, epochs=1, labelled=False, equalize=True)
    trial.loaded = _with_metric(trial, metric)
    trained = trial.run()
    assert len(set(seen)) == 3  # the original, its conversion, and that of the epoch
    assert trained.training is not None
    assert trained.training.epochs[0].best
    assert "teacher" in trained.training.loss  # there are no labels: it learns from the float model
    assert trained.program.path is not None
    learned = read_qat_state(load_program(trained.program.path))
    assert learned is not None
    assert set(learned.ranges) == {"0", "2"}
    assert learned.ranges["2"][0] == 0.0  # after a ReLU
    assert learned.peaks  # of the channels between the two layers
    assert [entry for entry in trial.told if entry.startswith("training: epoch 1 of 1")]


def _with_metric(trial: QatRun, metric: Callable[..., float]) -> Any:
    return replace(trial.loaded, metric=metric)


def test_a_module_without_numbers_scores_below_any_other(tmp_path: Path) -> None:
    trial = QatRun(tmp_path)
    loaded, samples = trial.loaded, trial.loaded.samples("calibration", 64)
    original = module()
    evaluator = Evaluator.of(original, samples, loaded.signature, RequestedFunction("auto", loaded.policy, 60.0))
    converted = ConvertedEvaluator(
        samples=samples,
        signature=loaded.signature,
        metric=evaluator.metric,
        outputs=evaluator.outputs,
        original=evaluator.original,
        limit_s=60.0,
        params=Qat(),
        untrained=tmp_path / "float.onnx",
        peaks={},
        calibration=samples.batches,
        example=loaded.example,
        scratch=tmp_path,
    )
    with torch.no_grad():
        original[0].weight[0, 0] = torch.nan
    assert converted.score(original) == COLLAPSED


def test_a_run_that_was_cut_off_while_training_goes_on_after_its_last_whole_epoch(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def cut(stage: str, _done: float | None) -> None:
        if "epoch 2" in stage:
            raise Cut

    broken = QatRun(tmp_path, epochs=2, metric="cosine")
    broken.context = replace(broken.context, progress=cut)
    with pytest.raises(Cut):
        broken.run()
    shutil.rmtree(broken.context.work)  # what a run leaves is its checkpoints
    resumed = QatRun(tmp_path, epochs=2, metric="cosine").run()
    assert resumed.training is not None
    assert resumed.training.resumed == 1
    assert [epoch.epoch for epoch in resumed.training.epochs] == [1, 2]
    assert all(epoch.quality is not None for epoch in resumed.training.epochs)


@pytest.mark.parametrize(
    ("data", "arguments", "match"),
    [
        ({"train": []}, {}, "needs training data"),
        ({}, {"labelled": False, "distill": False}, "no training objective"),
        ({"train": [(torch.zeros(8, 4), ["a"] * 8)] * 2}, {}, "no default loss fits"),
        ({"train": [(torch.zeros(8, 4), torch.full((8,), 7))] * 2}, {}, "7"),
    ],
)
def test_data_that_nothing_can_be_learnt_from_is_refused(
    tmp_path: Path, data: dict[str, Any], arguments: dict[str, Any], match: str
) -> None:
    labelled = arguments.get("labelled", True)

    def load(split: str) -> Any:
        return data.get(split, blobs(*SPLITS[split], labelled))

    trial = QatRun(tmp_path, data=load, **{"metric": "cosine", **arguments})
    with pytest.raises(DataError, match=match):
        trial.run()


def test_calibration_data_that_is_no_number_is_refused_before_any_step(tmp_path: Path) -> None:
    def load(split: str) -> Any:
        found = blobs(*SPLITS[split])
        if split == "calibration":
            found[0][0][0, 0] = torch.nan
        return found

    trial = QatRun(tmp_path, data=load, metric="cosine")
    with pytest.raises(DataError, match="NaN"):
        trial.run()
    assert not any(stage.startswith("training") for stage in trial.told)


def test_what_qat_cannot_take_is_refused(tmp_path: Path) -> None:
    trial = QatRun(tmp_path, ignore=["*"])
    with pytest.raises(TechniqueError, match="targets and ignore"):
        trial.run()
    program = float_program(trial.loaded, trial.context)
    trial.loaded = replace(trial.loaded, module=None, program=program.path)
    with pytest.raises(RequestError, match="given as a program"):
        trial.run()
    with pytest.raises(RequestError, match="epochs"):
        parse("quantize", {"model": "a.py:b", "scheme": "qat", "epochs": 0})
    with pytest.raises(RequestError, match="belongs to scheme qat"):
        parse("quantize", {"model": "a.py:b", "scheme": "static", "epochs": 2})
    assert isinstance(program, Program)


def test_a_whole_run_reports_the_training_and_a_converted_artifact(project: Path) -> None:
    scope: dict[str, Any] = {}
    exec((project / "net.py").read_text(), scope)
    net = scope["net"]()
    net.load_state_dict(torch.load(project / "net.pt", weights_only=True))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = omgoptim.quantize(
        net,
        data=scope["load"],
        loss=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets),
        scheme="qat",
        epochs=1,
        runtime="onnxruntime",
        timing="quick",
        max_quality_drop=0.05,
    )
    assert report.training is not None
    assert [epoch.epoch for epoch in report.training.epochs] == [1]
    assert report.training.trained_params == sum(parameter.numel() for parameter in net.parameters())
    assert "over post-training static quantization" in report.summary
    (chosen,) = [candidate for candidate in report.candidates if candidate.status == "chosen"]
    assert chosen.scheme == "qat"
    assert chosen.quality is not None
    assert chosen.quality >= max(epoch.quality or 0 for epoch in report.training.epochs)  # what was eval_mode was made
    assert {change.path for change in report.changed} == {"0", "3", "8"}
    assert report.artifact is not None
    program = load_program(Path(report.artifact.path) / "model.onnx")
    assert all(layer.is_quantized for layer in find_layers(program))
    assert report.outcome == "ok"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert "scheme='qat'" in report.repeat
