"""End of a search: the finalists measured against the original, and the report with all trials."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from omgoptim.architecture_search.trials import TrialResult
from omgoptim.operations.architecture_search.predictions import Predictions, first_configurations
from omgoptim.operations.architecture_search.search_runner import FINALS, SearchResult, SearchRunner, trial_record
from omgoptim.operations.architecture_search.spaces import SearchSpace
from omgoptim.operations.compression_job import Job
from omgoptim.operations.context import Stage
from omgoptim.operations.dry_run import dry_run_report
from omgoptim.operations.final_measurement import (
    SPAN,
    FinalChoice,
    MeasuredEntry,
    PairedTimings,
    RankingRule,
    TimedEntry,
    guard_reasons,
    measure_finalists,
)
from omgoptim.operations.final_report import final_report
from omgoptim.operations.goal import Goal, Missed
from omgoptim.operations.loaded_model import LoadedModel
from omgoptim.operations.next_steps import result_arguments, same_arguments, step
from omgoptim.operations.report_records import gains_record, measurement_record
from omgoptim.operations.verdict import (
    Outcome,
    quality_sentence,
    size_phrase,
    speed_phrase,
)
from omgoptim.reports import Candidate, EfficiencyReport, Gains, Measurement, NextStep
from omgoptim.requests import SearchRequest

MAX_REJECTED = 20
"""Rejected networks that a report lists. Chosen: their reasons are alike."""


def plan_report(job: Job[SearchRequest], search_space: SearchSpace) -> EfficiencyReport:
    """Return the plan of a search; nothing is trained."""
    request, space = job.request, search_space.product
    if space is None:
        what, first = "A conditional space, searched by TPE", 0
        candidates = []
    else:
        what = f"{space.size:,} networks of {len(space.knobs)} choices"
        first = len(first_configurations(space, request.seed, request.trials))
        candidates = [
            Candidate(
                name=knob.name,
                scheme="choice",
                runtime=job.runtime,
                status="planned",
                why=", ".join(str(option) for option in knob.options),
            )
            for knob in space.knobs
        ]
    summary = (
        f"{what}. {first} untrained networks are measured on {job.runtime} in {request.precision} first, then "
        f"{request.trials} are trained for up to {request.whole_epochs} epochs; the best {FINALS} are trained to the "
        "end and compared with the original. Evaluation data is read once, at the end."
    )
    report = dry_run_report(request, job.context, job.loaded, summary)
    return report.model_copy(update={"warnings": [*report.warnings, *search_space.notes], "candidates": candidates})


def search_report(
    trials: SearchRunner, found: SearchResult, control: SearchResult | None, chosen: Chosen, one: Finalist
) -> EfficiencyReport:
    """Return the report of a finalist as that of the run's artifact."""
    job, request = trials.job, trials.job.request
    summary = " ".join([*chosen.leading_warnings(one), _summary(trials, found, control, chosen, one)])
    notes = [*job.datasets.notes, *trials.space.notes, *_ended_early(request, found)]
    report = final_report(chosen, one, summary, notes)
    candidates = _candidates(trials, found, chosen, one, "trial")
    if control is not None:
        candidates += _candidates(trials, control, chosen, one, "random trial")
    return report.model_copy(update={"next_steps": _next_steps(job, report.outcome), "candidates": candidates})


def _ended_early(request: SearchRequest, found: SearchResult) -> list[str]:
    """Return the warning that fewer trials than requested were trained."""
    trained = found.counts.trained
    if trained >= request.trials:
        return []
    if found.counts.exhausted:
        return [f"no further network is predicted to meet the targets: {trained} were trained"]
    return [f"the budget allowed {trained} of {request.trials} trials"]


def prediction_error(results: Sequence[TrialResult]) -> float | None:
    """Return the median relative error of the latencies predicted for trials, before each was measured."""
    errors = [
        abs(one.predicted_ms - one.measured_ms) / one.measured_ms
        for one in results
        if one.predicted_ms is not None and one.measured_ms
    ]
    return statistics.median(errors) if errors else None


def _summary(
    trials: SearchRunner, found: SearchResult, control: SearchResult | None, chosen: Chosen, one: Finalist
) -> str:
    outcome = chosen.outcome(one)
    became = f"{size_phrase(one.gains)}, {speed_phrase(one.gains)}"
    quality = quality_sentence(one.before, one.quality)
    if outcome == "guard_failed":
        reasons = guard_reasons(one, chosen.guard)
        first = f"The goal was not met: {'; '.join(reasons)}. The nearest, {one.entry.name}, is {became}."
    else:
        first = f"{'No gain. ' if outcome == 'no_gain' else ''}{one.entry.name.capitalize()} is {became}."
    result_counts = found.counts
    counts = f"{result_counts.trained} networks were trained, {result_counts.rejected} missed a target before training"
    counts += f", {result_counts.failed} failed." if result_counts.failed else "."
    return " ".join(
        [first, quality, counts, *_prediction_sentences(found, trials.predictions), *_control_sentences(found, control)]
    )


