"""quantize: propose candidates, make them, screen them cheaply, race the finalists, and report the reopened winner."""

from __future__ import annotations

import math
from dataclasses import replace

from omgoptim.errors import RequestError
from omgoptim.models.artifact import Manifest
from omgoptim.operations.candidates import Option, Program, Proposal, propose
from omgoptim.operations.choosing import Preference, finalists
from omgoptim.operations.context import RunContext
from omgoptim.operations.explain import explain
from omgoptim.operations.finals import Final, final_race
from omgoptim.operations.fixed_batch import at_batch_one
from omgoptim.operations.guard import Guarded, Search, repair, worth_repairing
from omgoptim.operations.guard_again import search_again
from omgoptim.operations.guard_report import with_guard
from omgoptim.operations.kept import Run, keep
from omgoptim.operations.making import Made, float_program, make
from omgoptim.operations.measured import artifact_record
from omgoptim.operations.no_op import nothing_made
from omgoptim.operations.output import deliver, free_output
from omgoptim.operations.planning import plan_report
from omgoptim.operations.qat import TRAINED, Trained, train
from omgoptim.operations.screening import Attempt, Yardstick, screen
from omgoptim.operations.splits import Splits, splits_of
from omgoptim.operations.subject import Live, Subject, prepare
from omgoptim.operations.unrolled import unrolled_note
from omgoptim.reports import EfficiencyReport
from omgoptim.requests import QuantizeRequest
from omgoptim.requests.quantize import Fp32, Qat
from omgoptim.runtimes import ENGINES

SHARE_S = 300.0
"""Seconds that making one candidate of several may take, unless the effort is best."""


def quantize(request: QuantizeRequest, context: RunContext, live: Live | None = None) -> EfficiencyReport:
    """Quantize a model and keep the best candidate that holds the guard. See `QuantizeRequest`."""
    output = free_output(request.output, request.allow_path, context)
    subject = prepare(request, context, live)
    if subject.precision.startswith("int"):
        raise RequestError(
            f"'{request.model}' is quantized already",
            f"its artifact is in {subject.precision}, and another rounding would only lose more",
            "quantize the float model that it was made from",
        )
    unrolled = unrolled_note(subject, request)
    if unrolled is not None:
        subject = replace(subject, notes=[*subject.notes, unrolled])
        context.progress(f"exporting the model, which takes long: {unrolled}", 0.08)
    else:
        context.progress("exporting the model", 0.08)
    program = float_program(subject, context, or_at_one=True)
    if program.fixed_batch is not None:
        subject = at_batch_one(subject, program.fixed_batch, context.work)
    proposal = propose(request, subject, program)
    if request.plan:
        return plan_report(request, context, subject, program, proposal)
    splits = splits_of(request, subject, proposal)
    trained: Trained | None = None
    if isinstance(request.scheme, Qat):
        trained = train(request, request.scheme, context, subject, program, splits, live)
        subject, program = trained.subject, trained.program
        splits.notes.extend(trained.warnings)
    attempts = _make_all(request, context, subject, program, proposal, splits)
    yardstick = screen(request, context, subject, [a for a in attempts if not a.reference], splits.selection)
    final, guarded = _finals(request, context, subject, program, attempts, splits, yardstick)
    context.progress("saving the artifact", 0.97)
    run = Run(request, context, subject, program, proposal, attempts, final, splits.notes, trained)

    report = with_guard(keep(run), request, guarded, final)
    explanation = None
    if request.explain and yardstick is not None:
        winner = final.winner.attempt
        explanation = explain(
            request, context, subject, program, attempts, winner, guarded, splits.calibration, yardstick
        )
    place, untold = deliver(context.artifact, output, final.holds)
    update = {"explanation": explanation, "warnings": [*report.warnings, *untold]}
    return report.model_copy(update=update | ({"artifact": artifact_record(place)} if output else {}))


def _finals(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    program: Program,
    attempts: list[Attempt],
    splits: Splits,
    yardstick: Yardstick | None,
) -> tuple[Final, Guarded | None]:
    """The final measurement, after a search for layers to keep in float where int8 fails the guard; and after another
    one, on other selection samples, where what the first search found fails it on the evaluation data."""
    preference = Preference(request.prefer, Manifest.read(subject.baseline).size_bytes)
    guard = request.max_quality_drop
    if yardstick is None:
        return final_race(request, context, subject, finalists(attempts, guard, preference), attempts, preference), None
    search = Search(request, context, subject, program, splits.calibration, yardstick, preference)
    guarded = repair(search, attempts, worth_repairing(attempts, guard, preference))
    chosen = finalists(attempts, guard, preference)
    final = final_race(request, context, subject, chosen, attempts, preference)
    found = search_again(search, splits, attempts, final, guarded)
    if found is None:
        return final, guarded
    chosen = [*chosen, found.attempt]
    return final_race(request, context, subject, chosen, attempts, preference, found.attempt), found.guarded


def _make_all(
    request: QuantizeRequest,
    context: RunContext,
    subject: Subject,
    program: Program,
    proposal: Proposal,
    splits: Splits,
) -> list[Attempt]:
    """Every proposed candidate's artifact, and float32 on the engines of these, which tells what an engine alone
    brings. If no candidate could be made, the first one's reason is the error."""
    attempts: list[Attempt] = []
    twins: dict[str | None, Made] = {}
    for index, option in enumerate(proposal.options):
        start = TRAINED if isinstance(request.scheme, Qat) else 0.1
        doing = making_words(option.name, index, len(proposal.options))
        context.progress(doing, start + (0.35 - start) * index / len(proposal.options))
        key = None if option.on_module else option.params.model_dump_json()
        left = len(proposal.options) - index > 1 or any(attempt.made.folder for attempt in attempts)
        made = make(
            option,
            subject,
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
        attempts.append(Attempt(made, error=made.error))
    if all(attempt.error for attempt in attempts):
        raise nothing_made([(a.made.option.name, a.error) for a in attempts if a.error], request)
    for option in _references(proposal, subject, program):
        key = option.params.model_dump_json()
        made = make(option, subject, program, splits.calibration, context, request.seed, twins.get(key))
        if made.folder:
            twins.setdefault(key, made)
            attempts.append(Attempt(made, reference=True))
    return attempts


def making_words(name: str, index: int, count: int) -> str:
    """What progress says while a candidate is made."""
    return f"making candidate {index + 1} of {count}, {name}" if count > 1 else f"making {name}"


def _references(proposal: Proposal, subject: Subject, program: Program) -> list[Option]:
    """Float32 on each engine that runs programs and is proposed, where that is no candidate and not the original."""
    original = Manifest.read(subject.baseline)
    engines = {o.runtime for o in proposal.options if ENGINES[o.runtime].runs == "program" and program.path}
    engines -= {option.runtime for option in proposal.options if isinstance(option.params, Fp32)}
    engines -= {original.runtime} if original.precision == "float32" else set()
    return [Option(Fp32(), runtime) for runtime in sorted(engines)]
