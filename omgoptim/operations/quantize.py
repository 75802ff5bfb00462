"""quantize: propose candidates, make them, screen them cheaply, race the finalists, and report the reopened winner."""

from __future__ import annotations

import math
from dataclasses import replace

from omgoptim.errors import RequestError
from omgoptim.models.artifact import Manifest
from omgoptim.operations.context import RunContext
from omgoptim.operations.fixed_batch import at_batch_one
from omgoptim.operations.loaded_model import Live, LoadedModel, prepare
from omgoptim.operations.output_folder import deliver, free_output
from omgoptim.operations.quantization.build_candidates import BuiltCandidate, float_program, make
from omgoptim.operations.quantization.candidates import Option, Program, Proposal, propose
from omgoptim.operations.quantization.explain import explain
from omgoptim.operations.quantization.final_race import Final, final_race
from omgoptim.operations.quantization.finalists import Run, keep
from omgoptim.operations.quantization.mixed_precision import MixedPrecision, Search, repair, worth_repairing
from omgoptim.operations.quantization.mixed_precision_report import with_guard
from omgoptim.operations.quantization.mixed_precision_retry import search_again
from omgoptim.operations.quantization.no_op import nothing_made
from omgoptim.operations.quantization.plan import plan_report
from omgoptim.operations.quantization.qat import TRAINED, Trained, train
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, screen
from omgoptim.operations.quantization.selection import Preference, finalists
from omgoptim.operations.quantization.splits import Splits, splits_of
from omgoptim.operations.quantization.unrolled_loops import unrolled_note
from omgoptim.operations.report_records import artifact_record
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Fp32, Qat
from omgoptim.runtimes import ENGINES

SHARE_S = 300.0
"""Seconds that making one candidate of several may take, unless the effort is best."""


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the best candidate that holds the guard. See `QuantizeRequest`."""
    output = free_output(request.output, request.allow_path, context)
    loaded = prepare(request, context, live)
    if loaded.precision.startswith("int"):
        raise RequestError(
            f"'{request.model}' is quantized already",
            f"its artifact is in {loaded.precision}, and another rounding would only lose more",
            "quantize the float model that it was made from",
        )
    unrolled = unrolled_note(loaded, request)
    if unrolled is not None:
        loaded = replace(loaded, notes=[*loaded.notes, unrolled])
        context.progress(f"exporting the model, which takes long: {unrolled}", 0.08)
    else:
        context.progress("exporting the model", 0.08)
    program = float_program(loaded, context, or_at_one=True)
    if program.fixed_batch is not None:
        loaded = at_batch_one(loaded, program.fixed_batch, context.work)
    proposal = propose(request, loaded, program)
    if request.plan:
        return plan_report(request, context, loaded, program, proposal)
    splits = splits_of(request, loaded, proposal)
    trained: Trained | None = None
    if isinstance(request.scheme, Qat):
        trained = train(request, request.scheme, context, loaded, program, splits, live)
        loaded, program = trained.loaded, trained.program
        splits.notes.extend(trained.warnings)
    results = _make_all(request, context, loaded, program, proposal, splits)
    screening = screen(request, context, loaded, [a for a in results if not a.reference], splits.selection)
    final, mixed_precision = _finals(request, context, loaded, program, results, splits, screening)
    context.progress("saving the artifact", 0.97)
    run = Run(request, context, loaded, program, proposal, results, final, splits.notes, trained)

    report = with_guard(keep(run), request, mixed_precision, final)
    explanation = None
    if request.explain and screening is not None:
        winner = final.winner.result
        explanation = explain(
            request, context, loaded, program, results, winner, mixed_precision, splits.calibration, screening
        )
    place, unknown = deliver(context.artifact, output, final.holds)
    update = {"explanation": explanation, "warnings": [*report.warnings, *unknown]}
    return report.model_copy(update=update | ({"artifact": artifact_record(place)} if output else {}))


def _finals(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    results: list[CandidateResult],
    splits: Splits,
    screening: ScreeningReference | None,
) -> tuple[Final, MixedPrecision | None]:
    """The final measurement, after a search for layers to keep in float where int8 fails the guard; and after another
    one, on other selection samples, where what the first search found fails it on the evaluation data."""
    preference = Preference(request.prefer, Manifest.read(loaded.baseline).size_bytes)
    guard = request.max_quality_drop
    if screening is None:
        return final_race(request, context, loaded, finalists(results, guard, preference), results, preference), None
    search = Search(request, context, loaded, program, splits.calibration, screening, preference)
    mixed_precision = repair(search, results, worth_repairing(results, guard, preference))
    chosen = finalists(results, guard, preference)
    final = final_race(request, context, loaded, chosen, results, preference)
    found = search_again(search, splits, results, final, mixed_precision)
    if found is None:
        return final, mixed_precision
    chosen = [*chosen, found.result]
    return final_race(request, context, loaded, chosen, results, preference, found.result), found.mixed_precision


def _make_all(
    request: QuantizeRequest,
    context: RunContext,
    loaded: LoadedModel,
    program: Program,
    proposal: Proposal,
    splits: Splits,
) -> list[CandidateResult]:
    """Every proposed candidate's artifact, and float32 on the engines of these, which tells what an engine alone
    brings. If no candidate could be made, the first one's reason is the error."""
    results: list[CandidateResult] = []
    twins: dict[str | None, BuiltCandidate] = {}
    for index, option in enumerate(proposal.options):
        start = TRAINED if isinstance(request.scheme, Qat) else 0.1
        doing = making_words(option.name, index, len(proposal.options))
        context.progress(doing, start + (0.35 - start) * index / len(proposal.options))
        key = None if option.on_module else option.params.model_dump_json()
        left = len(proposal.options) - index > 1 or any(result.made.folder for result in results)
        made = make(
            option,
            loaded,
            program,
            splits.calibration,
            context,
            request.seed,
            twins.get(key) if key else None,
            doing=doing,
            limit_s=SHARE_S if left and request.effort != "best" else math.inf,
        )
        if key and made.folder:
            twins.setdefault(key, made)
        results.append(CandidateResult(made, error=made.error))
    if all(result.error for result in results):
        raise nothing_made([(a.made.option.name, a.error) for a in results if a.error], request)
    for option in _references(proposal, loaded, program):
        key = option.params.model_dump_json()
        made = make(option, loaded, program, splits.calibration, context, request.seed, twins.get(key))
        if made.folder:
            twins.setdefault(key, made)
            results.append(CandidateResult(made, reference=True))
    return results


def making_words(name: str, index: int, count: int) -> str:
    """What progress says while a candidate is made."""
    return f"making candidate {index + 1} of {count}, {name}" if count > 1 else f"making {name}"


def _references(proposal: Proposal, loaded: LoadedModel, program: Program) -> list[Option]:
    """Float32 on each engine that runs programs and is proposed, where that is no candidate and not the original."""
    original = Manifest.read(loaded.baseline)
    engines = {o.runtime for o in proposal.options if ENGINES[o.runtime].runs == "program" and program.path}
    engines -= {option.runtime for option in proposal.options if isinstance(option.params, Fp32)}
    engines -= {original.runtime} if original.precision == "float32" else set()
    return [Option(Fp32(), runtime) for runtime in sorted(engines)]