def _prediction_sentences(found: SearchResult, predictions: Predictions | None) -> list[str]:
    error = prediction_error(list(found.results.values()))
    if predictions is None or error is None:
        return []
    left_out = predictions.error
    other = f" ({left_out:.0%} when a measured network is left out)" if left_out is not None else ""
    return [f"Latency predicted against measured: median error {error:.0%}{other}."]


def _control_sentences(found: SearchResult, control: SearchResult | None) -> list[str]:
    if control is None:
        return []
    ours, theirs = (each.results[each.finals[0]].rungs[-1] for each in (found, control))
    return [
        f"Random search with the same rejection and halving reached {theirs:.4f} on the selection samples in "
        f"{control.counts.trained} trials, this one {ours:.4f} in {found.counts.trained}."
    ]


def _candidates(
    trials: SearchRunner, found: SearchResult, chosen: Chosen, one: Finalist, prefix: str
) -> list[Candidate]:
    """Return the trials of a search, the finalists first; of the rejected ones the first few."""
    by_rule = prefix == "trial"
    finalists = {other.entry.number for other in chosen.finalists if other.entry.by_rule == by_rule}
    delivered = one.entry.number if one.entry.by_rule == by_rule else None
    rejected = 0
    candidates = []
    for number, result in sorted(found.results.items(), key=lambda each: (each[0] not in finalists, each[0])):
        rejected += result.outcome == "rejected"
        if result.outcome == "rejected" and rejected > MAX_REJECTED:
            continue
        status = "chosen" if number == delivered else "finalist" if number in finalists else _STATUS[result.outcome]
        record = trial_record(trials.job, trials.costs, f"{prefix} {number}", status, found.specs[number], result)
        candidates.append(record)
    return candidates


_Status = Literal["chosen", "finalist", "dropped", "failed", "skipped"]

_STATUS: dict[str, _Status] = {"trained": "dropped", "stopped": "dropped", "rejected": "skipped", "failed": "failed"}


def _next_steps(job: Job[SearchRequest], outcome: Outcome) -> list[NextStep]:
    request, run_id = job.request, job.context.run_id
    if outcome == "guard_failed" and request.whole_epochs <= 3000:
        longer = same_arguments(request) | {"epochs": 3 * request.whole_epochs}
        return [step("search", longer, "longer training may recover the quality")]
    if request.precision == "float32" and request.data:
        again = {"model": run_id, "data": request.data, "max_quality_drop": request.max_quality_drop}
        return [step("quantize", again, "the network is in float32: quantization makes it smaller and faster")]
    return [step("profile", result_arguments(job.request, run_id), "shows the time by layer of the artifact")]


@dataclass(frozen=True, slots=True)
class TrainedTrial:
    """A trial that was trained to the end, as an entry of the final measurement."""

    name: str
    number: int
    artifact: Path
    quality: float
    """On the selection samples."""
    by_rule: bool
    """True if the proposal rule chose it, False if the random control did."""


Finalist = MeasuredEntry[TrainedTrial]
Chosen = FinalChoice[TrainedTrial]


def measure_trials(job: Job[SearchRequest], baseline: Path, entries: Sequence[TrainedTrial]) -> Chosen:
    """Time the original and the finalists in turns, read the evaluation data once, and choose.

    The order of preference: networks that meet the targets first, then by quality on the selection samples.

    Raises:
        OmgoptimError: no finalist could be measured.
    """
    loaded = replace(job.loaded, baseline=baseline)
    stage = Stage(job.context, "measuring the finalists against the original", SPAN)
    return measure_finalists(job.request, loaded, entries, TrialRanking(job.request, loaded), stage)


@dataclass(frozen=True, slots=True)
class TrialRanking(RankingRule[TrainedTrial]):
    """Order of preference: networks that meet the targets, then by quality on the selection samples."""

    request: SearchRequest
    loaded: LoadedModel

    def order(self, timings: PairedTimings[TrainedTrial]) -> list[TimedEntry[TrainedTrial]]:
        """Return the entries in the order of preference."""
        before = measurement_record(self.loaded.baseline, timings.original, self.loaded.bench, None, None, None)

        def place(one: TimedEntry[TrainedTrial]) -> tuple[float, ...]:
            after = measurement_record(one.entry.artifact, one.timing, self.loaded.bench, None, None, None)
            over = self.missed(after, gains_record(before, after, one.timing, None, timings.load), timings)
            return float(bool(over)), over[0].factor if over else 1.0, -one.entry.quality

        return sorted(timings.timed, key=place)

    def missed(self, after: Measurement, gained: Gains, timings: PairedTimings[TrainedTrial]) -> list[Missed]:
        """Return the targets that are not met, the furthest first."""
        missed = Goal.of(self.request).missed(after, timings.load)
        target = self.request.target_speedup
        if target is not None and gained.speedup is not None and gained.speedup < target and after.latency_ms_p50:
            allowed = after.latency_ms_p50 * gained.speedup / target
            missed.append(Missed(f"latency for a speedup of {target:g}:", after.latency_ms_p50, allowed, "ms"))
        return sorted(missed, key=lambda one: -one.factor)
