"""Next steps after a model was pruned, factorized or distilled."""

from __future__ import annotations

from omgoptim.operations.advice import common_arguments, same_arguments, step
from omgoptim.operations.subject import Subject
from omgoptim.reports import Gains, NextStep
from omgoptim.requests import DistillRequest, FactorizeRequest, PruneRequest
from omgoptim.requests.distill import Auto
from omgoptim.requests.prune import Structured


def next_steps(
    verb: str,
    request: PruneRequest | FactorizeRequest | DistillRequest,
    outcome: str,
    run_id: str,
    subject: Subject,
    gains: Gains,
    missed: bool,
) -> list[NextStep]:
    """What helps with what is still open, and what comes after it."""
    steps: list[NextStep] = []
    again = {
        name: value
        for name, value in common_arguments(request).items()
        if name in ("data", "metric", "inputs", "project", "python")
    }
    if outcome == "guard_failed":
        steps += _more_training(verb, request, subject)
    single_weights = isinstance(request, PruneRequest) and not isinstance(request.method, Structured)
    slower = gains.speedup_low is None or gains.speedup_low <= 1
    if single_weights and slower and outcome != "guard_failed":
        why = "zeros do not make a dense engine faster; removed channels do"
        steps.append(step("prune", common_arguments(request) | {"method": "structured"}, why))
    if outcome != "guard_failed" or missed:
        why = "quantize what was kept: the gains multiply, and quantization goes last"
        steps.append(step("quantize", {"model": run_id, **again}, why))
    if outcome == "ok" and len(steps) < 3:
        steps.append(
            step("profile", {"model": run_id, **again}, "see where the time is now, on the hardware it runs on")
        )
    return steps[:3]


def _more_training(
    verb: str, request: PruneRequest | FactorizeRequest | DistillRequest, subject: Subject
) -> list[NextStep]:
    """Training, or more of it; and smaller steps."""
    given = same_arguments(request)
    epochs = 1 if request.epochs is None else request.epochs
    if not subject.data.real:
        known = {key: value for key, value in given.items() if key != "inputs"} | {"data": "file.py:load"}
        return [step(verb, known, "training brings back what was lost: give data")]
    steps = [step(verb, given | {"epochs": max(2, 2 * epochs)}, "longer training brings more back")]
    if isinstance(request, PruneRequest) and request.amounts is None and request.goal is not None:
        gently = given | {"rounds": max(3, 2 * request.rounds), "epochs": max(1, epochs)}
        steps.append(step(verb, gently, "smaller steps, each trained back, lose less than one large one"))
    if isinstance(request, DistillRequest) and isinstance(request.student, Auto) and request.student.compression:
        larger = given | {"target_compression": max(1.5, request.student.compression / 2)}
        steps.append(step(verb, larger, "a larger student keeps more"))
    return steps
