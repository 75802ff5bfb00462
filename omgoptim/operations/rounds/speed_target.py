"""Pruning to a measured speed: prune, measure in fresh processes, and correct the target until it is reached."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from omgoptim.errors import OmgoptimError
from omgoptim.measure.launch import TimingPlan
from omgoptim.measure.timing import Timing, time_artifacts
from omgoptim.operations.baseline import baseline_on
from omgoptim.operations.compression_job import Job
from omgoptim.operations.final_measurement import MeasuredArtifact
from omgoptim.operations.save_module import save
from omgoptim.requests import Params, PruneRequest
from omgoptim.requests.prune import Structured
from omgoptim.techniques.prune._channels.channel_allocation import most_important
from omgoptim.techniques.prune._channels.dependency_graph import find_groups
from omgoptim.techniques.prune._channels.importance import importance_of
from omgoptim.techniques.prune._channels.removal import remove
from omgoptim.techniques.prune._latency.knapsack import choose_widths, fastest_widths
from omgoptim.techniques.prune._latency.latency_table import (
    MeasuredCut,
    TimeTable,
    full_ms,
    min_ms,
    next_target,
    predicted_ms,
)
from omgoptim.techniques.prune._latency.layer_benchmark import measure_tile_size
from omgoptim.techniques.prune._latency.layer_timing import measure_layer_times
from omgoptim.techniques.prune.structured import keep_only, nothing_to_remove
from omgoptim.techniques.registry import Outcome
from omgoptim.training.modes import on_device

SEARCH_TIMING = TimingPlan(launches=3, most_launches=3, rounds=3, throughput_launches=0)
"""Timing within the search, of fewer launches than `standard`: the full measurement follows."""

MAX_ATTEMPTS = 6
"""Maximum number of measured attempts; each exports, saves and times the model."""

CLOSE_FACTOR = 1.06
"""Factor below which an attempt that is faster than the target ends the search. Chosen: twice the interval of a
measurement; closer attempts would follow noise."""

MARGIN = 0.015
"""Safety margin on the target for the scatter between search and full measurement. Chosen: half of the 3 % up to which
`standard` narrows the interval."""

MIN_TARGET_FACTOR = 1.001
"""Minimum ratio of a knapsack target to the least time that the knapsack can reach. Chosen: above the rounding of the
table's sums."""

NOISE_FACTOR = 0.97
"""Fraction of the target speed that counts as reached if the target lies in the interval: `standard` adds launches
while the interval is wider than 3 % (docs/timing.md)."""


@dataclass(frozen=True, slots=True)
class SpeedGoal:
    """Target speed at the end of a round."""

    speedup: float | None
    """Latency of the original over the result's, on the same engine."""
    latency_ms: float | None
    """Or milliseconds of one call at batch 1."""
    share: float
    """Share of the reduction by the end of this round, 0..1, in log time."""

    @property
    def amount(self) -> float | None:
        """Fraction of the time to remove by the end of the round; unknown for a latency target."""
        return None if self.speedup is None else 1 - self.speedup**-self.share

    def fraction(self, original_ms: float) -> float:
        """Return the target time as a fraction of the original's."""
        wanted = 1 / self.speedup if self.speedup is not None else (self.latency_ms or original_ms) / original_ms
        return float(wanted**self.share)


@dataclass(frozen=True, slots=True)
class PrunedWidths:
    """Measured attempt: layer widths and their time."""

    widths: dict[str, int]
    fraction: float
    """Measured time of the whole model as a fraction of the original's."""


def prune_to_speed(
    job: Job[PruneRequest], goal: SpeedGoal, params: Params, module: nn.Module, span: tuple[float, float]
) -> Outcome:
    """Remove channels from `module` until the model, measured in fresh processes, reaches the target speed.

    Returns:
        The changes. Where the target is unreachable, the fastest attempt, with a note on the limit.

    Raises:
        OmgoptimError: no group can be pruned or timed, or no attempt could be measured.
    """
    assert isinstance(params, Structured)  # what has such a goal
    run = job.module_run(span)
    start, end = span
    baseline = baseline_on(job.request.runtime, job.loaded, job.context)
    job.context.progress("finding removable channels", start)
    groups = find_groups(module, params, run)
    if not groups.groups:
        raise nothing_to_remove(groups)
    importance = importance_of(module, groups, params, run)
    job.context.progress("measuring the latency of each group by width", start + 0.1 * (end - start))
    round_to = params.round_to or measure_tile_size(module, run)
    table = measure_layer_times(module, groups.groups, run, round_to=round_to)
    original_ms, start_fraction = _measure(job, module, baseline)
    target = goal.fraction(original_ms) / start_fraction * (1 - MARGIN)
    if target >= 1:
        return Outcome(
            [], groups.skipped, [f"the model already takes {start_fraction * original_ms:.3g} ms; nothing was removed"]
        )

    def measured_at(number: int, widths: dict[str, int]) -> float:
        part = start + (end - start) * (0.2 + 0.8 * number / MAX_ATTEMPTS)
        job.context.progress(f"pruning for {1 / (target * start_fraction):.3g}x speed, attempt {number + 1}", part)
        trial = copy.deepcopy(module)
        remove(trial, groups, most_important(groups, importance, widths), run)
        return _measure(job, trial, baseline)[1] / start_fraction

    best = _best(_attempts(table, importance, params.max_layer_ratio, target, measured_at), target)
    outcome = keep_only(module, groups, most_important(groups, importance, best.widths), params, run)
    outcome.skipped.extend(skip for skip in groups.skipped if skip not in outcome.skipped)
    if best.fraction > target / (1 - MARGIN):
        outcome.notes.append(_unreachable_note(best, start_fraction, target, table, params, original_ms))
    return outcome


