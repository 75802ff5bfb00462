"""Tests of the total gain of a chain: from the reports of the first run and of this one, as far as both are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omgoptim.jobs.folder import RunFolder
from omgoptim.models.manifest import Manifest
from omgoptim.models.security.file_integrity import sign_record
from omgoptim.operations.context import RunContext
from omgoptim.operations.gain_attribution import with_total_gain
from omgoptim.reports import EfficiencyReport, Measurement
from omgoptim.reports.measured import AGREEMENT_METRICS
from omgoptim.requests import parse
from omgoptim.runtimes.signature import Signature

DATA = {"data": "net.py:load", "inputs": [], "samples": 100, "seed": 0}


def measured(size: int, quality: float, metric: str = "top1_accuracy") -> dict[str, Any]:
    side = Measurement(
        runtime="r", size_bytes=size, params=size // 4, macs=10, quality=quality, metric=metric, samples=9
    )
    return side.model_dump()


def report(run_id: str, before: dict[str, Any], after: dict[str, Any], asked: dict[str, Any]) -> EfficiencyReport:
    here = {"cpu": "c", "threads": 1, "python": "p", "versions": {}, "seed": 0}
    told = {"outcome": "ok", "summary": "Done.", "verb": "prune", "repeat": "c", "environment": here}
    return EfficiencyReport.model_validate(
        told | {"run_id": run_id, "request": asked, "before": before, "after": after}
    )


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    """A project with run `first`, and run `second` whose artifact descends from it."""
    runs = tmp_path / ".omgoptim" / "runs"
    (runs / "first").mkdir(parents=True)
    (runs / "second" / "artifact").mkdir(parents=True)
    first = report("first", measured(800, 0.9), measured(400, 0.89), DATA)
    RunFolder(runs / "first").write_report(first)
    descends(tmp_path, ("first", "second"))
    return RunContext(runs / "third", "third", tmp_path, "p", "f", lambda *_: None)


def descends(project: Path, lineage: tuple[str, ...]) -> None:
    manifest = Manifest("onnxruntime", "float32", Signature((), None), lineage=lineage)
    path = project / ".omgoptim" / "runs" / "second" / "artifact" / "manifest.json"
    path.write_text(json.dumps(sign_record("artifact", manifest.to_json())))


def third(context: RunContext, model: str = "second", metric: str = "top1_accuracy", **asked: Any) -> EfficiencyReport:
    made = report("third", measured(400, 0.89, metric), measured(100, 0.88, metric), DATA | asked)
    return with_total_gain(made, parse("quantize", {"model": model}), context)


def test_the_total_is_that_against_the_first_original_and_no_speedup_is_made_up(context: RunContext) -> None:
    total = third(context).total
    assert total is not None
    assert (total.from_run, total.size_ratio, total.params_ratio, total.macs_ratio) == ("first", 8, 8, 1)
    assert total.quality_drop == pytest.approx(0.02)
    assert total.speedup is None
    assert "run first: 8.00x smaller on disk" in third(context).summary


def test_quality_is_compared_only_on_the_same_data_and_metric(context: RunContext) -> None:
    for told in (third(context, data="other.py:load"), third(context, samples=50), third(context, metric="r2")):
        assert told.total is not None
        assert told.total.quality_drop is None


@pytest.mark.parametrize("metric", AGREEMENT_METRICS)
def test_agreements_with_two_originals_have_no_total(context: RunContext, metric: str) -> None:
    first = report("first", measured(800, 1.0, metric), measured(400, 0.9, metric), DATA)
    RunFolder(context.project / ".omgoptim" / "runs" / "first").write_report(first)
    total = third(context, metric=metric).total
    assert total is not None
    assert (total.size_ratio, total.quality_drop) == (8, None)


def test_a_model_that_is_no_artifact_has_no_total(context: RunContext) -> None:
    assert third(context, model="net.py:build").total is None


def test_a_first_run_that_is_gone_or_is_no_name_of_a_run_gives_no_total(context: RunContext) -> None:
    outside = context.project.parent / "elsewhere"
    outside.mkdir()
    (context.project / ".omgoptim" / "runs" / "first" / "report.json").rename(outside / "report.json")
    assert third(context).total is None
    descends(context.project, (f"../../../{outside.name}", "second"))
    assert third(context).total is None


def test_a_first_run_whose_report_somebody_changed_gives_no_total(context: RunContext) -> None:
    file = context.project / ".omgoptim" / "runs" / "first" / "report.json"
    file.write_text(file.read_text().replace("800", "80000"))
    assert third(context).total is None
