"""A further search where what was found fails the guard on the evaluation data: other selection samples judge it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from omgoptim.errors import OmgoptimError
from omgoptim.measure.metrics import resolve_metric
from omgoptim.measure.quality import read_outputs, score
from omgoptim.models.artifact import Manifest
from omgoptim.models.samples import Samples
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, Evaluators
from omgoptim.operations.quantization.final_race import Final
from omgoptim.operations.quantization.mixed_precision import MixedPrecision, Search, repair
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, within_safely
from omgoptim.operations.quantization.selection import dominated
from omgoptim.operations.quantization.splits import Splits, other_samples


@dataclass(frozen=True, slots=True)
class FoundAgain:
    """What the further search ended with."""

    result: CandidateResult
    mixed_precision: MixedPrecision


def search_again(
    search: Search, splits: Splits, results: list[CandidateResult], final: Final, mixed_precision: MixedPrecision | None
) -> FoundAgain | None:
    """Search again on selection samples that chose nothing so far, if a calibrated candidate was first in the order and
    failed the guard on the evaluation data. That data decides only whether there is a further search, not its result.

    Returns:
        A candidate that holds the guard on those samples, with a margin; None where there is none, or nothing to do.
    """
    failed = final.passed_over[0].result if final.passed_over else None
    if failed is None or failed.made.option.scheme not in CALIBRATED:
        return None
    others = other_samples(search.request, search.loaded, splits)
    if others is None:
        return None
    first = splits.selection
    samples = Samples([*first.batches, *others.batches], [*first.targets, *others.targets])
    search.context.progress("searching again: what was found fails the guard on the evaluation data", 0.55)
    plain = mixed_precision.base if mixed_precision is not None else failed
    base = CandidateResult(plain.made, timing=plain.timing)
    try:
        other = _judging(search, samples, base)
    except OmgoptimError:  # what has been measured stands without it
        return None
    if base.drop is None or within_safely(base, search.request.max_quality_drop):
        return None  # these samples see nothing wrong with it, so they can lead to nothing else
    again = replace(search, screening=other, judged_on=f"selection samples, {others.count} of them new,")
    found = repair(again, results, base)
    if found is None or not found.ignore or found.option.params == failed.made.option.params:
        return None
    best = found.best
    guard = search.request.max_quality_drop
    if best is None or not within_safely(best, guard) or dominated(best, results, guard, search.preference):
        return None
    if best.timing is None:
        return None
    best.status, best.why = "finalist", ""
    return FoundAgain(best, found)


def _judging(search: Search, samples: Samples, base: CandidateResult) -> ScreeningReference:
    """What other candidates are judged with on these samples; `base` is judged at once."""
    context, loaded = search.context, search.loaded
    inputs = samples.write(context.work / "selection-again")
    targets = [context.work / "again" / name for name in ("original", "base")]
    if base.made.folder is None:
        raise OmgoptimError("the candidate has no artifact")
    with Evaluators(loaded.bench) as evaluators:
        evaluators.begin(base.made.folder, base.made.option.runtime)
        evaluators.run(loaded.baseline, f"original on {Manifest.read(loaded.baseline).runtime}", inputs, targets[0])
        evaluators.run(base.made.folder, base.made.option.runtime, inputs, targets[1])
    original = read_outputs(targets[0])
    limit_s = search.request.time_limit_s
    metric = resolve_metric(
        loaded.metric, loaded.signature, original, samples.targets, loaded.policy, limit_s, loaded.outputs
    )
    quality = score(metric, original, samples.targets, original)
    other = ScreeningReference(inputs, samples.targets, metric, original, quality, samples.count)
    other.judge(base, read_outputs(targets[1]))
    return other
