"""quantize: build candidates, screen them, measure the finalists, and report the best reopened artifact."""

from __future__ import annotations

import math
from dataclasses import replace

from omgoptim.errors import RequestError
from omgoptim.models.artifact import Manifest
from omgoptim.operations.context import RunContext
from omgoptim.operations.dry_run import plan_quantize
from omgoptim.operations.float_program import Program, float_program, unrolled_note
from omgoptim.operations.loaded_model import Live, LoadedModel, at_batch_one
from omgoptim.operations.output_folder import deliver, free_output
from omgoptim.operations.prepare import prepare
from omgoptim.operations.quantization.build_candidates import BuiltCandidate, build_candidate
from omgoptim.operations.quantization.candidates import CandidatePlan, CandidateSpec, plan_candidates
from omgoptim.operations.quantization.explain import explain
from omgoptim.operations.quantization.final_race import FinalRace, final_race
from omgoptim.operations.quantization.finalist_summary import QuantizeRun
from omgoptim.operations.quantization.finalists import save_finalists
from omgoptim.operations.quantization.mixed_precision import (
    MixedPrecision,
    MixedPrecisionSearch,
    mixed_precision_base,
    search_mixed_precision,
)
from omgoptim.operations.quantization.mixed_precision_report import with_mixed_precision
from omgoptim.operations.quantization.mixed_precision_retry import retry_mixed_precision
from omgoptim.operations.quantization.no_op import no_candidate_error
from omgoptim.operations.quantization.qat import TRAINED_AT, TrainedModel, train
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, live_candidate, screen
from omgoptim.operations.quantization.selection import Preference, finalists
from omgoptim.operations.quantization.splits import Splits, splits_of
from omgoptim.operations.report_records import artifact_record
from omgoptim.operations.target import original_on_target
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Fp32, Qat
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.executorch import ONE_SAMPLE

BUILD_LIMIT_S = 300.0
"""Time limit in seconds for building one of several candidates, except with effort best."""


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the best candidate that passes the quality guard. See `QuantizeRequest`."""
    output = free_output(request.output, request.allow_path, context)
    loaded = prepare(request, context, live)
    if loaded.precision.startswith("int"):
        raise RequestError(
            f"'{request.model}' is quantized already",
            f"its artifact is in {loaded.precision}; quantizing again would lose more quality",
            "quantize its float model",
        )
    unrolled = unrolled_note(loaded, request)
    if unrolled is not None:
        loaded = replace(loaded, notes=[*loaded.notes, unrolled])
        context.progress(f"exporting the model, which takes long: {unrolled}", 0.08)
    else:
        context.progress("exporting the model", 0.08)
    program = float_program(loaded, context, or_at_one=True)
    if request.runtime != "auto" and ENGINES[request.runtime].runs == "lowered":
        loaded = at_batch_one(loaded, ONE_SAMPLE, context.work, lowered=True)
    elif program.fixed_batch is not None:
        loaded = at_batch_one(loaded, program.fixed_batch, context.work)
    loaded = original_on_target(loaded, context, program)
    plan = plan_candidates(request, loaded, program)
    if request.plan:
        return plan_quantize(request, context, loaded, program, plan)
    splits = splits_of(request, loaded, plan)
    trained: TrainedModel | None = None
    if isinstance(request.scheme, Qat):
        trained = train(request, request.scheme, context, loaded, program, splits, live)
        loaded, program = trained.loaded, trained.program
        splits.notes.extend(trained.warnings)
    results = _build_all(request, context, loaded, program, plan, splits)
    screening = screen(request, context, loaded, [a for a in results if not a.reference], splits.selection)
    final, mixed_precision = _race_finalists(request, context, loaded, program, results, splits, screening)
    context.progress("saving the artifact", 0.97)
    run = QuantizeRun(request, context, loaded, program, plan, results, final, splits.notes, trained)

    report = with_mixed_precision(save_finalists(run), request, mixed_precision, final)
    explanation = None
    if request.explain and screening is not None:
        winner = final.winner.result
        preference = Preference(request.prefer, Manifest.read(loaded.baseline).size_bytes)
        inputs = MixedPrecisionSearch(request, context, loaded, program, splits.calibration, screening, preference)
        explanation = explain(inputs, results, winner, mixed_precision)
    place, unknown = deliver(context.artifact, output, final.holds)
    update = {"explanation": explanation, "warnings": [*report.warnings, *unknown]}
    return report.model_copy(update=update | ({"artifact": artifact_record(place)} if output else {}))


def _race_finalists(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    results: list[CandidateResult],
    splits: Splits,
    screening: ScreeningReference | None,
) -> tuple[FinalRace, MixedPrecision | None]:
    """Measure the finalists, after a mixed precision search where int8 fails the guard.

    Where the result fails the guard on the evaluation data, search again on unused samples and measure once more.
    """
    preference = Preference(request.prefer, Manifest.read(loaded.baseline).size_bytes)
    guard = request.max_quality_drop
    if screening is None:
        return final_race(request, context, loaded, finalists(results, guard, preference), results, preference), None
    search = MixedPrecisionSearch(request, context, loaded, program, splits.calibration, screening, preference)
    mixed_precision = search_mixed_precision(search, results, mixed_precision_base(results, guard, preference))
    chosen = finalists(results, guard, preference)
    final = final_race(request, context, loaded, chosen, results, preference)
    found = retry_mixed_precision(search, splits, results, final, mixed_precision)
    if found is None:
        return final, mixed_precision
    chosen = [*chosen, found.result]
    return final_race(request, context, loaded, chosen, results, preference, found.result), found.mixed_precision


def _build_all(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    plan: CandidatePlan,
    splits: Splits,
) -> list[CandidateResult]:
    """Build all candidates, and float32 references on their engines. Raise an error if no candidate could be built."""
    results: list[CandidateResult] = []
    twins: dict[str | None, BuiltCandidate] = {}
    for index, spec in enumerate(plan.specs):
        start = TRAINED_AT if isinstance(request.scheme, Qat) else 0.1
        doing = build_progress(spec.name, index, len(plan.specs))
        context.progress(doing, start + (0.35 - start) * index / len(plan.specs))
        key = None if spec.on_module else spec.params.model_dump_json()
        left = len(plan.specs) - index > 1 or any(result.built.folder for result in results)
        built = build_candidate(
            spec,
            loaded,
            program,
            splits.calibration,
            context,
            request.seed,
            twins.get(key) if key else None,
            doing=doing,
            limit_s=BUILD_LIMIT_S if left and request.effort != "best" else math.inf,
        )
        if key and built.folder:
            twins.setdefault(key, built)
        results.append(CandidateResult(built, error=built.error))
        context.publish(live_candidate(results[-1]))
    if all(result.error for result in results):
        raise no_candidate_error([(a.built.spec.name, a.error) for a in results if a.error], request)
    for spec in _references(plan, loaded, program):
        key = spec.params.model_dump_json()
        built = build_candidate(spec, loaded, program, splits.calibration, context, request.seed, twins.get(key))
        if built.folder:
            twins.setdefault(key, built)
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
