"""quantize: build candidates, screen them, measure the finalists, and report the best reopened artifact."""

from __future__ import annotations

from dataclasses import replace

from omgoptim.operations.baseline import original_on_target
from omgoptim.operations.context import RunContext
from omgoptim.operations.dry_run import plan_quantize
from omgoptim.operations.execution import refuse_unsendable
from omgoptim.operations.final_report import new_output_folder, with_output
from omgoptim.operations.float_program import float_program, unrolled_note
from omgoptim.operations.loaded_model import Live, at_batch_one, refuse_quantized
from omgoptim.operations.prepare import prepare
from omgoptim.operations.quantization.build_all import build_all, programs_by_workers
from omgoptim.operations.quantization.build_candidates import CandidateBuilder
from omgoptim.operations.quantization.candidates import plan_candidates
from omgoptim.operations.quantization.explain import explain
from omgoptim.operations.quantization.final_choice import measure_and_choose
from omgoptim.operations.quantization.final_report import QuantizeRun, save_candidates
from omgoptim.operations.quantization.mixed_precision import (
    MixedPrecisionSearch,
)
from omgoptim.operations.quantization.mixed_precision_report import with_mixed_precision
from omgoptim.operations.quantization.qat import TrainedModel, train_in_int8
from omgoptim.operations.quantization.screening import screen
from omgoptim.operations.quantization.selection import Preference
from omgoptim.operations.quantization.splits import split_samples
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Qat
from omgoptim.runtimes import ENGINES
from omgoptim.runtimes.executorch import ONE_SAMPLE


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the best candidate that passes the quality guard. See `QuantizeRequest`."""
    output = new_output_folder(request, context)
    refuse_unsendable(request, None)  # workers get programs and samples: the caller's objects stay here
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
    splits = split_samples(request, loaded, plan)
    trained: TrainedModel | None = None
    if isinstance(request.scheme, Qat):
        trained = train_in_int8(request, context, loaded, program, splits, live)
        loaded, program = trained.loaded, trained.program
        splits.notes.extend(trained.warnings)
    cache = context.work / "step-cache"
    builder = CandidateBuilder(context, loaded, program, splits.calibration, request.seed, cache=cache)
    with programs_by_workers(request, builder, plan.specs) as building:
        results = build_all(request, building, plan)
    screening = screen(request, context, loaded, [a for a in results if not a.reference], splits.selection)
    final, mixed_precision = measure_and_choose(request, builder, results, splits, screening)
    context.progress("saving the artifact", 0.97)
    run = QuantizeRun(request, builder, plan, results, final, splits.notes, trained)
    report = with_mixed_precision(save_candidates(run), request, mixed_precision, final)
    if request.explain and screening is not None:
        inputs = MixedPrecisionSearch(request, builder, screening, Preference.of(request, loaded))
        explanation = explain(inputs, results, final.measured.winner.entry, mixed_precision)
        report = report.model_copy(update={"explanation": explanation})
    return with_output(report, context.artifact, output)
