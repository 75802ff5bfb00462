"""quantize: build candidates, screen them, measure the finalists, and report the best reopened artifact."""

from __future__ import annotations

from dataclasses import replace

from omgoptim.operations.baseline import original_on_target
from omgoptim.operations.context import RunContext
from omgoptim.operations.dry_run import plan_quantize
from omgoptim.operations.execution import refuse_unreachable
from omgoptim.operations.float_program import float_program, unrolled_note
from omgoptim.operations.loaded_model import Live, at_batch_one, refuse_quantized
from omgoptim.operations.output_folder import free_output, with_output
from omgoptim.operations.prepare import prepare
from omgoptim.operations.quantization.build_all import build_all
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidate_tasks import programs_by_workers
from omgoptim.operations.quantization.candidates import plan_candidates
from omgoptim.operations.quantization.explain import explain
from omgoptim.operations.quantization.final_race import CandidateChoice, final_race
from omgoptim.operations.quantization.final_report import QuantizeRun, save_candidates
from omgoptim.operations.quantization.mixed_precision import (
    MixedPrecision,
    MixedPrecisionSearch,
    mixed_precision_base,
    search_mixed_precision,
)
from omgoptim.operations.quantization.mixed_precision_report import with_mixed_precision
from omgoptim.operations.quantization.mixed_precision_retry import retry_mixed_precision
from omgoptim.operations.quantization.qat import TrainedModel, train
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, screen
from omgoptim.operations.quantization.selection import Preference, finalists
from omgoptim.operations.quantization.splits import Splits, splits_of
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Qat
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.executorch import ONE_SAMPLE


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the best candidate that passes the quality guard. See `QuantizeRequest`."""
    output = free_output(request, context)
    refuse_unreachable(request, None)  # workers get programs and samples: the caller's objects stay here
    loaded = prepare(request, context, live)
    refuse_quantized(request, loaded)
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
        trained = train(request, context, loaded, program, splits, live)
        loaded, program = trained.loaded, trained.program
        splits.notes.extend(trained.warnings)
    stored = context.work / "stored-steps"
    builder = CandidateBuilder(context, loaded, program, splits.calibration, request.seed, stored=stored)
    with programs_by_workers(request, builder, plan.specs) as building:
        results = build_all(request, building, plan)
    screening = screen(request, context, loaded, [a for a in results if not a.reference], splits.selection)
    final, mixed_precision = _race_finalists(request, builder, results, splits, screening)
    context.progress("saving the artifact", 0.97)
    run = QuantizeRun(request, builder, plan, results, final, splits.notes, trained)
    report = with_mixed_precision(save_candidates(run), request, mixed_precision, final)
    if request.explain and screening is not None:
        inputs = MixedPrecisionSearch(request, builder, screening, Preference.of(request, loaded))
        explanation = explain(inputs, results, final.measured.winner.entry, mixed_precision)
        report = report.model_copy(update={"explanation": explanation})
    return with_output(report, context.artifact, output)


def _race_finalists(
    request: QuantizeRequest,
    builder: CandidateBuilder,
    results: list[CandidateResult],
    splits: Splits,
    screening: ScreeningReference | None,
) -> tuple[CandidateChoice, MixedPrecision | None]:
    """Measure the finalists, after a mixed precision search where int8 fails the guard.

    Where the result fails the guard on the evaluation data, search again on unused samples and measure once more.
    """
    context, loaded, guard = builder.context, builder.loaded, request.max_quality_drop
    preference = Preference.of(request, loaded)
    if screening is None:
        return final_race(request, context, loaded, finalists(results, guard, preference), results), None
    search = MixedPrecisionSearch(request, builder, screening, preference)
    mixed_precision = search_mixed_precision(search, results, mixed_precision_base(results, guard, preference))
    chosen = finalists(results, guard, preference)
    final = final_race(request, context, loaded, chosen, results)
    found = retry_mixed_precision(search, splits, results, final, mixed_precision)
    if found is None:
        return final, mixed_precision
    return final_race(request, context, loaded, [*chosen, found.best], results, found.best), found
