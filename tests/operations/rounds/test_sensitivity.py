"""Sensitivity analysis: the same curves by the driver and by workers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from omgoptim.errors import RunError
from omgoptim.operations.compression_job import Job
from omgoptim.operations.context import RunContext
from omgoptim.operations.datasets import load_datasets
from omgoptim.operations.prepare import prepare
from omgoptim.operations.rounds.sensitivity import layer_sensitivity
from omgoptim.operations.save_module import require_module
from omgoptim.requests import FactorizeRequest, PruneRequest, parse

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

ASKED = {"checkpoint": "net.pt", "data": "net.py:load", "samples": 100, "threads": 1, "sensitivity": True}


def job_of(project: Path, verb: str, **arguments: object) -> Job[PruneRequest | FactorizeRequest]:
    request = parse(verb, {"model": "net.py:net", "project": str(project), **ASKED, **arguments})
    assert isinstance(request, PruneRequest | FactorizeRequest)
    folder = project / f"{request.on}-{request.workers}"
    context = RunContext(folder, f"{verb}-1", project, sys.executable, "", lambda _stage, _done: None)
    loaded = prepare(request, context)
    original = require_module(loaded, verb)
    return Job(request, context, loaded, load_datasets(request, loaded, original, None), original, "torch_eager")


def test_two_workers_measure_the_sensitivity_of_one(project: Path) -> None:
    alone, shared = (job_of(project, "prune", method="magnitude", workers=workers) for workers in (1, 2))
    points = layer_sensitivity(alone, alone.request.method)
    assert {point.path for point in points} == {"0", "3", "8"}
    assert layer_sensitivity(shared, shared.request.method) == points
    assert len(list(project.glob("local-2/checkpoints/sensitivity/*/qualities.json"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "method"), [("prune", "structured"), ("factorize", "whitened")])
def test_two_workers_of_ray_measure_the_sensitivity_of_one(project: Path, verb: str, method: str) -> None:
    pytest.importorskip("ray")
    alone = job_of(project, verb, method=method)
    shared = job_of(project, verb, method=method, on="ray", workers=2)
    points = layer_sensitivity(alone, alone.request.method)
    assert points
    assert layer_sensitivity(shared, shared.request.method) == points


@pytest.mark.slow
def test_a_worker_whose_model_has_other_weights_measures_nothing(project: Path) -> None:
    (project / "drawn.py").write_text(
        "import os, torch, net\ndef build():\n    torch.manual_seed(os.getpid())\n    return net.net()\n"
    )
    shared = job_of(project, "prune", model="drawn.py:build", checkpoint=None, method="magnitude", workers=2)
    with pytest.raises(RunError, match="differ between a worker and the driver"):
        layer_sensitivity(shared, shared.request.method)
