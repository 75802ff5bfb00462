"""optimize: the plan, refusals before any step, and one whole run with its chain, alternatives and ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import omgoptim
from omgoptim.errors import DataError, RequestError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = {"checkpoint": "net.pt", "data": "net.py:load", "timing": "quick", "samples": 100, "threads": 1}


def test_a_plan_names_the_steps_and_takes_none(project: Path) -> None:
    report = omgoptim.optimize("net.py:net", plan=True, target_size_mb=1.0, **COMMON)
    assert {step.status for step in report.steps} == {"planned"}
    assert [step.name for step in report.steps][:3] == ["quantize", "untrained levels", "prune 50%"]
    assert all(step.expected_seconds for step in report.steps)
    assert "An empty graph takes" in report.summary
    assert "of 30 minutes" in report.summary
    (call,) = report.next_steps
    assert call.arguments == {"model": "net.py:net", "target_size_mb": 1.0, **COMMON}
    assert len(list((project / ".omgoptim" / "runs").iterdir())) == 1


def test_a_target_below_the_floor_is_refused_with_the_nearest_one(project: Path) -> None:
    with pytest.raises(RequestError, match="no model reaches 1e-06 ms") as refused:
        omgoptim.optimize("net.py:net", target_latency_ms=1e-6, **COMMON)
    assert "at least" in refused.value.fix


def test_a_budget_too_short_is_refused_with_what_is_needed(project: Path) -> None:
    with pytest.raises(RequestError, match=r"a budget of 0\.001 minutes is too short") as refused:
        omgoptim.optimize("net.py:net", budget_minutes=0.001, **COMMON)
    assert "budget_minutes" in refused.value.fix
    assert len(list((project / ".omgoptim" / "runs").iterdir())) == 1


def test_data_that_cannot_be_divided_is_refused_before_any_step(project: Path) -> None:
    text = (project / "net.py").read_text().replace("slice(900, 1250)", "slice(900, 920)")
    (project / "net.py").write_text(text)
    with pytest.raises(DataError, match="too few to choose with"):
        omgoptim.optimize("net.py:net", **COMMON)


@pytest.mark.slow
def test_a_quantized_artifact_is_refused(project: Path) -> None:
    made = omgoptim.quantize("net.py:net", scheme="static", runtime="onnxruntime", **COMMON)
    with pytest.raises(RequestError, match="is quantized already"):
        omgoptim.optimize(made.run_id, data="net.py:load", timing="quick")


@pytest.mark.slow
def test_a_whole_run_reaches_a_smaller_model_and_keeps_the_others(
    project: Path, digits: tuple[torch.Tensor, ...]
) -> None:
    goal = {"max_quality_drop": 0.05, "budget_minutes": 5, "prefer": "size"}  # decided by nothing that is timed
    report = omgoptim.optimize("net.py:net", runtime="onnxruntime", **goal, **COMMON)
    assert report.outcome == "ok"
    assert report.gains is not None
    assert report.gains.size_ratio is not None
    assert report.gains.size_ratio > 2
    verbs = {step.verb for step in report.steps}
    assert {"quantize", "prune"} <= verbs
    assert any(step.status == "kept" for step in report.steps)
    runs = project / ".omgoptim" / "runs"
    for step in report.steps:
        assert step.run_id is None or (runs / step.run_id / "report.json").is_file()
    ledger = [json.loads(line) for line in (runs / report.run_id / "ledger.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in ledger}) == len(ledger)
    images, target = digits
    opened = omgoptim.open_artifact(report.run_id)
    right = (opened(images[:100]).argmax(1) == target[:100]).float().mean().item()
    assert report.after is not None
    assert right == pytest.approx(report.after.quality, abs=1e-6)
    other = report.alternatives[0]
    picked = omgoptim.pick(report.run_id, other.name)
    assert picked.delivered == other.name


SHY = """
from pathlib import Path
import net

def load(split):
    if split == "eval" and len(list(Path(".omgoptim/runs").iterdir())) > 1:
        raise RuntimeError("a step read the evaluation data")
    return net.load(split)
"""


@pytest.mark.slow
def test_no_step_reads_the_evaluation_data(project: Path) -> None:
    (project / "shy.py").write_text(SHY)
    asked = {**COMMON, "data": "shy.py:load"}
    report = omgoptim.optimize("net.py:net", max_quality_drop=0.05, budget_minutes=5, runtime="onnxruntime", **asked)
    taken = [step for step in report.steps if step.run_id]
    assert {"quantize", "prune"} <= {step.verb for step in taken}
    assert not [step for step in report.steps if step.status == "failed"]


@pytest.mark.slow
def test_without_training_samples_only_quantization_is_tried_and_the_report_says_why(project: Path) -> None:
    text = (project / "net.py").read_text().replace('"train": slice(0, 900), ', "")
    (project / "net.py").write_text(text)
    report = omgoptim.optimize("net.py:net", budget_minutes=5, runtime="onnxruntime", **COMMON)
    assert [step.verb for step in report.steps if step.run_id] == ["quantize"]
    (left_out,) = [step for step in report.steps if step.status == "skipped"]
    assert "the train split cannot be read" in left_out.why


@pytest.mark.slow
def test_a_module_with_no_data_is_quantized_and_left_as_it_was(project: Path, digits: tuple[torch.Tensor, ...]) -> None:
    scope: dict[str, Any] = {}
    exec((project / "net.py").read_text(), scope)
    net = scope["net"]()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = omgoptim.optimize(
        net, inputs=["1x1x8x8"], max_quality_drop=0.0, budget_minutes=5, timing="quick", threads=1
    )
    assert report.artifact is not None
    assert report.after is not None
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert [step.status for step in report.steps if step.verb == "prune"] == ["skipped"]


@pytest.mark.slow
def test_a_module_is_pruned_with_its_loaders_and_left_as_it_was(project: Path) -> None:
    scope: dict[str, Any] = {}
    exec((project / "net.py").read_text(), scope)
    net = scope["net"]()
    net.load_state_dict(torch.load(project / "net.pt", weights_only=True))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    report = omgoptim.optimize(
        net, data=scope["load"], max_quality_drop=0.05, budget_minutes=5, timing="quick", threads=1,
        samples=100, runtime="onnxruntime",
    )  # fmt: skip
    assert [step.status for step in report.steps if step.verb == "prune"]
    assert not [step for step in report.steps if step.status == "failed"]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.slow
def test_a_program_is_quantized_and_the_report_says_that_it_cannot_be_trained(project: Path) -> None:
    scope: dict[str, Any] = {}
    exec((project / "net.py").read_text(), scope)
    net = scope["net"]().eval()
    net.load_state_dict(torch.load(project / "net.pt", weights_only=True))
    torch.onnx.export(
        net, (torch.zeros(2, 1, 8, 8),), str(project / "net.onnx"), input_names=["x"], dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
    )  # fmt: skip
    report = omgoptim.optimize(
        "net.onnx", data="net.py:load", max_quality_drop=0.05, budget_minutes=5, timing="quick", threads=1,
        samples=100, runtime="onnxruntime",
    )  # fmt: skip
    assert [step.why for step in report.steps if step.status == "skipped"] == ["a program cannot be trained"]
    assert report.artifact is not None
