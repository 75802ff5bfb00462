"""Quantized programs as tasks: written by workers from the float program, opened, saved and timed by the driver."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from omgoptim.errors import NoLayerChanged
from omgoptim.executors import Task, TaskResult, executor_on
from omgoptim.executors.task import Work
from omgoptim.models.manifest import PROGRAM
from omgoptim.operations.execution import is_parallel
from omgoptim.operations.quantization.build_all import BUILD_LIMIT_S
from omgoptim.operations.quantization.build_candidates import (
    BuiltCandidate,
    CandidateBuilder,
    refuse_beyond_limit,
)
from omgoptim.operations.quantization.candidates import CandidateSpec
from omgoptim.reports import Change, Skip
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Fp32
from omgoptim.runtimes.external_data import external_data
from omgoptim.techniques.registry import Outcome, ProgramRun, apply_to_program

FUNCTION = f"{__name__}:write_program"

FLOAT, CALIBRATION = "float", "calibration"
"""Folders of a task's inputs: the float program with its external data, and a file per calibration batch."""

STORED = "stored-steps"
"""Folder of `ProgramRun.stored` in a task's results."""

OUTCOME = "outcome.json"


@contextmanager
def programs_by_workers(
    request: QuantizeRequest, builder: CandidateBuilder, specs: Sequence[CandidateSpec]
) -> Iterator[CandidateBuilder]:
    """Let workers write the programs of candidates at the same time; one alone is written where it is needed.

    Args:
        request: of the run.
        builder: of the candidates.
        specs: all candidates.

    Yields:
        The builder with the programs that it then waits for.

    Raises:
        SetupError: Ray does not start.
    """
    programs = {} if builder.program.path is None else {spec.key: spec for spec in specs if _is_written(spec)}
    if not is_parallel(request) or len(programs) < 2:
        yield builder
        return
    context, limit_s = builder.context, None if request.effort == "best" else BUILD_LIMIT_S
    place = context.work / "programs"
    shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    place.mkdir(parents=True)
    inputs = _inputs(builder)
    with executor_on(request.on, request.workers, context.project, context.progress) as executor:
        assert executor is not None  # there are workers
        context.progress(f"writing {len(programs)} quantized programs on {request.workers} workers", None)
        written: dict[str, Callable[[], BuiltCandidate]] = {}
        for number, (key, spec) in enumerate(programs.items()):
            task = Task(FUNCTION, _payload(spec, builder, limit_s), place / str(number), inputs=inputs)
            written[key] = _waiting(spec, executor.submit(task), builder.stored)
        yield replace(builder, written=written)


def write_program(payload: Mapping[str, Any], work: Work) -> None:
    """Apply a technique to the float program; the task of a worker.

    It has as many threads as the driver, since sums of floating-point numbers depend on their order.
    """
    began = time.monotonic()
    torch.set_num_threads(payload["torch_threads"])
    params = cast(QuantizeRequest, parse("quantize", {"model": FLOAT, "scheme": payload["params"]})).scheme
    names = sorted(name for name in work.inputs if name.startswith(f"{CALIBRATION}/"))
    batches = [dict(np.load(work.inputs[name])) for name in names]
    limit_s = payload["limit_s"] or math.inf

    def report_stage(_stage: str, _done: float | None) -> None:
        refuse_beyond_limit(time.monotonic() - began, limit_s)

    source = work.inputs[f"{FLOAT}/{payload['program']}"]
    try:
        with tempfile.TemporaryDirectory(dir=work.folder.parent) as scratch:
            stored = work.folder / STORED
            run = ProgramRun(batches, Path(scratch), payload["seed"], payload["threads"], report_stage, stored)
            outcome = apply_to_program(source, work.folder / PROGRAM, params, run)
    except NoLayerChanged as error:  # it would arrive without its schemes
        record: dict[str, Any] = {"unchanged": error.to_dict(), "schemes": error.schemes}
    else:
        record = {
            "changed": [change.model_dump(mode="json") for change in outcome.changed],
            "skipped": [skip.model_dump(mode="json") for skip in outcome.skipped],
            "notes": outcome.notes,
        }
    (work.folder / OUTCOME).write_text(json.dumps(record), encoding="utf-8")


def _is_written(spec: CandidateSpec) -> bool:
    """Return whether a worker writes the program of a candidate: modules stay in the driver, float32 is a copy."""
    return not (spec.on_module or spec.is_lowered or isinstance(spec.params, Fp32))


def _inputs(builder: CandidateBuilder) -> dict[str, Path]:
    program = builder.program.path
    assert program is not None
    files = [program, *(program.parent / location for location in sorted(external_data(program)))]
    samples = builder.calibration.write(builder.context.work / CALIBRATION)
    return {f"{FLOAT}/{file.relative_to(program.parent)}": file for file in files} | {
        f"{CALIBRATION}/{file.name}": file for file in sorted(samples.iterdir())
    }


def _payload(spec: CandidateSpec, builder: CandidateBuilder, limit_s: float | None) -> dict[str, Any]:
    assert builder.program.path is not None
    return {
        "params": spec.params.model_dump(mode="json"),
        "program": builder.program.path.name,
        "seed": builder.seed,
        "threads": builder.loaded.bench.threads,
        "torch_threads": torch.get_num_threads(),
        "limit_s": limit_s,
    }


def _waiting(spec: CandidateSpec, future: Future[TaskResult], stored: Path | None) -> Callable[[], BuiltCandidate]:
    def written() -> BuiltCandidate:
        folder = future.result().folder
        if stored is not None and (folder / STORED).is_dir():
            shutil.copytree(folder / STORED, stored, dirs_exist_ok=True)
        record = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        if "unchanged" in record:
            error = record["unchanged"]
            raise NoLayerChanged(error["what"], error["why"], error["fix"], schemes=record["schemes"])
        changed = [Change.model_validate(each) for each in record["changed"]]
        skipped = [Skip.model_validate(each) for each in record["skipped"]]
        return BuiltCandidate(spec, folder, Outcome(changed, skipped, record["notes"]))

    return written
