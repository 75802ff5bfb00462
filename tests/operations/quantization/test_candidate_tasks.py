"""Candidates that workers build: the same programs, errors and choice as those of the driver."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from omgoptim.errors import NoLayerChanged
from omgoptim.measure.timing import Ratio, Timing
from omgoptim.models.manifest import PROGRAM
from omgoptim.operations.context import RunContext
from omgoptim.operations.float_program import float_program
from omgoptim.operations.prepare import prepare
from omgoptim.operations.quantization.build_all import OUTCOME, build_all, programs_by_workers
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import CandidatePlan, CandidateSpec, plan_candidates
from omgoptim.operations.quantization.screening import CandidateResult
from omgoptim.operations.quantization.selection import Preference, select_finalists
from omgoptim.operations.quantization.splits import split_samples
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Bf16, Dynamic, Fp32, Static

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
)

SPECS = [
    CandidateSpec(Static(algorithm="onnxruntime"), "onnxruntime"),
    CandidateSpec(Dynamic(targets=["8"]), "onnxruntime"),
    CandidateSpec(Dynamic(targets=["0"]), "onnxruntime"),
    CandidateSpec(Bf16(), "torch_eager"),
    CandidateSpec(Fp32(), "onnxruntime"),
]
"""A convolution for the third, which dynamic quantization cannot change."""


def asked(**arguments: object) -> QuantizeRequest:
    given = {"model": "net.py:net", "checkpoint": "net.pt", "data": "net.py:load", "samples": 100} | arguments
    request = parse("quantize", given)
    assert isinstance(request, QuantizeRequest)
    return request


def builder_of(project: Path) -> CandidateBuilder:
    context = RunContext(project / "run", "quantize-1", project, sys.executable, "", lambda _stage, _done: None)
    loaded = prepare(asked(project=str(project)), context)
    program = float_program(loaded, context)
    splits = split_samples(asked(), loaded, CandidatePlan(SPECS, []))
    return CandidateBuilder(context, loaded, program, splits.calibration, 0)


def built(builder: CandidateBuilder, request: QuantizeRequest, specs: list[CandidateSpec]) -> list[CandidateResult]:
    """Build in a folder of its own."""
    folder = builder.context.folder.with_name(f"on-{request.on}-{request.workers}")
    builder = replace(builder, context=replace(builder.context, folder=folder), cache=folder / "cache")
    with programs_by_workers(request, builder, specs) as building:
        return build_all(request, building, CandidatePlan(specs, []))


def chosen(results: list[CandidateResult]) -> list[str]:
    """Return the finalists where every candidate is as fast as its place in the list says."""
    for speed, result in enumerate(results, 1):
        if result.error is None:
            result.timing, result.drop = Timing(1.0, 1.0, None, None, Ratio(speed, speed, speed), None, 1), 0.0
    found = select_finalists(results, 0.01, Preference("balanced", 1000))
    return [result.built.spec.name for result in found]


def assert_same(one: list[CandidateResult], other: list[CandidateResult]) -> None:
    assert [result.built.spec for result in other] == [result.built.spec for result in one]
    for first, second in zip(one, other, strict=True):
        assert second.built.outcome == first.built.outcome
        assert type(second.error) is type(first.error)
        assert str(second.error) == str(first.error)
        if first.built.folder and second.built.folder:
            names = [file.name for file in sorted(first.built.folder.iterdir())]
            assert [file.name for file in sorted(second.built.folder.iterdir())] == names
            if PROGRAM in names:
                assert (second.built.folder / PROGRAM).read_bytes() == (first.built.folder / PROGRAM).read_bytes()
    assert chosen(other) == chosen(one)


def test_two_workers_write_the_programs_of_one(project: Path) -> None:
    builder = builder_of(project)
    alone, shared = (built(builder, asked(workers=workers), SPECS) for workers in (1, 2))
    assert_same(alone, shared)
    assert len(list(project.glob(f"on-local-2/work/programs/*/{OUTCOME}"))) == 3
    assert not list(project.glob("on-local-1/work/programs"))
    steps = [{file.name: file.read_bytes() for file in project.glob(f"on-local-{n}/cache/*")} for n in (1, 2)]
    assert len(steps[0]) == 3  # of the static candidate
    assert steps[1] == steps[0]
    error = shared[2].error
    assert isinstance(error, NoLayerChanged)
    assert error.schemes == ("static",)


def test_one_program_alone_is_written_by_the_driver(project: Path) -> None:
    builder = builder_of(project)
    with programs_by_workers(asked(workers=2), builder, [SPECS[1], *SPECS[3:]]) as building:
        assert building is builder


@pytest.mark.slow
@pytest.mark.parametrize("on", ["local", "ray"])
@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_workers_build_the_candidates_of_auto_as_the_driver_does(project: Path, on: str, effort: str) -> None:
    if on == "ray":
        pytest.importorskip("ray")
    builder = builder_of(project)
    specs = plan_candidates(asked(effort=effort), builder.loaded, builder.program).specs
    assert_same(*(built(builder, asked(effort=effort, on=at, workers=n), specs) for at, n in (("local", 1), (on, 2))))
