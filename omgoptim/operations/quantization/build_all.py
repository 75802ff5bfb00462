"""Build all candidates of a quantize run, in this process or with programs that workers write.

A task of a worker writes a quantized program from the float program; the driver opens, saves and times it. Where no
candidate can be built, there is one error with a working call as its fix.
"""

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

from omgoptim.errors import NoLayerChanged, OmgoptimError, TechniqueError, call
from omgoptim.executors import Task, TaskResult
from omgoptim.executors.task import Work
from omgoptim.models.manifest import PROGRAM, Manifest
from omgoptim.operations.context import is_live
from omgoptim.operations.execution import is_parallel, open_workers
from omgoptim.operations.float_program import Program
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import engine_argument, same_arguments, step
from omgoptim.operations.quantization.build_candidates import (
    BuiltCandidate,
    CandidateBuilder,
    refuse_beyond_limit,
)
from omgoptim.operations.quantization.candidates import CandidatePlan, CandidateSpec
from omgoptim.operations.quantization.qat import TRAINED_AT
from omgoptim.operations.quantization.screening import SPAN, CandidateResult, live_candidate
from omgoptim.reports import Change, Skip
from omgoptim.requests import QuantizeRequest, parse
from omgoptim.requests.quantize import Auto, Fp32, Qat
from omgoptim.runtimes.external_data import external_data
from omgoptim.techniques.registry import Outcome, ProgramRun, apply_to_program, technique_of

BUILD_LIMIT_S = 300.0
"""Time limit in seconds for building one of several candidates, except with effort best, so that
a slow one leaves time for the others."""

WITHOUT_DATA = "bf16"
"""Scheme that works for any model without data."""


def build_all(request: QuantizeRequest, builder: CandidateBuilder, plan: CandidatePlan) -> list[CandidateResult]:
    """Build all candidates, and float32 references on their engines.

    Raises:
        OmgoptimError: no candidate could be built.
    """
    results: list[CandidateResult] = []
    built_programs: dict[str, BuiltCandidate] = {}
    count = len(plan.specs)
    start = TRAINED_AT if isinstance(request.scheme, Qat) else 0.1
    for index, spec in enumerate(plan.specs):
        doing = build_progress(spec.name, index, count)
        builder.context.progress(doing, start + (SPAN[0] - start) * index / count)
        key = "" if spec.on_module else spec.params.model_dump_json()
        several = count - index > 1 or any(result.built.folder for result in results)
        limit_s = BUILD_LIMIT_S if several and request.effort != "best" else math.inf
        built = builder.build(spec, built_programs.get(key), doing=doing, limit_s=limit_s)
        if key and built.folder:
            built_programs.setdefault(key, built)
        results.append(CandidateResult(built, error=built.error))
        builder.context.publish(live_candidate(results[-1]))
    if all(result.error for result in results):
        raise no_candidate_error([(a.built.spec, a.error) for a in results if a.error], request)
    for spec in _references(plan, builder.loaded, builder.program):
        key = spec.params.model_dump_json()
        built = builder.build(spec, built_programs.get(key))
        if built.folder:
            built_programs.setdefault(key, built)
            results.append(CandidateResult(built, reference=True))
    return results


def build_progress(name: str, index: int, count: int) -> str:
    """Return the progress message while a candidate is built."""
    return f"building candidate {index + 1} of {count}, {name}" if count > 1 else f"building {name}"


def _references(plan: CandidatePlan, loaded: LoadedModel, program: Program) -> list[CandidateSpec]:
    """Return float32 specs for the engines of program candidates, where float32 is not a candidate or the original."""
    original = Manifest.read(loaded.baseline)
    engines = {o.runtime for o in plan.specs if o.is_lowered or (program.path and not o.on_module)}
    engines -= {spec.runtime for spec in plan.specs if isinstance(spec.params, Fp32)}
    engines -= {original.runtime} if original.precision == "float32" else set()
    return [CandidateSpec(Fp32(), runtime) for runtime in sorted(engines)]