def _attempts(
    table: TimeTable,
    importance: Mapping[str, Tensor],
    max_layer_ratio: float,
    target: float,
    measured_at: Callable[[int, dict[str, int]], float],
) -> list[PrunedWidths]:
    """Measure attempts that approach the target until one reaches it closely or no new widths remain.

    Args:
        table: latency by width of each layer.
        importance: of the channels of each group, shape (width,).
        max_layer_ratio: largest fraction of a layer's channels that may go.
        target: fraction of the whole model's time to come down to.
        measured_at: `measured_at(number, widths)`: the whole model's time at these widths, as a fraction.
    """
    narrowest = fastest_widths(table, importance, max_layer_ratio)
    least = predicted_ms(table, narrowest) / full_ms(table)
    attempts: list[PrunedWidths] = []
    history: list[MeasuredCut] = []
    while len(attempts) < MAX_ATTEMPTS and not _reached(attempts, target):
        wanted = next_target(history, target)
        beyond = wanted <= least * MIN_TARGET_FACTOR  # below the narrowest allowed widths
        widths = narrowest if beyond else choose_widths(table, importance, wanted, max_layer_ratio)
        if any(attempt.widths == widths for attempt in attempts):
            break
        fraction = measured_at(len(attempts), widths)
        attempts.append(PrunedWidths(widths, fraction))
        history.append(MeasuredCut(wanted, predicted_ms(table, widths) / full_ms(table), fraction))
        if widths == narrowest and fraction > target:
            break
    return attempts


def _measure(job: Job[PruneRequest], module: nn.Module, baseline: Path) -> tuple[float, float]:
    """Return the original's milliseconds and the module's time as a fraction, from the same launches."""
    attempts = job.context.work / "cuts"
    attempts.mkdir(parents=True, exist_ok=True)
    folder = attempts / str(len(list(attempts.iterdir())))
    save(on_device(module, "cpu"), job.loaded, job.runtime, folder, job.context, to_time_only=True)
    with job.context.measuring():
        first, timing = time_artifacts([baseline, folder], job.loaded.bench, SEARCH_TIMING, job.request.seed)
    if isinstance(first, OmgoptimError):
        raise first
    if isinstance(timing, OmgoptimError):
        raise timing
    return first.latency_ms_p50, 1 / _speedup(timing)


def _speedup(timing: Timing) -> float:
    if timing.speedup is None:
        raise ValueError("the reference has no speedup")
    return timing.speedup.value


def _reached(attempts: Sequence[PrunedWidths], target: float) -> bool:
    return any(attempt.fraction <= target <= attempt.fraction * CLOSE_FACTOR for attempt in attempts)


def _best(attempts: Sequence[PrunedWidths], target: float) -> PrunedWidths:
    """Return the slowest attempt that reaches the target; if none does, the fastest."""
    holding = [attempt for attempt in attempts if attempt.fraction <= target / (1 - MARGIN)]
    return (
        max(holding, key=lambda attempt: attempt.fraction)
        if holding
        else min(attempts, key=lambda attempt: attempt.fraction)
    )


def _unreachable_note(
    best: PrunedWidths, start_fraction: float, target: float, table: TimeTable, params: Structured, original_ms: float
) -> str:
    """Return a note on the speed reached and the limit."""
    measured, asked = 1 / (best.fraction * start_fraction), (1 - MARGIN) / (target * start_fraction)
    floor = min_ms(table, params.max_layer_ratio) / full_ms(table)
    left = best.fraction - predicted_ms(table, best.widths) / full_ms(table)
    why = (
        f"with every group at its minimum width (max_layer_ratio {params.max_layer_ratio:g}) the layers still take "
        f"{floor:.0%} of their time"
    )
    if left > 0.05:
        why += f", and about {left * start_fraction * original_ms:.2g} ms per call are spent outside of them"
    return f"a speedup of {asked:.3g}x is not reachable: the fastest measured attempt is {measured:.3g}x; {why}"


def missed_speed(method: Structured, measured: MeasuredArtifact) -> str | None:
    """Return the reason by the full measurement why a target was missed; None if it was not, or is undecided."""
    speedup, high = measured.gains.speedup, measured.gains.speedup_high
    if speedup is None:  # the machine was overloaded
        return None
    if method.target_latency_ms is not None:
        took, asked = measured.after.latency_ms_p50 or 0.0, method.target_latency_ms
        return (
            None if took * NOISE_FACTOR <= asked else f"one call takes {took:.3g} ms, above the target of {asked:g} ms"
        )
    if method.target_speedup is None:
        return None
    asked = method.target_speedup
    if speedup >= asked or (speedup >= NOISE_FACTOR * asked and (high is None or high >= asked)):
        return None
    return f"the measured speedup is {speedup:.2f}x, below the target of {asked:g}x"
