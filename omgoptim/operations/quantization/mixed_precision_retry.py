"""Second mixed precision search on unused samples, where the first result fails on the evaluation data."""

from __future__ import annotations

from dataclasses import replace

from omgoptim.errors import OmgoptimError
from omgoptim.measure.quality import read_outputs
from omgoptim.models.manifest import Manifest
from omgoptim.models.samples import Samples
from omgoptim.operations.quantization.candidate_evaluator import CALIBRATED, Evaluators
from omgoptim.operations.quantization.final_race import CandidateChoice
from omgoptim.operations.quantization.mixed_precision import (
    MixedPrecision,
    MixedPrecisionSearch,
    search_mixed_precision,
)
from omgoptim.operations.quantization.screening import CandidateResult, ScreeningReference, within_with_margin
from omgoptim.operations.quantization.selection import dominated_by
from omgoptim.operations.quantization.splits import Splits, unused_samples


def retry_mixed_precision(
    search: MixedPrecisionSearch,
    splits: Splits,
    results: list[CandidateResult],
    final: CandidateChoice,
    mixed_precision: MixedPrecision | None,
) -> MixedPrecision | None:
    """Search again on unused samples if the preferred calibrated candidate fails the guard on the evaluation data.

    The evaluation data decides only whether there is a second search, not its result.

    Returns:
        The search, whose best candidate passes the guard on those samples with a margin; None where none does.
    """
    failed = final.rejected[0].entry if final.rejected else None
    if failed is None or failed.built.spec.scheme not in CALIBRATED:
        return None
    others = unused_samples(search.request, search.builder.loaded, splits)
    if others is None:
        return None
    first = splits.selection
    samples = Samples([*first.batches, *others.batches], [*first.targets, *others.targets])
    search.builder.context.progress("searching again: the result fails the quality guard on the evaluation data", 0.55)
    plain = mixed_precision.base if mixed_precision is not None else failed
    base = CandidateResult(plain.built, timing=plain.timing)
    try:
        other = _new_reference(search, samples, base)
    except OmgoptimError:  # the measured results remain valid
        return None
    if base.drop is None or within_with_margin(base, search.request.max_quality_drop):
        return None  # it passes on these samples: a search on them would not change it
    again = replace(search, screening=other, samples_name=f"selection samples, {others.count} of them new,")
    found = search_mixed_precision(again, results, base)
    if found is None or not found.improved or found.best.built.spec.params == failed.built.spec.params:
        return None
    best, guard = found.best, search.request.max_quality_drop
    if best.timing is None or not within_with_margin(best, guard):
        return None
    if dominated_by(best, results, guard, search.preference):
        return None
    best.status, best.why = "finalist", ""
    return found


def _new_reference(search: MixedPrecisionSearch, samples: Samples, base: CandidateResult) -> ScreeningReference:
    """Build the screening reference of these samples and evaluate `base` on them."""
    context, loaded = search.builder.context, search.builder.loaded
    inputs = samples.write(context.work / "selection-again")
    targets = [context.work / "again" / name for name in ("original", "base")]
    with Evaluators(loaded.bench) as evaluators:
        evaluators.begin(base.artifact, base.built.spec.runtime)
        evaluators.run(loaded.baseline, f"original on {Manifest.read(loaded.baseline).runtime}", inputs, targets[0])
        evaluators.run(base.artifact, base.built.spec.runtime, inputs, targets[1])
    other = ScreeningReference.of(loaded, samples, inputs, targets[0], search.request.time_limit_s)
    other.evaluate(base, read_outputs(targets[1]))
    return other