def no_candidate_error(
    failed: Sequence[tuple[CandidateSpec, OmgoptimError]], request: QuantizeRequest
) -> OmgoptimError:
    """Return one error for candidates that all failed: the first error where all have the same cause.

    That is where none would change a layer, or where one technique failed with the same kind of error on each engine.

    Args:
        failed: each candidate and its error.
        request: of the run, from which the fix is written.
    """
    errors = [error for _, error in failed]
    one_technique = all(spec.params == failed[0][0].params for spec, _ in failed)
    alike = one_technique and len({type(error) for error in errors}) == 1
    if alike or all(isinstance(error, NoLayerChanged) for error in errors):
        return with_suggested_call(errors[0], request)
    reasons = "; ".join(f"{spec.name}: {error.what}" for spec, error in failed)
    return TechniqueError("no candidate could be built", reasons, errors[0].fix)


def with_suggested_call(error: OmgoptimError, request: QuantizeRequest) -> OmgoptimError:
    """Add a ready call to the fix of a `NoLayerChanged` error; return any other error unchanged.

    The technique names the schemes that help, best first; the request names the model. A glob that matches no layer
    is left out of the call.
    """
    if not isinstance(error, NoLayerChanged):
        return error
    usable = [name for name in error.schemes if request.data is not None or not _needs_data(name)]
    globs = [name for name in ("targets", "ignore") if getattr(request.scheme, name, [])]
    if error.schemes:
        scheme = {"scheme": usable[0] if usable else WITHOUT_DATA}
    elif globs:
        scheme = {"scheme": request.scheme.scheme}
    else:
        return error
    common = same_arguments(request.model_copy(update={"scheme": Auto()}))
    arguments = {name: value for name, value in common.items() if name != "runtime"} | scheme
    arguments |= engine_argument(request.runtime, scheme["scheme"])
    live = any(is_live(value) for value in arguments.values())
    ready = step("quantize", arguments, "").command if live else call("quantize", arguments)
    return TechniqueError(error.what, error.why, f"{error.fix}: {ready}" if error.fix else ready)


def _needs_data(scheme: str) -> bool:
    """Return whether a scheme needs data; True for an unknown scheme, which is not suggested then."""
    try:
        request = parse("quantize", {"model": "m", "scheme": scheme})
    except OmgoptimError:
        return True
    return not isinstance(request, QuantizeRequest) or technique_of(request.scheme).needs_data


FUNCTION = f"{__name__}:write_program"

FLOAT, CALIBRATION = "float", "calibration"
"""Folders of a task's inputs: the float program with its external data, and a file per calibration batch."""

CACHE = "step-cache"
"""Folder of `ProgramRun.cache` in a task's results."""

OUTCOME = "outcome.json"


@contextmanager
def programs_by_workers(
    request: QuantizeRequest, builder: CandidateBuilder, specs: Sequence[CandidateSpec]
) -> Iterator[CandidateBuilder]:
    """Let workers write the programs of candidates at the same time; one alone is written where it is needed.

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
    with open_workers(request, context) as executor:
        context.progress(f"writing {len(programs)} quantized programs on {request.workers} workers", None)
        written: dict[str, Callable[[], BuiltCandidate]] = {}
        for number, (key, spec) in enumerate(programs.items()):
            task = Task(FUNCTION, _payload(spec, builder, limit_s), place / str(number), inputs=inputs)
            written[key] = _waiting(spec, executor.submit(task), builder.cache)
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
            cache = work.folder / CACHE
            run = ProgramRun(batches, Path(scratch), payload["seed"], payload["threads"], report_stage, cache)
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


def _waiting(spec: CandidateSpec, future: Future[TaskResult], cache: Path | None) -> Callable[[], BuiltCandidate]:
    def written() -> BuiltCandidate:
        folder = future.result().folder
        if cache is not None and (folder / CACHE).is_dir():
            shutil.copytree(folder / CACHE, cache, dirs_exist_ok=True)
        record = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        if "unchanged" in record:
            error = record["unchanged"]
            raise NoLayerChanged(error["what"], error["why"], error["fix"], schemes=record["schemes"])
        changed = [Change.model_validate(each) for each in record["changed"]]
        skipped = [Skip.model_validate(each) for each in record["skipped"]]
        return BuiltCandidate(spec, folder, Outcome(changed, skipped, record["notes"]))

    return written
