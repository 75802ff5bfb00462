"""optimize: the plan, refusals before any step, and one whole run with its chain, alternatives and ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import omgoptim
from omgoptim.errors import DataError, RequestError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COMMON = {"checkpoint": "net.pt", "data": "net.py:load", "timing": "quick", "samples": 100, "threads": 1}


def test_a_plan_names_the_steps_and_takes_none(project: Path) -> None:
    report = omgoptim.optimize("net.py:net", plan=True, **COMMON)
    assert [step.status for step in report.steps] == ["planned"] * 6
    assert "An empty graph takes" in report.summary
    assert len(list((project / ".omgoptim" / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"target_latency_ms": 1e-6}, "no model reaches 1e-06 ms"),
        ({"target_size_mb": 1e-6}, "no model fits into 1e-06 MB"),
        ({"target_memory_mb": 0.5}, "no model runs within 0.5 MB"),
    ],
)
def test_a_target_below_the_floor_is_refused_with_the_nearest_one(
    project: Path, target: dict[str, float], words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refused:
        omgoptim.optimize("net.py:net", **COMMON, **target)
    assert "at least" in refused.value.fix


def test_data_that_cannot_be_divided_is_refused_before_any_step(project: Path) -> None:
    text = (project / "net.py").read_text().replace("slice(900, 1250)", "slice(900, 920)")
    (project / "net.py").write_text(text)
    with pytest.raises(DataError, match="too few to choose with"):
        omgoptim.optimize("net.py:net", **COMMON)


def test_a_quantized_artifact_is_refused(project: Path) -> None:
    made = omgoptim.quantize("net.py:net", scheme="static", runtime="onnxruntime", **COMMON)
    with pytest.raises(RequestError, match="is quantized already"):
        omgoptim.optimize(made.run_id, data="net.py:load", timing="quick")


@pytest.mark.slow
def test_a_whole_run_reaches_a_smaller_model_and_keeps_the_others(
    project: Path, digits: tuple[torch.Tensor, ...]
) -> None:
    report = omgoptim.optimize("net.py:net", max_quality_drop=0.05, budget_minutes=5, runtime="onnxruntime", **COMMON)
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
